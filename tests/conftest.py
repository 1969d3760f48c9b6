"""What the tests share: a base model of a few thousand random weights, and ways to run train.py.

The model is in the layout of assets/tiny. Its numbers are random, but no weight is zero, so that
all of it can learn.
"""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

SMALL = (
    "--device cpu --iterations 2 --prompts_per_step 2 --group_size 4 --select window --keep 3 "
    "--steps 4 --window 0:2 --updates 2 --nearest 2 --lr 0.001 --warmup 0 --eval_images 20 "
    "--eval_steps 2 --eval_every 1 --save_every 1 --snapshot_every 0 --fid 0 "
    "--diversity_features reward"
).split()


# --------------------------------------------------------------------------------------------------
# Runs.


def small(model, out, *more):
    """The command line of a run of a second; later flags win."""
    return [*SMALL, "--model", str(model), "--out", str(out), *map(str, more)]


def launch(argv):
    """Runs train.py in this process."""
    import train

    return train.main(list(argv))


def command(argv, processes=0, script="train.py"):
    """train.py, or another script, as a command: under torchrun if `processes` is not 0."""
    words = [sys.executable]
    if processes:
        words += ["-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc_per_node", str(processes)]
    return [*words, str(ROOT / script), *argv]


def launch_process(argv, processes=0, cwd=None, script="train.py", **env):
    """Runs the command in processes of its own -> exit code, stdout, stderr."""
    done = subprocess.run(
        command(argv, processes, script),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    return done.returncode, done.stdout, done.stderr


@contextmanager
def files_up_to(size):
    """Within the block no file grows beyond `size` bytes: to a program that is a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --------------------------------------------------------------------------------------------------
# What a run wrote.


def read_metrics(out, clock=False):
    """metrics.jsonl as a list of objects; without the times and the memory, unless clock."""
    rows = []
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if not clock:
            timed = [name for name in row if name.startswith(("seconds", "peak_memory"))]
            for name in timed:
                del row[name]
        rows.append(row)
    return rows


def read_weights(out):
    """The newest checkpoint's tensors."""
    from safetensors.torch import load_file

    newest = sorted(Path(out).glob("checkpoint-*"))[-1]
    return load_file(newest / "weights.safetensors")


def files(folder):
    """Every file under a folder -> {relative path: (its bytes, its time of writing)}."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


def contents(folder):
    """Every file under a folder -> {relative path: its bytes}."""
    return {name: content for name, (content, _) in files(folder).items()}


# --------------------------------------------------------------------------------------------------
# The random base model.


def build_generator(folder, seed):
    """Writes transformer/, text_encoder/, tokenizer/, scheduler/ and model_index.json."""
    from build_tiny import TOKENS, all_captions, build_tokenizer, save_generator
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = build_tokenizer(folder, all_captions())
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=28,
        patch_size=14,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=2,
        qk_norm="rms_norm",
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for parameter in [*transformer.parameters(), *encoder.parameters()]:
            parameter.add_(0.15 * torch.randn_like(parameter))
    networks = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})
    save_generator(folder, networks)


def build_classifier(folder, width, seed, images):
    """Writes a random classifier whose opinions differ from picture to picture.

    Beside it the moments of `images` in its features: of all, and of each half.
    """
    from safetensors.torch import save_file

    from dist_reward import moments
    from rewards.classifier import Classifier
    from rewards.metrics import mean_distance

    torch.manual_seed(seed)
    model = Classifier(width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.5 if name.endswith("weight") else 0)
        features = model.features(images)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": width}))
    halves = {"real": features, "real-1": features[::2], "real-2": features[1::2]}
    for name, part in halves.items():
        mu, sigma = moments(part)
        np.savez(folder / f"{name}.npz", mu=mu, sigma=sigma, scale=mean_distance(features) / 2)


def build_model(folder, seed=0):
    """Writes the whole model folder, with prompts and two classifiers."""
    from build_tiny import write_prompts

    folder.mkdir(parents=True)
    write_prompts(folder)
    build_generator(folder, seed)
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    build_classifier(folder / "reward", 2, seed + 1, images)
    build_classifier(folder / "evaluator", 4, seed + 2, images)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the random base model. Copy it before changing anything in it."""
    return build_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def names(tmp_path_factory, tiny):
    """{family: what --model would be} of a random base of every family, see small_bases.py."""
    from small_bases import build_bases  # here, because it imports diffusers

    return build_bases(tmp_path_factory.mktemp("bases"), tiny)


@pytest.fixture(scope="session")
def loaded(names):
    """{family: model} of the bases in `names`. Load one anew before changing anything in it."""
    import bases

    return {family: bases.load(name) for family, name in names.items()}
