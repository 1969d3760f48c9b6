"""Bad input: one line that names the value, exit code 2, before any weight is loaded, and nothing written."""
import json
import shutil

import pytest
import torch

from commands import checks
from support import flags
import merge
from bases import generator
import train
from conftest import contents, launch, launch_process, small

NAMED = """
    stray; --lr; --updates 5; --keep 5; --keep 1; --group_size 1; --nearest 4; --window 0:5; --window 0:4; --window 2:1; --window
    1:1; --window 3; --window a:b; --window 0:2:3; --steps 2; --steps 0; --eta 0; --eta 1.5; --lr -1; --lr nan; --lr inf; --lr 0;
    --clip 0; --grad_clip -1; --psi 2; --gamma 1.1; --ema 1; --kl -0.1; --prompt_noise nan; --diversity -1; --guidance inf;
    --warmup -1; --seed -1; --eval_seed -3; --iterations 0; --batch 0; --passes 0; --prompts_per_step 0; --eval_every 0;
    --save_every -1; --keep_checkpoints 0; --eval_images 25; --eval_images 10; --eval_steps 0; --reward class:nan; --reward
    class:0; --reward class:1,,ink:1; --reward fid,kid; --replace -1; --refresh -2; --reference 1
"""
NAMED = [" ".join(flags.split()) for flags in NAMED.split(";")]          # the line repeats them word for word
FLAGS = [*zip(NAMED, NAMED)] + [  # flags, what the line must name
    ("--iteration_s 3", "--iteration_s"), ("--learning_rate 1", "--learning_rate"), ("--group 8", "--group"), ("--it 8", "--it"),
    ("--kernel euler", "euler"), ("--select best", "best"), ("--drift maybe", "maybe"), ("--std batches", "batches"),
    ("--select all", "--keep 3: means nothing with --select all"), ("--lr fast", "fast"), ("--iterations 2.5", "2.5"), ("--seed x", "'x'"), ("--group_size 1 --keep 1 --select all", "--group_size 1"),
    ("--window=-1:2", "--window -1:2"), ("--tau1 0.8 --tau2 0.8", "--tau1 0.8"), ("--tau1 0.9 --tau2 0.5", "--tau1 0.9"),
    ("--reward beauty", "beauty"), ("--reward class:much", "much"), ("--reward class:1,class:2", "class"), ("--reward=", "--reward"),
    ("--reward fid --features nothing", "nothing"), ("--reward fid --features inception:{tmp}/none.pt", "{tmp}/none.pt"),
    ("--reward fid --features dinov2:{tmp}/none", "{tmp}/none"), ("--reward fid --features no_such_module:f", "no_such_module"),
    ("--reward fid --target {tmp}/none.npz", "{tmp}/none.npz"), ("--reward fid --target {tmp}/none", "{tmp}/none"),
    ("--drift off --select all --diversity 0.3", "--diversity 0.3: --drift off"), ("--drift off --select spread", "--select spread: --drift off"),
    ("--target {tmp}", "--target {tmp}: means nothing where --reward, class:1,"), ("--refresh 3", "--refresh 3: means nothing"),
    ("--reference 24", "--reference 24: means nothing where --reward"), ("--features evaluator", "--features evaluator: means nothing"), ("--price exact", "--price exact: means nothing"),
    ("--reward fid --replace 2", "--replace 2: means nothing with --price potential"), ("--lora 4 --train all", "--train all: a LoRA"),
    ("--reward fid --price quadratic --reference 191", "--price quadratic: --reference 191 is less than three times the 64 features"),
    ("--prompt_noise 0 --tau1 0.5", "--tau1 0.5: means nothing where --prompt_noise is 0"), ("--prompt_noise 0 --tau2 1", "--tau2 1.0: means nothing"),
    ("--drift off --select all --keep 4 --psi 0.5", "--psi 0.5: means nothing where --prompt_noise is 0, as --drift off sets it"),
    ("--diversity 0 --gamma 0.9", "--gamma 0.9: means nothing where --diversity is 0"), ("--diversity 0 --terminal zero", "--terminal zero: means nothing"),
    ("--drift off --select all --keep 4 --no-success", "--no-success: means nothing where --diversity is 0, as --drift off sets it"),
    (f"--seed {2**63} --lora 2", f"--seed {2**63}: must be"), (f"--eval_seed {2**63}", f"--eval_seed {2**63}: must be"),
    ("--reward kid", "kid needs"), ("--reward fid --reference 7", "--reference 7"), ("--reward fid --replace 3", "--replace 3"), ("--reward fid --features json:loads", "--target"), ("--reward fid --target {tmp}", "{tmp}"),
    ("--model {tmp}/nowhere", "{tmp}/nowhere"), ("--model {tmp}", "model_index.json"),
    ("--prompts {tmp}/none.jsonl", "{tmp}/none.jsonl"), ("--prompts {tmp}", "{tmp}"),
    ("--eval_prompts {tmp}/none.txt", "{tmp}/none.txt")]

PROMPT_FILES = [  # name, bytes, what the line must name after the file
    ("empty.jsonl", b"", ""), ("blank.jsonl", b'{"prompt": "a coat", "label": 4}\n\n{"prompt": "a bag", "label": 8}\n', ":2"),
    ("cut.jsonl", b'{"prompt": "a coat", "label": 4}\n{"prompt": "a ba', ":2"), ("list.jsonl", b'["a coat"]\n', ":1"),
    ("keyless.jsonl", b'{"text": "a coat", "label": 4}\n', ":1"), ("number.jsonl", b'{"prompt": 4, "label": 4}\n', ":1"),
    ("unlabelled.jsonl", b'{"prompt": "a coat", "label": 4}\n{"prompt": "a coat"}\n', ":2"), ("plain.txt", b"a coat\n", ":1"),
    ("outside.jsonl", b'{"prompt": "a coat", "label": 10}\n', ":1"), ("negative.jsonl", b'{"prompt": "a coat", "label": -1}\n', ":1"),
    ("word.jsonl", b'{"prompt": "a coat", "label": "4"}\n', ":1"), ("half.jsonl", b'{"prompt": "a coat", "label": 4.0}\n', ":1"),
    ("truth.jsonl", b'{"prompt": "a coat", "label": true}\n', ":1"), ("prompts.csv", b"a coat,4\n", ""), ("prompts", b"a coat\n", ""),
    ("latin.jsonl", b'{"prompt": "caf\xe9", "label": 4}\n', "")]


def rewrite(**changes):
    """-> a function that changes a JSON file, or deletes the keys whose new value is None."""
    def change(path):
        row = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in row.items() if v is not None}))
    return change


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def garble(path):
    path.write_text("{not json")


MODEL_FILES = [  # file of the model folder, what becomes of it, what the line must name
    ("model_index.json", lambda path: path.unlink(), "model_index.json"), ("model_index.json", garble, "model_index.json"),
    ("model_index.json", lambda path: path.write_text("[]"), "model_index.json"),
    ("model_index.json", rewrite(_class_name=None), "_class_name"),
    ("model_index.json", rewrite(_class_name="FluxPipeline"), "FluxPipeline"),
    ("model_index.json", rewrite(vae=["diffusers", "AutoencoderKL"]), "vae"),
    ("transformer/diffusion_pytorch_model.safetensors", lambda path: path.unlink(), "transformer/diffusion_pytorch_model.safetensors"),
    ("transformer/diffusion_pytorch_model.safetensors", truncate, "diffusion_pytorch_model.safetensors"),
    ("transformer/diffusion_pytorch_model.safetensors", lambda path: path.write_bytes(b""), "diffusion_pytorch_model.safetensors"),
    ("transformer/config.json", garble, "transformer"), ("text_encoder/model.safetensors", truncate, "text_encoder"),
    ("text_encoder/config.json", lambda path: path.unlink(), "text_encoder/config.json"), ("tokenizer", shutil.rmtree, "tokenizer"),
    ("scheduler/scheduler_config.json", lambda path: path.unlink(), "scheduler/scheduler_config.json"),
    ("scheduler/scheduler_config.json", garble, "scheduler"), ("scheduler/scheduler_config.json", rewrite(shift=None), "scheduler"),
    ("reward", shutil.rmtree, "reward"), ("reward/model.safetensors", truncate, "reward"), ("reward/config.json", garble, "reward"),
    ("reward/config.json", rewrite(width=None), "reward"),
    ("evaluator/model.safetensors", lambda path: path.unlink(), "evaluator/model.safetensors"),
    ("evaluator/real.npz", lambda path: path.unlink(), "evaluator/real.npz"), ("evaluator/real.npz", garble, "evaluator"),
    ("prompts.jsonl", lambda path: path.unlink(), "prompts.jsonl"), ("eval_prompts.jsonl", truncate, "eval_prompts.jsonl")]


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Runs train.py on a command line that must be refused, naming `naming`; looks at exit code, stderr and files -> the line."""
    for owner, name in ((models, "load"), (train, "Reward"), (train, "load_features"), (train.evaluation, "Judge")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("weights were loaded"))

    def run(argv, *naming):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            launch(argv)
        out, error = capfd.readouterr()
        lines = error.splitlines()
        assert stop.value.code == 2 and out == ""
        assert len(lines) == 1 or lines[0].startswith("usage:"), error
        assert "error: " in lines[-1] and len(lines[-1]) < 1000
        for name in naming:
            assert str(name) in lines[-1]
        assert contents(tmp_path) == before and not (tmp_path / "run").is_dir()
        return lines[-1]
    return run


@pytest.mark.parametrize("flags, naming", FLAGS, ids=[row[0] for row in FLAGS])
def test_bad_flags(tiny, tmp_path, refused, flags, naming):
    refused(small(tiny, tmp_path / "run", *flags.format(tmp=tmp_path).split()), naming.format(tmp=tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny, tmp_path, refused):
    refused(small(tiny, tmp_path / "run", "--device", "cuda"), "--device cuda")


@pytest.mark.parametrize("flag", ["--prompts", "--eval_prompts"])
@pytest.mark.parametrize("name, content, naming", PROMPT_FILES, ids=[row[0] for row in PROMPT_FILES])
def test_bad_prompt_files(tiny, tmp_path, refused, flag, name, content, naming):
    (tmp_path / name).write_bytes(content)
    refused(small(tiny, tmp_path / "run", flag, tmp_path / name), f"{tmp_path / name}{naming}")


@pytest.mark.parametrize("name, damage, naming", MODEL_FILES, ids=[f"{n}-{row[0]}" for n, row in enumerate(MODEL_FILES)])
def test_bad_model_folders(tiny, tmp_path, refused, name, damage, naming):
    shutil.copytree(tiny, tmp_path / "model")
    damage(tmp_path / "model" / name)
    refused(small(tmp_path / "model", tmp_path / "run"), naming)


def test_real_moments_without_the_kernel_width(tiny, tmp_path, refused):
    import numpy as np
    shutil.copytree(tiny, tmp_path / "model")
    with np.load(tmp_path / "model" / "evaluator" / "real.npz") as real:
        rest = {name: real[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "model" / "evaluator" / "real.npz", **rest)
    refused(small(tmp_path / "model", tmp_path / "run"), "real.npz", "scale")


@pytest.mark.parametrize("change, naming", [("--lr 0.5", "--lr"), ("--seed 3", "--seed"), ("--drift off --select all", "--drift"),
                                            ("--window 1:3", "--window")])
def test_a_run_folder_of_another_configuration(tiny, tmp_path, refused, change, naming):
    import dataclasses
    out = tmp_path / "old"
    out.mkdir()
    args = train.check(train.runtime.parse_args(train.Args, "", small(tiny, tmp_path / "run")), train.Args())[0]
    (out / "config.json").write_text(json.dumps(vars(dataclasses.replace(args, out=str(out)))))
    refused(small(tiny, out, *change.split()), out, naming)
    train.check(train.runtime.parse_args(train.Args, "", small(tiny, out)), train.Args())


def test_a_run_folder_whose_config_is_unreadable(tiny, tmp_path, refused):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{")
    refused(small(tiny, tmp_path / "old"), tmp_path / "old", "config.json")


def test_a_folder_that_is_no_run(tiny, tmp_path, refused):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    refused(small(tiny, tmp_path / "photos"), tmp_path / "photos")


def test_a_file_as_run_folder(tiny, tmp_path, refused):
    (tmp_path / "file").write_text("text")
    refused(small(tiny, tmp_path / "file"), tmp_path / "file")


def test_a_run_folder_below_a_file(tiny, tmp_path, refused):
    (tmp_path / "file").write_text("text")
    refused(small(tiny, tmp_path / "file" / "run"), tmp_path / "file")


def test_a_run_folder_with_too_long_a_name(tiny, tmp_path, refused):
    refused(small(tiny, tmp_path / ("x" * 300)), "--out")


@pytest.mark.parametrize("out", ["model/run", "model/reward/run", "model/../model/run", "link/run"])
def test_a_run_folder_within_the_base(tiny, tmp_path, refused, out):
    """The finished model holds a copy of the base, and so would hold itself."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    refused(small(tmp_path / "model", tmp_path / out), f"--out {tmp_path / out}: lies in {tmp_path / 'model'}, which is copied")


def test_a_merge_within_its_base(tiny, tmp_path, capfd):
    shutil.copytree(tiny, tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        merge.main(["average", str(tmp_path / "model"), "--out", str(tmp_path / "model" / "merged")])
    assert stop.value.code == 2 and contents(tmp_path) == before
    assert "merged: lies in" in capfd.readouterr().err


def test_beside_the_file_of_a_network_a_run_may_lie_but_not_within_what_is_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checks.check_out("runs/default", "sit:net.safetensors")              # as the presets of the README do
    with pytest.raises(ValueError, match="--out vae/run: lies in vae, which is copied"):
        checks.check_out("vae/run", "sit:net.safetensors")


@pytest.mark.parametrize("limits, flags", [(checks.LIMITS, ("seed", "eval_seed")), (checks.MERGE_LIMITS, ("seed", "report_seed")), (checks.EVAL_LIMITS, ("seed",))])
def test_a_seed_is_one_that_torch_takes(limits, flags):
    for flag in flags:
        assert torch.Generator().manual_seed(limits[flag][1])
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(2 * limits[flag][1] + 2)


def test_a_number_that_no_float_holds(tiny, tmp_path, refused):
    refused(small(tiny, tmp_path / "run", "--seed", 10**400), "--seed 1000", "must be a finite number")


def test_many_flags_still_give_a_run_folder(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    long = tmp_path / ("long" * 40)
    long.mkdir()
    shutil.copy(tiny / "prompts.jsonl", long)
    shutil.copy(tiny / "eval_prompts.jsonl", long)
    argv = [*small(tiny, ""), "--prompts", str(long / "prompts.jsonl"), "--eval_prompts", str(long / "eval_prompts.jsonl")]
    launch([*argv, "--dry_run"]), launch([*argv, "--dry_run", "--eval_seed", "1"])
    outs = {json.loads(line)["out"] for line in capfd.readouterr().out.splitlines() if line.startswith("{")}
    assert len(outs) == 2
    for out in outs:
        (tmp_path / out).mkdir(parents=True)


def test_more_processes_than_rollouts(tiny, tmp_path, refused, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "9"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    refused(small(tiny, tmp_path / "run"), "9")


@pytest.mark.parametrize("flags", ["--prompts_per_step 3", "--updates 3 --prompts_per_step 4"])
def test_compiled_sizes_that_would_change_with_every_iteration(tiny, tmp_path, refused, monkeypatch, capfd, flags):
    argv = [*small(tiny, tmp_path / "run", "--compile"), *flags.split()]
    launch([*argv, "--dry_run"])                                         # one process has the same ones always
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    launch([*small(tiny, tmp_path / "run", "--compile"), "--dry_run"])
    capfd.readouterr()
    refused(argv, "--compile: code is made for each size of a batch, and 2 processes")


def test_only_the_first_process_speaks(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        launch(small(tiny, tmp_path / "run", "--keep", 1))
    assert stop.value.code == 2 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("flags, lines", [(["--keep", "1"], 1), (["--keeep", "3"], None)])
def test_as_a_command(tiny, tmp_path, flags, lines):
    code, out, error = launch_process(small(tiny, tmp_path / "run", *flags))
    assert code == 2 and out == "" and "Traceback" not in error
    assert lines is None or len(error.splitlines()) == lines
    assert flags[0] in error.splitlines()[-1] and not (tmp_path / "run").exists()


def test_the_good_command_line_is_accepted(tiny, tmp_path):
    assert launch(small(tiny, tmp_path / "run", "--dry_run")) is None    # no SystemExit
    assert not (tmp_path / "run").exists()


def test_real_moments_of_the_other_judge(tiny, tmp_path, refused):
    """With the evaluator's features paid, the reward classifier judges, and its moments are needed too."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "reward" / "real.npz").unlink()
    refused(small(tmp_path / "model", tmp_path / "run", "--reward", "fid", "--features", "evaluator"), "reward/real.npz")
