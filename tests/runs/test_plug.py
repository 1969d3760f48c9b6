"""A generator that is not in the project: the very text of docs/bases.md, through every command."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file, save_file

TEXT = (ROOT / "docs" / "bases.md").read_text()
SECTION = TEXT.split("## A generator of your own")[1].split("\n## ")[0]

# The same commands at a size for tests: a later flag counts.
SMALL = {
    "make_bars.py": "bars 30",
    "train.py": """
        --iterations 2 --eval_every 1 --save_every 1 --prompts_per_step 3 --group_size 4 --steps 4
        --window 0:2 --nearest 2 --keep 4 --eval_images 24 --eval_steps 3 --snapshot_every 1
    """,
    "eval.py": "",
    "merge.py": "--updates 2 --images 30 --reference 60 --report_images 60 --steps 3",
}

# Every mechanism, at that size.
EVERYTHING = """
    --reward bars_rewards:brightness,fid:0.3 --features pixels --target {folder}/drawn
    --reference 12 --select window --keep 3 --kl 0.1 --gardo --guidance 2 --ema 0.5 --lora 2
    --checkpointing --offload --precision bfloat16
""".split()


def blocks():
    """The files of the section -> {name: text}."""
    found = re.findall(r"`(\w+\.py)`[^`]*?:\n\n```python\n(.*?)```", SECTION, re.DOTALL)
    return dict(found)


def commands():
    """The command lines of the section, a list of words each, without torchrun or python."""
    (text,) = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    return [line.split()[1:] for line in text.strip().splitlines()]


def run(folder, *words, processes=0, code=0):
    """A command in a process of its own, in `folder` -> what it prints."""
    script, *arguments = map(str, words)
    path = folder / script if (folder / script).is_file() else ROOT / script
    start = [sys.executable, str(path)]
    if processes:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        start += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        start += [str(path)]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """A folder with the files of the section, and trained weights."""
    folder = tmp_path_factory.mktemp("bars")
    for name, text in blocks().items():
        (folder / name).write_text(text)
    run(folder, "make_bars.py", "bars", "30")
    return folder


def train_words(folder, out, *flags):
    """train.py on the flow, small."""
    model = ["--model", "bars_flow:BarsFlow:bars", "--reward", "bars_rewards:brightness"]
    return ["train.py", *model, *SMALL["train.py"].split(), "--out", folder / out, *flags]


def test_the_adapter_has_at_most_sixty_lines():
    files = blocks()
    assert list(files) == ["bars_flow.py", "make_bars.py", "bars_rewards.py"]
    assert len(files["bars_flow.py"].splitlines()) <= 60
    for text in files.values():
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_every_command_of_the_page_runs(bars):
    for script, *words in commands():
        words = [word for word in words if not word.startswith("1500")]
        small = SMALL[script]
        if script == "merge.py" and words[0] != "rl":
            small = ""
        expanded = []
        for word in words:
            is_pattern = "*" in word
            expanded += sorted(map(str, bars.glob(word))) if is_pattern else [word]
        if script == "make_bars.py":
            expanded = []
        out = run(bars, script, *expanded, *small.split())
        if "--check" in words:
            assert "11 of 11 checks passed" in out
    for name in (
        "bars.png",
        "bars-grid.png",
        "bars-merged/table.md",
        "bars-ema/network.safetensors",
    ):
        assert (bars / name).is_file()
    facts = json.loads((bars / "runs" / "bars" / "model" / "generator.json").read_text())
    assert facts == {"class": "bars_flow:BarsFlow", "path": "."}
    half = load_file(bars / "bars-half" / "network.safetensors")
    base = load_file(bars / "bars" / "bars.safetensors")
    tuned = load_file(bars / "runs" / "bars" / "model" / "network.safetensors")
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (base[name] + tuned[name]) / 2)


@pytest.mark.slow
def test_all_mechanisms_resume_and_a_tuned_model_is_a_base(bars):
    run(bars, "eval.py", "images", "bars_flow:BarsFlow:bars", "--n", "900", "--out", "drawn")
    flags = [word.format(folder=bars) for word in EVERYTHING]
    run(bars, *train_words(bars, "whole", *flags))
    rows = read_metrics(bars / "whole")
    assert max(row["ratio_error"] for row in rows[1:]) < 1e-5
    assert all(row["kl"] >= 0 and row["grad_norm"] > 0 for row in rows[1:])
    assert (bars / "whole" / "lora" / "pytorch_lora_weights.safetensors").is_file()

    # As after a kill: the last checkpoint and all after it are gone.
    shutil.copytree(bars / "whole", bars / "again")
    shutil.rmtree(bars / "again" / "checkpoint-00002")
    shutil.rmtree(bars / "again" / "model")
    run(bars, *train_words(bars, "again", *flags))
    expected = load_file(bars / "whole" / "model" / "network.safetensors")
    weights = load_file(bars / "again" / "model" / "network.safetensors")
    assert expected.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name])

    # What was tuned is a base again, and its LoRA is read over the base that it names.
    run(bars, *train_words(bars, "second", "--model", "whole/model"))
    run(
        bars,
        "merge.py",
        "average",
        "whole/lora/pytorch_lora_weights.safetensors",
        "--out",
        "merged",
    )
    merged = load_file(bars / "merged" / "network.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_one_to_rounding(bars):
    for count, name in ((0, "one"), (2, "two")):
        run(bars, *train_words(bars, name), processes=count)
    one = load_file(bars / "one" / "model" / "network.safetensors")
    two = load_file(bars / "two" / "model" / "network.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    run(bars, *train_words(bars, "dealt", "--shard", "--prompts_per_step", "2"), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("bars_flow:Nothing:bars", "cannot be imported"),
        ("bars_flow:Network:bars", "no subclass of bases.generator.Generator"),
        ("no_such_module:Flow:bars", "put the module beside train.py or on PYTHONPATH"),
        ("bars_flow:BarsFlow:nowhere", "nowhere: no such file or folder"),
        ("flux:weights.pt", "write a folder, owner/name, sit:FILE, edm2:FILE"),
    ],
)
def test_a_wrong_name_is_one_line(bars, name, words):
    out = run(bars, "train.py", "--model", name, "--reward", "jpeg", code=2)
    assert len(out.strip().splitlines()) == 1
    assert out.startswith(f"error: --model {name}: ") and words in out


@pytest.mark.slow
def test_a_wrong_adapter_fails_its_checks(bars):
    """A wrong direction of time, and dropout."""
    text = (bars / "bars_flow.py").read_text()
    broken = text.replace("x_t, t, velocity.float())", "x_t, 1 - t, velocity.float())")
    broken = broken.replace("nn.GELU(), nn", "nn.Dropout(0.5), nn.GELU(), nn")
    (bars / "broken_flow.py").write_text(broken)
    # Another Sequential has other names of weights.
    weights = load_file(bars / "bars" / "bars.safetensors")
    renamed = {name.replace("mlp.2", "mlp.3"): tensor for name, tensor in weights.items()}
    (bars / "broken").mkdir()
    save_file(renamed, bars / "broken" / "bars.safetensors")
    shutil.copy(bars / "bars" / "prompts.jsonl", bars / "broken" / "prompts.jsonl")
    out = run(bars, "train.py", "--model", "broken_flow:BarsFlow:broken", "--check", code=1)
    lines = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert any("x_t is alpha x0_hat" in line for line in lines)
    assert any("leave out dropout" in line for line in lines)
