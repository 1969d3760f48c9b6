"""Every command that the READMEs name: it is taken from there as it stands, and run at small size, or where that is not possible, checked."""
import glob
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, read_metrics
from test_edm2 import snapshot, write
from test_edm2 import stand_ins as packages  # noqa: F401: what the pickles of EDM2 name
from test_models import names  # noqa: F401: the fixture that builds the bases

from bases import edm2
import eval as evaluation
import merge
import bases

SMALL = "--device cpu --iterations 1 --prompts_per_step 2 --group_size 4 --nearest 2 --steps 4 --window 0:2 --eval_images 20 --eval_steps 2".split()
SEARCH = "--device cpu --updates 1 --group_size 2 --steps 2".split()


def commands():
    """The lines of the READMEs' bash blocks, without comments and with continued lines joined."""
    blocks = [block for path in ("README.md", "experiments/README.md")
              for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), re.S | re.M)]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s#\s.*$", "", line).split()) for line in lines]


def starting(pattern):
    return [line for line in commands() if re.match(pattern, line)]


def arguments(line):
    """What stands behind the script, with stars and question marks as a shell would read them."""
    words = shlex.split(line)
    script = next(n for n, word in enumerate(words) if word.endswith(".py"))
    return [found for word in words[script + 1:] for found in (sorted(glob.glob(word)) if re.search(r"[*?]", word) else [word])]


TRAIN, PRESETS, EVAL = starting(r"torchrun train\.py(?!.*--model)"), starting(r"torchrun .*train\.py .*--model"), starting(r"python eval\.py")
MERGE, EDM2, LOOP = starting(r"python merge\.py"), starting(r"torchrun merge\.py"), starting(r"for f in edm2")
EXPERIMENTS, INSTALL = starting(r"(sudo .* && )?python experiments/"), starting(r"python3 -m venv")


def test_no_command_is_left_out():
    assert sorted(commands()) == sorted(TRAIN + PRESETS + EVAL + MERGE + EDM2 + LOOP + EXPERIMENTS + INSTALL + ["seq 0 999 > ids.txt"])
    assert all((TRAIN, len(PRESETS) == 4, EVAL, len(MERGE) == 3, len(EDM2) == 1, len(LOOP) == 1, EXPERIMENTS))
    assert {line.split(" && ")[-1] for line in INSTALL} == {"torchrun train.py", 'python -m pytest -q -m "slow or not slow"'}     # .ci/run does the second


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder like a clone's, with assets/tiny and two runs in it, of 60 iterations and of one."""
    place = tmp_path_factory.mktemp("clone")
    (place / "assets").mkdir()
    (place / "assets" / "tiny").symlink_to(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        launch([*SMALL, "--iterations", "60", "--eval_every", "60", "--out", "runs/default"])
        launch([*SMALL, "--drift", "off"])
    return place


@pytest.mark.parametrize("line", TRAIN)
def test_a_run_of_the_readme_runs(place, tmp_path, monkeypatch, line):
    monkeypatch.chdir(place)
    launch([*arguments(line), *SMALL, *(["--keep", "3"] if "--select" in line else []), "--out", str(tmp_path / "run")])
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and rows[1]["ratio_error"] < 1e-3 and (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("line", EVAL)
def test_an_evaluation_of_the_readme_runs(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    if "drift=off" in line:                                              # the small run's own name has its small sizes in it
        line = line.replace("runs/drift=off", next(str(p) for p in Path("runs").iterdir() if "drift=off" in p.name))
    argv = arguments(line)
    evaluation.main(argv + (["--n", "20", "--device", "cpu", "--steps", "2"] if "--n" in argv else []))
    out = argv[argv.index("--out") + 1] if "--out" in argv else None
    assert out is None or Path(out).exists()
    assert "vendi" in capsys.readouterr().out.lower() or argv[0] in ("images", "grid")


@pytest.mark.parametrize("line", MERGE)
def test_a_merge_of_the_readme_runs(place, monkeypatch, line):
    monkeypatch.chdir(place)
    argv = arguments(line)
    merge.main(argv + (SEARCH + "--images 30 --reference 60 --report_images 20".split() if argv[0] == "rl" else []))
    out = Path(argv[argv.index("--out") + 1])
    made, base = (bases.load(str(folder)).network.state_dict() for folder in (out / "model" if argv[0] == "rl" else out, "assets/tiny"))
    assert made.keys() == base.keys() and any(not torch.equal(made[name], base[name]) for name in base)


def few_features(images):
    return images.flatten(2).mean(2) + torch.arange(3, device=images.device)


@pytest.fixture
def stand_ins(names, tmp_path, monkeypatch):  # noqa: F811
    """The files that a preset names, and a command line with small random models in the place of published ones."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a boot\na bag\n")
    Path("ids.txt").write_text("\n".join(map(str, range(5))))
    np.savez("reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    known = {"stable-diffusion-v1-5/stable-diffusion-v1-5": names["sd1"], "stabilityai/stable-diffusion-3.5-medium": names["sd3"],
             "sit:SiT-XL-2-256.pt": names["sit"], "pickscore": "jpeg", "dinov2": "latents", "inception:inception.pt": "test_readme:few_features"}
    return lambda argv: [known.get(word, word) for word in argv]


@pytest.mark.parametrize("line", PRESETS)
def test_a_preset_of_the_readme_makes_sense_and_runs(stand_ins, capsys, line):
    argv = stand_ins(arguments(line))
    launch([*argv, "--dry_run", "--device", "cpu"])
    assert re.search(r"\d+ prompts; an iteration: \d+ groups x \d+ = \d+ rollouts of \d+ steps", capsys.readouterr().out)
    launch([*argv, *SMALL, *(["--lora", "2"] if "--lora" in argv else ["--reference", "40"]), "--out", "run"])
    assert read_metrics("run")[1]["grad_norm"] > 0 and Path("run", "model").is_dir()


def test_the_search_over_edm2_snapshots_runs(stand_ins, names):  # noqa: F811
    file = Path(names["edm2"].removeprefix("edm2:"))
    shutil.copytree(file.parent / "vae", "vae")
    for number in (1, 2):
        network = edm2.load(file)
        with torch.no_grad():
            [p.add_(0.1 * number * torch.randn_like(p)) for p in network.parameters()]
        write(Path(f"edm2-img512-xs-000{number}-0.100.pkl"), snapshot(network))
    code = re.search(r'python -c "(.*)" \$f', LOOP[0])[1]
    for file in sorted(glob.glob(re.search(r"in (\S+);", LOOP[0])[1])):
        subprocess.run([sys.executable, "-c", code, file], check=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    argv = stand_ins(arguments(EDM2[0]))
    assert argv[1:3] == ["edm2-img512-xs-0001-0.100", "edm2-img512-xs-0002-0.100"]
    merge.main([*argv, *SEARCH, "--images", "5", "--reference", "10", "--report_images", "5"])
    assert "RL" in Path("merged", "table.md").read_text()
    bases.load("merged/model")


@pytest.mark.parametrize("line", sorted(set(EXPERIMENTS)))
def test_an_experiment_of_the_readme_has_its_flags(line):
    """What they compute is tested in test_experiments, test_distribution, test_speed and test_memory."""
    script, *argv = shlex.split(line.split(" && ")[-1])[1:]
    helped = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    assert all(word in helped for word in argv if word.startswith("--"))


def test_the_examples_of_a_reward_and_of_a_mechanism_fit_the_code():
    """The reward is one, and the lines beside which the mechanism is to be written stand in train.py, once."""
    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    exec(re.search(r"^```python\n(.*?)^```", readme, re.S | re.M)[1], found)
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["darkness"](images, ["a coat"] * 3, [{}] * 3), 1 - images.flatten(1).mean(1))
    places = [line[1:] for block in re.findall(r"^```diff\n(.*?)^```", readme, re.S | re.M) for line in block.splitlines() if line.startswith(" ")]
    assert len(places) == 2 and all((ROOT / "train.py").read_text(encoding="utf-8").splitlines().count(line) == 1 for line in places)
