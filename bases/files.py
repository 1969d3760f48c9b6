"""Model files: what a model is called, which files it is made of, and whether they can be what they say.

    FOLDER         of diffusers: model_index.json names the pipeline; or one written by model.save, with sit.safetensors or edm2.safetensors
    owner/name     the same on the Hugging Face hub, fetched once; only safetensors, JSON and tokenizers, never a pickle
    sit:FILE       a published checkpoint of SiT (.pt, .safetensors), beside it vae/, an AutoencoderKL, and perhaps classes.txt, one class a line
    edm2:FILE      a published snapshot of EDM2 (.pkl, .safetensors), with the same beside it; edm2:FILE,GUIDE: guided by the network in GUIDE
No network is built here, and every ValueError is the user's one line: the value and the remedy.
"""
import json
import re
import shutil
from pathlib import Path
from support.files import read_json
from safetensors import SafetensorError
from safetensors import safe_open

NETWORK = {"StableDiffusionPipeline": "unet", "StableDiffusion3Pipeline": "transformer"}      # the folder of the trained network
OWN = ("sit", "edm2")                                                    # the two whose network no library holds
DEFAULT = "assets/tiny"                                                  # the embedded base: of the working directory, or else of this project
BESIDE = ("vae", "classes.txt", "reward", "evaluator", "prompts.jsonl", "eval_prompts.jsonl")  # what lies beside the file of such a network
STOCK = {  # what the scheduler must say, where it says anything, for the samples to be those of the stock pipeline
    "unet": {"prediction_type": ("epsilon", "v_prediction"), "beta_schedule": ("linear", "scaled_linear"), "timestep_spacing": ("leading",),
             "thresholding": (False,)},
    "transformer": {"use_dynamic_shifting": (False, None), "stochastic_sampling": (False,), "invert_sigmas": (False,)}}
WANTED = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer*/*.json", "tokenizer*/*.txt", "tokenizer*/spiece.model"] + [
    f"{part}/{file}" for part, stem in (("unet", "diffusion_pytorch_model"), ("transformer", "diffusion_pytorch_model"),
                                        ("vae", "diffusion_pytorch_model"), ("text_encoder*", "model"))
    for file in ("config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*.safetensors")]      # never a pickle


def network_files(name):
    """The safetensors files of the network that is trained, one or several shards: what a merge reads. `name` as for `check`, or its folder."""
    kind, folder, file, _ = locate(name)
    if kind not in OWN:
        return _weight_files(folder / NETWORK[kind])
    if file.suffix != ".safetensors":
        raise ValueError(f"--model {name}: {file.name} is not a safetensors file; write one with bases.load({str(name)!r}).save(FOLDER)")
    return [file]


def locate(name):
    """-> the kind of a model, its folder, the file of its network if that is one of `OWN`, and of the network that guides it, if there is one.

    Raises ValueError, without --model before it."""
    kind, _, rest = str(name).partition(":")
    if kind in OWN:
        file, comma, guide = rest.partition(",") if kind == "edm2" and not Path(rest).is_file() else (rest, "", "")
        return kind, Path(file).parent, Path(file), Path(guide) if comma else None
    folder = Path(name)
    if str(name) == DEFAULT and not folder.exists():
        folder = Path(__file__).resolve().parent.parent / DEFAULT
    elif not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.is_dir():
        folder = _fetch(str(name))
    if not folder.is_dir():
        raise ValueError("no such folder; build the default with experiments/build_tiny.py or give a diffusers folder or a hub id, owner/name")
    for kind in OWN:
        if (folder / f"{kind}.safetensors").is_file():
            guide = folder / "guide.safetensors"
            return kind, folder, folder / f"{kind}.safetensors", guide if kind == "edm2" and guide.is_file() else None
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("no readable model_index.json with a _class_name, so this is not a diffusers folder") from None
    if not isinstance(kind, str) or kind not in NETWORK:
        raise ValueError(f"holds a {kind}; known here: {', '.join(NETWORK)}, and {', '.join(f'{own}:FILE' for own in OWN)}")
    return kind, folder, None, None


def _fetch(repo):
    """The local folder of a hub id, downloaded if it is not there yet; only what `load` reads, and no pickles."""
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=WANTED))
    except Exception as error:                                           # offline, unknown, gated, disk full: each raises another
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"no such folder, and not to be had as a hub id ({reason})") from None


def copy_folder(source, target, *left_out, top=""):
    """Copies what a folder holds, without the patterns `left_out`, at its top also `top`, and without links to nothing.

    Not by shutil's ignore_dangling_symlinks: it looks for the end of a relative link in the working directory, and would drop a hub's every file."""
    def skip(at, names):
        lost = [name for name in names if not (Path(at) / name).exists()]
        return [*lost, *shutil.ignore_patterns(*left_out, top * (Path(at) == Path(source)))(at, names)]
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=skip)


def _weight_files(part):
    """The safetensors files in a part's folder: one, or the shards that its index names. Raises ValueError."""
    stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
    whole, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    shards = {"": whole.name}
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{part.name}/{index.name} has no weight_map; the folder is incomplete")
    shards = sorted(set(map(str, shards.values())))
    for shard in shards:
        if Path(shard).name != shard or not (part / shard).is_file():
            pickles = sorted(path.name for path in part.glob("*") if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
            raise ValueError(f"{part.name}/{shard} is missing; " + (f"{pickles[0]} is a pickle, which is never read: save the model with "
                                                                  "safe_serialization" if pickles else "the folder is incomplete"))
    return [part / shard for shard in shards]


def _check_part(part):
    """A part with weights: its config, and the header of each file against the file's size. Returns the config."""
    config = read_json(part / "config.json")
    for path in _weight_files(part):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} in {part.name} is damaged ({error})") from None
    return config


def named_parts(folder):
    """The parts that model_index.json names, without those that it gives as null."""
    return [part for part, value in read_json(folder / "model_index.json").items() if isinstance(value, list) and value and value[0]]


def _check_pipeline(folder, kind):
    named, name = named_parts(folder), NETWORK[kind]
    numbers = ["", *(n for n in ("_2", "_3") if "text_encoder" + n in named and name == "transformer")]
    if numbers == ["", "_3"]:
        raise ValueError("model_index.json names a text_encoder_3 but no text_encoder_2; it needs the first two beside it")
    for n in numbers:
        words = folder / f"tokenizer{n}"
        if (words / "tokenizer.json").is_file():
            read_json(words / "tokenizer.json")
        elif not ((words / "vocab.json").is_file() and (words / "merges.txt").is_file()):
            raise ValueError(f"tokenizer{n}/tokenizer.json is missing, or vocab.json and merges.txt; the folder is incomplete")
        length = read_json(words / "tokenizer_config.json").get("model_max_length")
        if not n and not (isinstance(length, int) and 0 < length < 2**31):                   # transformers would take 10^30 for one that is missing
            raise ValueError(f"model_max_length {length} in tokenizer/tokenizer_config.json: must be how many tokens the text encoder takes")
        _check_part(folder / f"text_encoder{n}")
    config, scheduler = _check_part(folder / name), read_json(folder / "scheduler" / "scheduler_config.json")
    if name == "transformer" and "shift" not in scheduler:
        raise ValueError("scheduler/scheduler_config.json has no shift, so this is not the scheduler of a flow")
    for key, known in STOCK[name].items():
        if scheduler.get(key, known[0]) not in known:
            raise ValueError(f"{key} {scheduler[key]!r} in scheduler/scheduler_config.json; known here: {', '.join(map(repr, known))}")
    for key in ("shift", "beta_start", "beta_end", "num_train_timesteps"):
        if not (isinstance(scheduler.get(key, 1), (int, float)) and scheduler.get(key, 1) > 0):
            raise ValueError(f"{key} {scheduler[key]!r} in scheduler/scheduler_config.json: must be a positive number")
    channels = config.get("in_channels")
    if not isinstance(config.get("sample_size"), int) or channels != (config.get("out_channels") or channels):
        raise ValueError(f"{name}/config.json: in_channels {channels}, out_channels {config.get('out_channels')} and sample_size "
                         f"{config.get('sample_size')} are not those of a text-to-image network")
    _check_channels(channels, _check_part(folder / "vae") if "vae" in named or name == "unet" else None)


def _check_channels(channels, vae):
    """The VAE's config, or None for pixels, against the channels of the network's latents."""
    if channels not in ((1, 3) if vae is None else (vae.get("latent_channels"),)):
        raise ValueError(f"the network has {channels} channels, and " + ("pixels have 1 or 3" if vae is None else
                         f"the latents of vae/ have {vae.get('latent_channels')}; it belongs to another network"))


def stated_heads(file):
    """num_heads of a SiT file that `save` wrote; None for a published one, whose width tells it, and for what is no such file."""
    try:
        with safe_open(file, "pt") as opened:
            return int((opened.metadata() or {}).get("num_heads", 0)) or None
    except (SafetensorError, OSError, ValueError):
        return None


def class_names(folder, classes):
    """classes.txt, line i the names of class i with commas between -> {name in lower case: i}; a name of several classes is left out."""
    path, found = folder / "classes.txt", {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except ValueError:
        raise ValueError(f"{path}: not UTF-8; save it as UTF-8") from None
    if lines and len(lines) != classes:
        raise ValueError(f"{path}: has {len(lines)} lines for {classes} classes; write one a line")
    for i, line in enumerate(lines):
        for name in {part.strip().lower() for part in (line, *line.split(","))}:
            found.setdefault(name, set()).add(i)
    return {name: min(ids) for name, ids in found.items() if len(ids) == 1}


def class_ids(folder, names, texts, classes):
    """Class numbers as texts, or names as class_names gave them -> integers [B]; the empty text -> `classes`, the null label. Raises ValueError."""
    found = [classes if not text else int(text) if re.fullmatch(r"[0-9]{1,9}", text) else names.get(text.lower(), -1) for text in texts]
    for text, i in zip(texts, found):
        if text and not 0 <= i < classes:
            raise ValueError(f"prompt {text!r}: a class is a number from 0 to {classes - 1} or a name of {folder / 'classes.txt'}")
    return found
