"""Names of models, hub ids, and folders that must be refused in one line."""

import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_bases import TEXTS, draw, edit_json, file_of

import bases
from bases import edm2
from bases import files as base_files


def refused(name, *words):
    """bases.check and bases.load both refuse a name, in one line that has the words in it."""
    for call in (bases.check, bases.load):
        with pytest.raises(ValueError) as error:
            call(name)
        line = str(error.value)
        assert "\n" not in line and len(line) < 700
        assert line.startswith(f"--model {name}: ")
        for word in words:
            assert word in line


# --------------------------------------------------------------------------------------------------
# Names.


def test_the_files_of_a_network(names, tiny):
    stem = "diffusion_pytorch_model.safetensors"
    assert base_files.network_files(tiny) == [tiny / "transformer" / stem]
    assert base_files.network_files(names["sd1"]) == [Path(names["sd1"]) / "unet" / stem]
    assert base_files.network_files(names["sit"]) == [file_of(names["sit"])]
    assert base_files.network_files("sit:net.pt") == []


def test_the_default_base_is_found_from_anywhere_and_not_fetched(tiny, tmp_path, monkeypatch):
    def fetch(repo, **options):
        pytest.fail(f"{repo} was asked for")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert bases.check("assets/tiny") == ROOT / "assets" / "tiny"
    assert base_files.network_files("assets/tiny")[0].is_file()
    elsewhere = tmp_path / "elsewhere" / "bases" / "files.py"
    monkeypatch.setattr(base_files, "__file__", str(elsewhere))
    refused("assets/tiny", "no such folder")
    shutil.copytree(tiny, "assets/tiny")
    assert bases.check("assets/tiny") == Path("assets/tiny")  # one's own comes first


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    refused("someone/no-such-model", "hub id")  # offline, as all tests are
    refused("runs/typo", "no such folder")  # a local folder's typo is not sent to the hub
    refused("nowhere", "no such folder")
    refused(f"{tmp_path}/a/b", "no such folder")
    refused(str(tmp_path), "model_index.json")
    refused("sit:", "no such file")
    refused(f"edm2:{tmp_path}/x.pkl", "x.pkl")
    refused("a/" + "x" * 300)


# --------------------------------------------------------------------------------------------------
# Hub ids.


def fake_cache(folder, base, repo):
    """The hub's cache as its client keeps it, links to blobs -> the folder of `base` in it."""
    store = folder / ("models--" + repo.replace("/", "--"))
    revision = "0" * 40
    snapshot = store / "snapshots" / revision
    (store / "refs").mkdir(parents=True)
    (store / "blobs").mkdir()
    (store / "refs" / "main").write_text(revision)
    for i, path in enumerate(sorted(Path(base).rglob("*"))):
        if path.is_file():
            blob = store / "blobs" / str(i)
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(base)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_hub_id_is_a_folder_of_the_cache(names, loaded, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    snapshot = fake_cache(cache, names["sd1"], "someone/some-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    assert bases.check("someone/some-model") == snapshot
    assert base_files.network_files("someone/some-model")[0].is_file()
    model = bases.load("someone/some-model")
    assert torch.equal(draw(model, TEXTS, 2), draw(loaded["sd1"], TEXTS, 2))

    saved = tmp_path / "saved"
    model.save(saved)
    shutil.rmtree(cache)
    assert not any(path.is_symlink() for path in saved.rglob("*"))
    bases.load(saved)


WANTED = """
    model_index.json
    scheduler/scheduler_config.json
    text_encoder/config.json
    text_encoder/model.safetensors
    text_encoder_3/model-00001-of-00002.safetensors
    tokenizer/merges.txt
    tokenizer/vocab.json
    tokenizer_3/spiece.model
    tokenizer_3/tokenizer.json
    transformer/config.json
    transformer/diffusion_pytorch_model-00001-of-00002.safetensors
    transformer/diffusion_pytorch_model.safetensors.index.json
    unet/config.json
    unet/diffusion_pytorch_model.safetensors
    vae/config.json
    vae/diffusion_pytorch_model.safetensors
""".split()

UNWANTED = """
    README.md
    feature_extractor/preprocessor_config.json
    safety_checker/model.safetensors
    sd3_medium.safetensors
    text_encoder/flax_model.msgpack
    text_encoder/model.fp16.safetensors
    text_encoder/pytorch_model.bin
    text_encoder/run.py
    text_encoder_3/model.fp16-00001-of-00002.safetensors
    unet/diffusion_pytorch_model.bin
    unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.non_ema.safetensors
    v1-5-pruned.ckpt
    v1-5-pruned.safetensors
""".split()


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    asked = {}

    def fetch(repo, **options):
        asked[repo] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="model_index.json"):
        bases.check("owner/name")
    assert asked == {"owner/name": {"allow_patterns": base_files.WANTED}}
    kept = filter_repo_objects(WANTED + UNWANTED, allow_patterns=base_files.WANTED)
    assert sorted(kept) == sorted(WANTED)


# --------------------------------------------------------------------------------------------------
# Folders that something is wrong with: one case for each kind of failure.


def drop(path):
    def change(folder):
        if (folder / path).is_dir():
            shutil.rmtree(folder / path)
        else:
            (folder / path).unlink()

    return change


def cut(path):
    def change(folder):
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[:-7])

    return change


def put(path, content):
    def change(folder):
        (folder / path).write_bytes(content.encode("latin-1"))

    return change


def edit(path, **changes):
    def change(folder):
        edit_json(folder / path, **changes)

    return change


def to_pickle(part):
    """A part's weights become a .bin file, as older folders have it."""

    def change(folder):
        (file,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), folder / part / "diffusion_pytorch_model.bin")
        file.unlink()

    return change


def to_variant(part):
    """A part's weights get the name that save_pretrained(variant="fp16") gives them."""

    def change(folder):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))

    return change


def to_fifo(path):
    def change(folder):
        (folder / path).unlink(missing_ok=True)
        os.mkfifo(folder / path)

    return change


def change_tensors(path, change_state):
    """The tensors of a safetensors file become change_state({name: tensor})."""

    def change(folder):
        with safe_open(folder / path, "pt") as file:
            facts = file.metadata()
        save_file(change_state(load_file(folder / path)), folder / path, facts)

    return change


def with_infinity(state):
    name = min(state)
    state[name].view(-1)[0] = torch.inf
    return state


def without_one(state):
    return {name: state[name] for name in sorted(state)[1:]}


def with_one_more(state):
    return state | {"stray.weight": torch.ones(1)}


INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
UNET = "unet/diffusion_pytorch_model.safetensors"
SHARDS = f"{UNET}.index.json"
OUTSIDE = json.dumps({"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}})

BAD = [  # family, what becomes of its folder, what the line must name
    ("sd1", put(INDEX, "[1]"), INDEX),
    ("sd1", edit(INDEX, _class_name="SanaPipeline"), "holds a SanaPipeline"),
    ("sd1", edit(INDEX, _class_name=["a"]), "holds a ['a']; known here: StableDiffusionPipeline"),
    ("sd3", edit(INDEX, text_encoder_2=[None, None]), "no text_encoder_2"),
    ("sd3", edit(INDEX, vae=[None, None]), "4 channels, and pixels have 1 or 3"),
    ("sd1", drop("tokenizer"), "tokenizer/tokenizer.json is missing"),
    ("sd1", drop(TOKENIZER), f"{TOKENIZER} is missing"),
    ("sd1", edit(TOKENIZER, model_max_length=None), "model_max_length None"),
    ("sd3", edit(TOKENIZER, model_max_length=10**30), "model_max_length 1000"),
    ("sd3", put("tokenizer_2/tokenizer.json", "{not"), "tokenizer_2/tokenizer.json is not JSON"),
    ("sd1", drop("vae"), "vae/config.json is missing"),
    ("sd1", drop("text_encoder/model.safetensors"), "text_encoder/model.safetensors is missing"),
    ("sd1", cut(UNET), "diffusion_pytorch_model.safetensors in unet is damaged"),
    ("sd1", to_pickle("unet"), "diffusion_pytorch_model.bin is a pickle"),
    ("sd1", put(SHARDS, '{"weight_map": [1]}'), "weight_map"),
    ("sd1", put(SHARDS, OUTSIDE), "../vae"),
    ("sd1", put("unet/config.json", "{"), "unet/config.json is not JSON"),
    ("sd1", edit("unet/config.json", in_channels=9), "in_channels 9, out_channels 4"),
    (
        "sd1",
        edit("vae/config.json", latent_channels=16),
        "4 channels, and the latents of vae/ have 16",
    ),
    ("sd1", edit(SCHEDULER, prediction_type="sample"), "prediction_type 'sample'"),
    ("sd3", edit(SCHEDULER, shift=0), "shift 0"),
    ("sd3", edit(SCHEDULER, use_dynamic_shifting=True), "use_dynamic_shifting True"),
    ("sd3", put(SCHEDULER, '{"beta_start": 1}'), "no shift"),
    ("sd1", edit(SCHEDULER, _class_name="LCMScheduler"), "LCMScheduler in scheduler/"),
    ("sdxl", edit(SCHEDULER, _class_name="EDMEulerScheduler"), "EDMEulerScheduler in scheduler/"),
    ("sd3", edit(SCHEDULER, _class_name="DDIMScheduler"), "DDIMScheduler in scheduler/"),
    ("sd1", edit("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim 256"),
    ("sd3", edit("transformer/config.json", num_layers=0), "num_layers 0"),
    ("sd1", edit("unet/config.json", sample_size=-1), "sample_size -1"),
    ("sd1", to_variant("text_encoder"), "only the variant fp16 is there"),
    ("sd3", to_variant("transformer"), "only the variant fp16 is there"),
    ("sd1", edit("text_encoder/config.json", max_position_embeddings=7), "embeddings 7; they"),
    ("sd3", edit("text_encoder_2/config.json", vocab_size=9), "text_encoder_2/config.json vocab_"),
    ("sd3", edit("text_encoder_3/config.json", vocab_size=9), "tokenizer_3/tokenizer.json has the"),
    ("sd1", to_fifo("tokenizer/merges.txt"), "merges.txt: is no regular file but a FIFO"),
    ("sd1", to_fifo("unet/config.json"), "unet/config.json: is no regular file but a FIFO"),
    ("sit", to_fifo("classes.txt"), "classes.txt: is no regular file but a FIFO"),
    ("edm2", drop("vae"), "stabilityai/sd-vae-ft-mse"),
    ("sit", cut("net.safetensors"), "net.safetensors: truncated"),
    ("sit", put("classes.txt", "a\nb"), "2 lines for 5 classes"),
    ("sit", put("classes.txt", "\xff\n" * 5), "not UTF-8"),
]


@pytest.mark.parametrize("family, spoil, line", BAD, ids=[f"{bad[0]}-{bad[2]}" for bad in BAD])
def test_a_bad_file_is_named_in_one_line(names, tmp_path, family, spoil, line):
    folder = tmp_path / "model"
    if family in ("sit", "edm2"):
        shutil.copytree(file_of(names[family]).parent, folder)
        name = f"{family}:{folder / 'net.safetensors'}"
    else:
        shutil.copytree(names[family], folder)
        name = str(folder)
    spoil(folder)
    refused(name, line)


WEIGHTS = [  # what only loading shows
    ("sd1", UNET, with_infinity, "unet: conv_in.bias holds NaN or infinity"),
    ("sd1", "text_encoder/model.safetensors", with_infinity, "text_encoder: "),
    ("sit", "net.safetensors", with_infinity, "holds NaN or infinity"),
    ("edm2", "net.safetensors", with_infinity, "not finite numbers"),
    ("sd1", "text_encoder/model.safetensors", without_one, "no weights of its shape for "),
    ("sd3", "vae/diffusion_pytorch_model.safetensors", without_one, "no weights of its shape"),
    ("sd1", UNET, with_one_more, "it has no place for stray.weight"),
]


@pytest.mark.parametrize("family, path, change, line", WEIGHTS)
def test_weights_that_are_not_the_networks_are_refused(
    names, tmp_path, family, path, change, line, capfd
):
    folder = tmp_path / "model"
    source = file_of(names[family]).parent if family in ("sit", "edm2") else names[family]
    shutil.copytree(source, folder)
    change_tensors(path, change)(folder)
    name = f"{family}:{folder / path}" if family in ("sit", "edm2") else str(folder)
    capfd.readouterr()
    with pytest.raises(ValueError, match=line) as error:
        bases.load(name)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # nor does a library say it before us


def test_a_network_of_another_family_is_refused(names):
    unet = base_files.network_files(names["sd1"])[0]
    refused(f"sit:{file_of(names['edm2'])}", "not a SiT")
    refused(f"edm2:{file_of(names['sit'])}", "not an EDM2")
    refused(f"sit:{unet}", "not a SiT")
    refused(f"edm2:{unet}", "not an EDM2")


def test_a_guide_of_other_data_is_refused(names, tmp_path):
    guide = tmp_path / "guide.safetensors"
    for key, sizes in (
        ("img_resolution", (16, 4, 5, 8, [1], 1, [], 8)),
        ("img_channels", (8, 3, 5, 8, [1], 1, [], 8)),
        ("label_dim", (8, 4, 6, 8, [1], 1, [], 8)),
    ):
        edm2.save(edm2.EDM2(*sizes), guide)
        refused(f"{names['edm2']},{guide}", f"guide.safetensors: has {key}")


def test_a_guide_that_is_no_network_is_refused(names, tmp_path):
    refused(f"{names['edm2']},{tmp_path / 'none.pkl'}", "none.pkl: no such")
    refused(f"{names['edm2']},", "no such")
    refused(f"{names['edm2']},{file_of(names['sit'])}", "not an EDM2")
    refused(f"{names['sit']},{file_of(names['edm2'])}", "no such file")  # SiT has no guide


def test_a_comma_in_a_name_is_no_second_network(names, tmp_path):
    shutil.copytree(file_of(names["edm2"]).parent, tmp_path / "a, b")
    name = f"edm2:{tmp_path / 'a, b' / 'net.safetensors'}"
    assert bases.check(name) == tmp_path / "a, b"


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(names, tmp_path):
    bomb = {"ema": Bomb(tmp_path / "ran")}
    torch.save(bomb, tmp_path / "sit.pt")
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(bomb))
    refused(f"sit:{tmp_path / 'sit.pt'}", "could run code")
    refused(f"edm2:{tmp_path / 'edm2.pkl'}", "mkdir")
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# Classes.


def test_a_class_has_a_number_or_a_name(loaded):
    model = loaded["sit"]
    (same,) = model.encode(["0", "TENCH", "tinca tinca", "tench, Tinca tinca"])
    assert same.shape == (4, 24)
    assert (same == same[0]).all()
    (by_name,) = model.encode(["crane, machine"])
    (by_number,) = model.encode(["4"])
    assert torch.equal(by_name, by_number)


@pytest.mark.parametrize("text", ["5", "crow", "crane", "٣"])
def test_a_text_that_is_no_class_is_refused(loaded, text):
    """crane is the name of two classes, and ٣ a digit of another script."""
    with pytest.raises(ValueError, match="a class is a number from 0 to 4") as error:
        loaded["sit"].encode(["1", text])
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)
