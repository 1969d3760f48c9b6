"""README.md and docs/: links, commands, examples and names of metrics fit the code."""

import inspect
import re
import shlex

import pytest
import torch
from conftest import ROOT, launch, read_metrics, small

import eval as evaluation
import merge
import train
from commands.checks import check
from support import flags

README, DOCS = ROOT / "README.md", ROOT / "docs"
TEXTS = {page: page.read_text(encoding="utf-8") for page in [README, *sorted(DOCS.glob("*.md"))]}
PROSE = {page: re.sub(r"^```.*?^```", "", text, flags=re.S | re.M) for page, text in TEXTS.items()}


def blocks(page, language):
    """What stands between ```language and ``` on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.S | re.M)


def commands():
    """(page, words) of every bash line, and of every command that a sentence names."""
    found = []
    for page in TEXTS:
        lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:torchrun|python)\s[^`]*)`", PROSE[page])
        found += [(page.name, shlex.split(line, comments=True)) for line in lines]
    return found


def calls_of(script):
    """(page, arguments) of the commands that run a script; `...` stands for any."""
    found = []
    for page, words in commands():
        if script in words and not {"--help", "..."} & {*words}:
            found.append((page, words[words.index(script) + 1 :]))
    assert found
    return found


def anchors(page):
    """What GitHub calls the headings of a page: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.*)$", PROSE[page], re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_short_and_their_python_compiles():
    for page, text in TEXTS.items():
        limit = {"README.md": 2000, "results.md": 6000}.get(page.name, 2500)
        assert len(text.split()) <= limit, page.name
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")


def test_links_lead_somewhere_and_to_every_page():
    linked = set()
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}"
            linked.add(target)
    assert {*DOCS.iterdir()} <= linked


def parsed(module, page, arguments):
    try:
        return flags.parse_args(module.Args, "", arguments)
    except SystemExit:
        pytest.fail(f"{page}: {shlex.join(arguments)}")


def test_merges_and_evaluations_parse():
    for script, module in {"merge.py": merge, "eval.py": evaluation}.items():
        for page, arguments in calls_of(script):
            parsed(module, page, arguments)


def test_trainings_parse_and_pass_the_checks(tmp_path, monkeypatch):
    """Other bases are not here to be checked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(blocks(README, "python")[0])
    for name in ("prompts.jsonl", "eval_prompts.jsonl"):
        (tmp_path / name).write_bytes((ROOT / "assets" / "tiny" / name).read_bytes())
    for page, arguments in calls_of("train.py"):
        args = parsed(train, page, arguments)
        if "--model" not in arguments:
            check(args, train.Args())


def test_experiments_have_their_flags():
    for page, words in commands():
        for script in [word for word in words if word.startswith("experiments/")]:
            source = (ROOT / script).read_text(encoding="utf-8")
            for flag in [word[2:] for word in words if word.startswith("--")]:
                assert flag in source, f"{page}: {shlex.join(words)}"


def test_every_flag_of_training_is_explained():
    source = inspect.getsource(train.Args)
    for name in vars(train.Args()):
        has_help = re.search(rf'^    {name}: .*\n    """.+"""$', source, re.M)
        assert has_help or f"--{name}" in "".join(TEXTS.values()), name


def lesson():
    """The functions that the answers of the lesson define: a subset rule and a potential."""
    names = {}
    for block in blocks(DOCS / "lesson.md", "python"):
        if block.startswith("def "):
            exec(block, names)
    return names["highest"], names["distance_to_centre"]


def test_the_answers_of_the_lesson_are_right():
    highest, distance_to_centre = lesson()
    assert sorted(highest(torch.tensor([[0.3, 0.9, 0.1, 0.5]]), 2)[0].tolist()) == [1, 3]
    two_clusters = torch.tensor([[[0.0], [0.0], [4.0], [4.0]]])
    assert distance_to_centre(two_clusters).tolist() == [[2.0, 2.0, 2.0, 2.0]]


@pytest.mark.slow
def test_the_examples_train(tiny, tmp_path, monkeypatch):
    """The reward of rewards.md; the lesson's subset rule and potential in place of train.py's."""
    highest, distance_to_centre = lesson()
    monkeypatch.setattr(train, "concentrated_subset", lambda r, keep, rule: highest(r, keep))
    monkeypatch.setattr(train, "group_diversity", lambda f, *_, **__: distance_to_centre(f))
    (tmp_path / "my_rewards.py").write_text(blocks(DOCS / "rewards.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    launch(small(tiny, tmp_path / "run", "--reward", "class:1,my_rewards:darkness:0.2"))
    metrics = read_metrics(tmp_path / "run")[-1]
    assert metrics["grad_norm"] > 0 and 0 < metrics["reward/darkness"] < 1


@pytest.mark.slow
def test_every_logged_number_is_explained(tiny, tmp_path):
    reward = ["--reward", "class:1,fid:0.3", "--reference", "20", "--refresh", "1", "--kl", "0.1"]
    launch(small(tiny, tmp_path / "run", *reward))
    explained = re.findall(r"`([\w/]+)`", TEXTS[DOCS / "metrics.md"])
    for name in read_metrics(tmp_path / "run", clock=True)[-1]:
        assert re.sub("^reward/.*", "reward/NAME", name) in [*explained, "iteration"]
