"""What a model is called, which files it is made of, and whether they can be what they say.

    FOLDER       a diffusers folder: model_index.json names the pipeline; or a folder written by
                 model.save, with sit.safetensors or edm2.safetensors
    owner/name   a diffusers folder on the Hugging Face hub, fetched once; never a pickle
    sit:FILE     a published checkpoint of SiT (.pt, .safetensors); beside it vae/, an
                 AutoencoderKL, and perhaps classes.txt, line i the names of class i
    edm2:FILE    a published snapshot of EDM2 (.pkl, .safetensors), with the same beside it;
                 edm2:FILE,GUIDE is guided by the network in GUIDE
    module:Class:PATH    a generator of one's own (plug.py)
No network is built here. Every ValueError is the user's one line: the value and the remedy.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from support.files import check_regular, read_json

NAMES = "a folder, owner/name, sit:FILE, edm2:FILE[,GUIDE] or module:Class:PATH"

# The embedded base: in the working directory, or else in this project.
DEFAULT = "assets/tiny"


class Pipeline(NamedTuple):
    """What a pipeline of diffusers is made of, and which schedulers are its stock one."""

    network: str  # the folder of the network that is trained
    encoders: tuple  # endings of the text encoders that it must have: text_encoder, _2, _3
    scheduler: dict  # {key of the scheduler's file: the values that it may have}
    is_flow: bool = False
    has_vae: bool = True  # without one the latents are pixels, if the pipeline allows it
    patch: int = 1  # a token of the network holds a square of this side; 1: not packed
    doubles: bool = False  # the network predicts a variance too, in as many channels again


# For the samples to be the stock pipeline's, the scheduler's file must have one of these values
# wherever it has the key.
LEADING = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear"),
    "timestep_spacing": ("leading",),
    "thresholding": (False,),
}
# Of a network that predicts the noise and nothing else, on a path that clips no prediction.
LEADING_NOISE = LEADING | {"prediction_type": ("epsilon",), "clip_sample": (False,)}

EULER = {
    "use_dynamic_shifting": (False, None),
    "stochastic_sampling": (False,),
    "invert_sigmas": (False,),
}

# The noise levels of Euler's scheduler are then those of DDIM's.
LEADING_EULER = LEADING | {
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero",),
    "timestep_type": ("discrete",),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "rescale_betas_zero_snr": (False,),
}
# With a shift that may follow the size.
SHIFTING_EULER = EULER | {"use_dynamic_shifting": (False, True, None)}

# Of a network's config: what must be 1 at least, and what names an input that no pipeline here has.
COUNTS = ("num_layers", "num_attention_heads", "attention_head_dim", "layers_per_block")
COUNTS += ("sample_size", "patch_size")
NEVER = ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type")

# Schedulers whose files describe a denoiser as DDIM's do.
DENOISERS = (
    r"(DDIM|DDPM|PNDM|LMS|Euler|EulerAncestral|Heun|KDPM2\w*|DPMSolver|UniPC|DEIS)(Discrete)?"
)

PIPELINES = {
    "StableDiffusionPipeline": Pipeline("unet", ("",), LEADING),
    "StableDiffusionXLPipeline": Pipeline("unet", ("", "_2"), LEADING_EULER),
    "StableDiffusion3Pipeline": Pipeline("transformer", ("",), EULER, is_flow=True, has_vae=False),
    "FluxPipeline": Pipeline("transformer", ("", "_2"), SHIFTING_EULER, is_flow=True, patch=2),
    "QwenImagePipeline": Pipeline("transformer", ("",), SHIFTING_EULER, is_flow=True, patch=2),
    "DiTPipeline": Pipeline("transformer", (), LEADING_NOISE, doubles=True),
}

# The kinds whose network no library holds: sit.py, edm2.py.
OWN = ("sit", "edm2")
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
PLUG = "plug"  # the kind of a generator of one's own

# What may lie beside the file of such a network, and is saved with it.
BESIDE = (
    "vae",
    "classes.txt",
    "reward",
    "evaluator",
    "recogniser",
    "prompts.jsonl",
    "eval_prompts.jsonl",
)


def _part_patterns(part, stem):
    """A part's config and its weights, in one file or in shards."""
    return [
        f"{part}/config.json",
        f"{part}/{stem}.safetensors",
        f"{part}/{stem}.safetensors.index.json",
        f"{part}/{stem}-*.safetensors",
    ]


# What is fetched of a hub id: only what `load` reads, and never a pickle.
WANTED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer*/*.json",
    "tokenizer*/*.txt",
    "tokenizer*/spiece.model",
    *_part_patterns("unet", "diffusion_pytorch_model"),
    *_part_patterns("transformer", "diffusion_pytorch_model"),
    *_part_patterns("vae", "diffusion_pytorch_model"),
    *_part_patterns("text_encoder*", "model"),
]


# --------------------------------------------------------------------------------------------------
# From a name to files.


class Location(NamedTuple):
    """Where a model's files lie."""

    kind: str  # one of PIPELINES, one of OWN, or PLUG
    folder: Path
    file: Path | None = None  # of the network; None for a pipeline, and where only a class knows
    guide: Path | None = None  # of the network that guides it, if there is one
    plug: str = ""  # module:Class
    source: Path | None = None  # what that class reads


def locate(name):
    """The name of a model -> Location. Raises ValueError, without --model before it."""
    name = str(name)
    kind, _, rest = name.partition(":")
    if kind in OWN:
        return _locate_file(kind, rest)
    if ":" in name and not Path(name).exists():
        return _locate_plug(name)
    folder = _locate_folder(name)
    if (folder / "generator.json").is_file():
        return _locate_saved_plug(folder)

    for kind in OWN:
        file = folder / f"{kind}.safetensors"
        guide = folder / "guide.safetensors"
        if file.is_file():
            is_guided = kind == "edm2" and guide.is_file()
            return Location(kind, folder, file, guide if is_guided else None)
    return Location(_pipeline(folder), folder)


def _locate_file(kind, rest):
    """What comes after sit: or edm2: -> Location."""
    file, guide = rest, None
    # A file may have a comma in its name.
    if kind == "edm2" and "," in rest and not Path(rest).is_file():
        file, _, guide = rest.partition(",")
        guide = Path(guide)
    return Location(kind, Path(file).parent, Path(file), guide)


def _locate_plug(name):
    """module:Class:PATH -> Location."""
    module, _, rest = name.partition(":")
    class_name, _, path = rest.partition(":")
    words = [*module.split("."), class_name]
    if not path or not all(word.isidentifier() for word in words):
        raise ValueError(
            f"{module}: is no prefix of a model; write {NAMES} (a generator of your own)"
        )
    return _plug_at(Path(path), f"{module}:{class_name}")


def _plug_at(source, plug, file=None):
    """The Location of a generator of one's own that reads `source`."""
    folder = source if source.is_dir() else source.parent
    return Location(PLUG, folder, file, plug=plug, source=source)


def _locate_saved_plug(folder):
    """A folder that such a generator has saved -> Location."""
    saved = read_json(folder / "generator.json")
    plug = saved.get("class")
    path = saved.get("path")
    is_inside = isinstance(path, str) and (path == "." or Path(path).name == path)
    if not isinstance(plug, str) or ":" not in plug or not is_inside:
        raise ValueError(f"{folder / 'generator.json'}: needs a class and a path in this folder")
    file = folder / "network.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} is missing; the folder is incomplete")
    return _plug_at(folder / path, plug, file)


def _locate_folder(name):
    """A folder, the default, or a hub id, which is fetched -> a folder that exists."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not folder.exists():
        if name == DEFAULT:
            folder = Path(__file__).resolve().parent.parent / DEFAULT
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.parent.is_dir():
            folder = _fetch(name)
    if not folder.is_dir():
        raise ValueError(
            f"no such folder; build the default with experiments/build_tiny.py, or give {NAMES}"
        )
    return folder


def _fetch(repo):
    """A hub id -> its local folder, downloaded if it is not there yet."""
    import huggingface_hub  # here, because it takes long to import

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=WANTED))
    except Exception as error:  # offline, unknown, gated, disk full: each raises another one
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"no such folder, and no hub id that can be fetched ({reason})") from None


def _pipeline(folder):
    """The pipeline that a diffusers folder names, one of PIPELINES."""
    check_regular(folder / "model_index.json")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            "no readable model_index.json with a _class_name, so this is not a diffusers folder"
        ) from None
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ValueError(f"holds a {pipeline}; known here: {', '.join(PIPELINES)}, and {NAMES}")
    return pipeline


def network_files(name):
    """The safetensors files of the network that is trained, one or several shards.

    It is what a merge reads. Empty where the weights lie in another kind of file. name: as for
    bases.check, or the folder that it returns.
    """
    location = locate(name)
    if location.kind in PIPELINES:
        return _weight_files(location.folder / PIPELINES[location.kind].network)
    if location.file and location.file.suffix == ".safetensors":
        return [location.file]
    return []


def files_of(name):
    """All files that the pictures of a model are a function of, besides VAE and text encoders."""
    location = locate(name)
    if location.kind in PIPELINES:
        return network_files(name)
    if location.file:
        return [path for path in (location.file, location.guide) if path]
    if location.source.is_file():
        return [location.source]
    return sorted(path for path in location.source.rglob("*") if path.is_file())


def copied_folders(name):
    """The folders that saving a model copies."""
    location = locate(name)
    takes_beside = location.kind in OWN or location.source and location.source.is_file()
    if takes_beside:
        return [location.folder / part for part in BESIDE]
    return [location.folder]


def copy_folder(source, target, *left_out, top=""):
    """Copies what a folder holds, except the patterns `left_out`, at its top also `top`.

    Links to nothing are left out too. shutil's ignore_dangling_symlinks cannot do that: it looks
    for the end of a relative link in the working directory, and would drop every file of a hub's
    cache.
    """

    def skipped(folder, names):
        patterns = list(left_out)
        if top and Path(folder) == Path(source):
            patterns.append(top)
        dead_links = [name for name in names if not (Path(folder) / name).exists()]
        return [*dead_links, *shutil.ignore_patterns(*patterns)(folder, names)]

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=skipped)


# --------------------------------------------------------------------------------------------------
# Whether files can be what they say.


def _weight_files(part):
    """The safetensors files in a part's folder: one, or the shards that its index names."""
    stem = "diffusion_pytorch_model"
    if part.name.startswith("text_encoder"):
        stem = "model"
    index = part / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(
                f"{part.name}/{index.name} has no weight_map; the folder is incomplete"
            )
        names = sorted(set(map(str, shards.values())))
    for name in names:
        is_inside = Path(name).name == name
        if not is_inside or not (part / name).is_file():
            raise ValueError(f"{part.name}/{name} is missing; {_why_missing(part)}")
    return [part / name for name in names]


def _why_missing(part):
    """Why a part may have no safetensors file, and the remedy."""
    variants = sorted(part.glob("*.*.safetensors"))
    if variants:
        variant = variants[0].name.split(".")[1]
        return (
            f"only the variant {variant} is there ({variants[0].name}); "
            f"load it with diffusers (variant={variant!r}) and save it again"
        )
    pickles = []
    for path in sorted(part.glob("*")):
        if path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
            pickles.append(path.name)
    if not pickles:
        return "the folder is incomplete"
    return f"{pickles[0]} is a pickle, which is never read: save the model with safe_serialization"


def check_part(part):
    """A part with weights -> its config. Reads that, and each file's header against its size."""
    config = read_json(part / "config.json")
    for path in _weight_files(part):
        check_regular(path)
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} in {part.name} is damaged ({error})") from None
    return config


def named_parts(folder):
    """The parts that model_index.json names, without those that it gives as null."""
    parts = []
    for part, value in read_json(folder / "model_index.json").items():
        if isinstance(value, list) and value and value[0]:
            parts.append(part)
    return parts


def check_pipeline(folder, kind):
    """Checks all parts of a diffusers folder; kind is one of PIPELINES. Raises ValueError."""
    pipeline = PIPELINES[kind]
    named = named_parts(folder)
    suffixes = []  # of the text encoders: text_encoder, text_encoder_2, text_encoder_3
    for suffix in ("", "_2", "_3"):
        if suffix in pipeline.encoders or "text_encoder" + suffix in named:
            suffixes.append(suffix)
    if suffixes == ["", "_3"]:
        raise ValueError(
            "model_index.json names a text_encoder_3 but no text_encoder_2; "
            "it needs the first two beside it"
        )
    for suffix in suffixes:
        _check_tokenizer(folder / f"tokenizer{suffix}")
        config = check_part(folder / f"text_encoder{suffix}")
        _check_vocabulary(folder, suffix, config)
        _check_length(folder, suffix, config)

    config = check_part(folder / pipeline.network)
    _check_scheduler(folder, pipeline)
    channels = _check_network(config, pipeline)
    vae = None
    if "vae" in named or pipeline.has_vae:
        vae = check_part(folder / "vae")
    check_channels(channels, vae)


def _check_network(config, pipeline):
    """The config of a network, as its kind of pipeline has it -> the channels of a latent."""
    file = f"{pipeline.network}/config.json"
    for key in COUNTS:
        value = config.get(key, 1)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{key} {value} in {file}: must be 1 at least")
    for key in NEVER:
        if config.get(key):
            raise ValueError(f"{key} {config[key]!r} in {file}: such networks are not known here")
    channels = config.get("in_channels")
    out_channels = config.get("out_channels") or channels
    expected = [channels]
    if pipeline.doubles and isinstance(channels, int):
        expected = [2 * channels]
    is_packed = pipeline.patch > 1
    if is_packed and isinstance(channels, int):
        channels = channels // pipeline.patch**2
        expected.append(channels)
    has_size = is_packed or isinstance(config.get("sample_size"), int)
    if out_channels not in expected or not has_size:
        raise ValueError(
            f"{pipeline.network}/config.json: in_channels {config.get('in_channels')}, "
            f"out_channels {config.get('out_channels')} and sample_size "
            f"{config.get('sample_size')} are not those of a text-to-image network"
        )
    return channels


def _check_tokenizer(folder):
    """Checks that a tokenizer's files are there, and that the first one states its length."""
    if (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")
    elif not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise ValueError(
            f"{folder.name}/tokenizer.json is missing, or vocab.json and merges.txt; "
            "the folder is incomplete"
        )
    length = read_json(folder / "tokenizer_config.json").get("model_max_length")
    # Without a length transformers would take 10^30. The other tokenizers get the first one's.
    is_length = isinstance(length, int) and 0 < length < 2**31
    if folder.name == "tokenizer" and not is_length:
        raise ValueError(
            f"model_max_length {length} in tokenizer/tokenizer_config.json: "
            "must be how many tokens the text encoder takes"
        )


def _check_length(folder, suffix, config):
    """A CLIP has a place for each token that its tokenizer may give it."""
    length = read_json(folder / f"tokenizer{suffix}" / "tokenizer_config.json").get(
        "model_max_length"
    )
    places = config.get("max_position_embeddings")
    is_clip = str(config.get("model_type", "")).startswith("clip")
    if is_clip and isinstance(length, int) and isinstance(places, int) and length > places:
        raise ValueError(
            f"tokenizer{suffix}/tokenizer_config.json has model_max_length {length}, and "
            f"text_encoder{suffix}/config.json max_position_embeddings {places}; they belong to "
            "different models"
        )


def _check_vocabulary(folder, suffix, config):
    """The text encoder has an embedding for each token of its tokenizer."""
    file = f"tokenizer{suffix}/tokenizer.json"
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int) or not (folder / file).is_file():
        return
    tokenizer = read_json(folder / file)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers = [-1]
    if isinstance(vocabulary, dict):
        numbers += [number for number in vocabulary.values() if isinstance(number, int)]
    elif isinstance(vocabulary, list):
        numbers.append(len(vocabulary) - 1)
    for token in tokenizer.get("added_tokens") or []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            numbers.append(token["id"])
    if max(numbers) >= size:
        raise ValueError(
            f"{file} has the token {max(numbers)}, and text_encoder{suffix}/config.json "
            f"vocab_size {size}; they belong to different models"
        )


def _check_scheduler(folder, pipeline):
    """Checks that samples by this scheduler's file are the stock pipeline's."""
    file = "scheduler/scheduler_config.json"
    scheduler = read_json(folder / file)
    kind = str(scheduler.get("_class_name", ""))
    known = "FlowMatchEulerDiscrete" if pipeline.is_flow else DENOISERS
    if kind and not re.fullmatch(f"{known}(Multistep|Singlestep)?Scheduler", kind):
        raise ValueError(f"{kind} in {file}: such schedulers are not known here")
    if pipeline.is_flow and "shift" not in scheduler:
        raise ValueError(f"{file} has no shift, so this is not the scheduler of a flow")
    for key, known in pipeline.scheduler.items():
        if scheduler.get(key, known[0]) not in known:
            raise ValueError(
                f"{key} {scheduler[key]!r} in {file}; known here: {', '.join(map(repr, known))}"
            )
    for key in ("shift", "beta_start", "beta_end", "num_train_timesteps"):
        value = scheduler.get(key, 1)
        if not (isinstance(value, (int, float)) and value > 0):
            raise ValueError(f"{key} {value!r} in {file}: must be a positive number")


def packed_side(vae):
    """The side of a latent whose tokens are squares of 2 x 2; vae: the config of the VAE.

    sample_size is that of a picture. Qwen-Image states none: its pictures have 1,024 pixels.
    """
    if "block_out_channels" in vae:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
    else:
        factor = 2 ** len(vae["temperal_downsample"])
    return 2 * (vae.get("sample_size", 1024) // (2 * factor))


def check_channels(channels, vae):
    """Checks a network's channels against the config of its VAE, or None for pixels."""
    if vae is None:
        if channels not in (1, 3):
            raise ValueError(f"the network has {channels} channels, and pixels have 1 or 3")
        return
    latent_channels = vae.get("latent_channels", vae.get("z_dim"))  # z_dim: Qwen-Image's
    if channels != latent_channels:
        raise ValueError(
            f"the network has {channels} channels, and the latents of vae/ have "
            f"{latent_channels}; it belongs to another network"
        )


def wrapper_of(names):
    """What a wrapped model puts before all its names, as DistributedDataParallel and torch.compile
    do: module. or _orig_mod., perhaps both. Empty for a model that was not wrapped.
    """
    wrapper = ""
    names = list(names)
    while names:
        found = [part for part in WRAPPERS if all(name.startswith(part) for name in names)]
        if not found:
            break
        wrapper += found[0]
        names = [name.removeprefix(found[0]) for name in names]
    return wrapper


def check_regular_files(folders):
    """Raises ValueError if these files and folders hold anything but files and folders.

    They are copied when a model is saved, and libraries read in them what they like.
    """
    for folder in folders:
        for path in (folder, *sorted(folder.rglob("*"))):
            if not path.is_dir():
                check_regular(path)


def stated_heads(file):
    """num_heads that a SiT file of `save` states; None for other files.

    A published file does not state it: the width tells it.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return int(metadata.get("num_heads", 0)) or None
    except (SafetensorError, OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------
# Prompts that are classes.


def class_names(folder, classes):
    """classes.txt, line i the names of class i with commas between -> {name in lower case: i}.

    A name of several classes is left out. Without the file there are no names.
    """
    path = folder / "classes.txt"
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError:
        raise ValueError(f"{path}: not UTF-8; save it as UTF-8") from None
    if lines and len(lines) != classes:
        raise ValueError(f"{path}: has {len(lines)} lines for {classes} classes; write one a line")
    return numbers_of_names(lines)


def numbers_of_names(lines):
    """Line i has the names of class i with commas between -> {name in lower case: i}.

    A name of several classes is left out.
    """
    numbers = {}  # {name: the classes that have it}
    for i, line in enumerate(lines):
        for name in (line, *line.split(",")):
            numbers.setdefault(name.strip().lower(), set()).add(i)
    return {name: min(found) for name, found in numbers.items() if len(found) == 1}


def class_ids(file, names, texts, classes):
    """Class numbers as texts, or names from the file `file` -> integers [B].
    The empty text is the null label, `classes`. Raises ValueError for a text that is no class.
    """
    ids = []
    for text in texts:
        if not text:
            ids.append(classes)
            continue
        number = names.get(text.lower(), -1)
        if re.fullmatch(r"[0-9]{1,9}", text):
            number = int(text)
        if not 0 <= number < classes:
            raise ValueError(
                f"prompt {text!r}: a class is a number from 0 to {classes - 1} or a name of {file}"
            )
        ids.append(number)
    return ids
