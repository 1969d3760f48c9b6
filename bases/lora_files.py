"""LoRA files: what diffusers, peft and train.py write, as the weights that they mean.

    W + scale B A,  scale = alpha / r, or alpha / sqrt(r) where use_rslora is set (arXiv 2312.03732)
The file says alpha by layer: in a tensor LAYER.alpha, in its metadata lora_adapter_metadata
(diffusers), or in adapter_config.json beside it (peft). Where it says nothing, alpha is r.
Left out on purpose: whatever is more than W + scale B A (DoRA, biases, LoHa), LoRAs of text
encoders, and other layouts (kohya, ComfyUI): a file with any of these is refused by its name.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from support.files import read_json

PEFT = "base_model.model."
METADATA = "lora_adapter_metadata"

CONVERT = "load it into diffusers with load_lora_weights and save it with save_lora_weights"
PLAIN = "train a plain LoRA"

# The names of tensors that are no LoRA of a network in the layout of diffusers or peft:
# a pattern, what it is, and the remedy. The first that fits is named.
FOREIGN = (
    (r"lora_magnitude_vector", "DoRA, whose magnitudes are more than a LoRA", PLAIN),
    (r"(^|\.)(hada|lokr|oft|boft|dora|vera|ia3)_|\.diff(_b)?$", "no LoRA", PLAIN),
    (r"lora_embedding_", "a LoRA of an embedding", PLAIN),
    (r"lora_[AB](\.\w+)?\.bias$", "a LoRA with biases", PLAIN),
    (r"^(lora_|lycoris_)", "kohya's layout", CONVERT),
    (r"^diffusion_model\.", "ComfyUI's layout", CONVERT),
    (
        r"^(base_model\.model\.)?(text_encoder|text_model|te\d?)(_\d)?\.",
        "a LoRA of a text encoder",
        "save that of the network alone",
    ),
    (
        r"\.lora_[AB]\.(?!weight$)\w+\.weight$",
        "named by an adapter",
        "save it with save_pretrained",
    ),
    (r"lora_(down|up|linear_layer)|lora\.(down|up)|\.processor\.", "an older layout", CONVERT),
)
KNOWN = (".lora_A.weight", ".lora_B.weight", ".alpha")
LORA_LIKE = re.compile(r"lora_|[._]lora\.|hada_|lokr_|^diffusion_model\.|^lycoris_")

# Settings of peft with which a layer is something else than W + scale B A.
REFUSED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
)
# Starts that change the base before training, so that the file is no change of the base itself.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def lora_in(path):
    """The LoRA file in a folder that peft or diffusers has written; any other path as it is.

    Raises ValueError for a pickle.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return path
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (folder / name).is_file():
            return str(folder / name)
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin"):
        if (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: a pickle, which is never read; save it as safetensors"
            )
    return path


def is_lora(names):
    """Whether tensors of these names are a LoRA, or something like one."""
    return any(LORA_LIKE.search(name) for name in names)


def check_layout(path, names):
    """Raises ValueError, in one line, for the first of these names that is no A, B or alpha."""
    for name in names:
        for pattern, what, remedy in FOREIGN:
            if re.search(pattern, name):
                raise ValueError(f"{path}: {name}: {what}; {remedy}")
    for name in names:
        if not name.endswith(KNOWN):
            raise ValueError(f"{path}: {name}: neither lora_A, lora_B nor alpha of a LoRA; {PLAIN}")


def layer_in(name, base):
    """The layer of the base that a tensor of a LoRA file belongs to, and its name in the file."""
    in_file = name.rpartition(".lora_")[0] or name.removesuffix(".alpha")
    in_base = in_file.removeprefix(PEFT)
    if in_base + ".weight" not in base:
        in_base = re.sub(r"^(transformer|unet)\.", "", in_base)
    return in_base, in_file


# --------------------------------------------------------------------------------------------------
# What a file says of alpha.


def read_settings(path, file):
    """peft's settings {prefix of the names in the file: settings}. Raises ValueError."""
    path = Path(path)
    if any(name.startswith(PEFT) for name in file):
        config = path.parent / "adapter_config.json"
        if not config.is_file():
            raise ValueError(
                f"{path}: peft's layout, whose alpha stands in adapter_config.json, and that is "
                "not beside it; copy it there"
            )
        return {PEFT: checked_settings(config, read_json(config))}

    text = file.facts.get(METADATA)
    if text is None:
        return {}
    where = f"{path}: {METADATA}"
    try:
        facts = json.loads(text)
        parts = {}
        for name, value in facts.items():
            prefix, _, setting = name.partition(".")
            parts.setdefault(prefix + ".", {})[setting] = value
    except (ValueError, RecursionError, AttributeError):
        raise ValueError(f"{where} is not a JSON object; save the file again") from None
    return {prefix: checked_settings(where, settings) for prefix, settings in parts.items()}


def checked_settings(where, settings):
    """Settings as peft writes them -> the same. Raises ValueError for what is not obeyed here."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{where}: says that it is {kind!r}; {PLAIN}")
    for name in REFUSED:
        if settings.get(name):
            raise ValueError(f"{where}: {name} is {settings[name]!r}; {PLAIN}")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {settings['bias']!r}; {PLAIN}")
    start = settings.get("init_lora_weights")
    if str(start).lower().startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changes the base before training; "
            "save it with path_initial_model_for_weight_conversion"
        )

    ranks = [settings.get("r"), *by_layer(where, settings, "rank_pattern").values()]
    alphas = [settings.get("lora_alpha"), *by_layer(where, settings, "alpha_pattern").values()]
    for rank in ranks:
        if not is_number(rank) or rank != int(rank) or rank < 1:
            raise ValueError(f"{where}: r is {rank!r}; expected an integer from 1")
    for alpha in alphas:
        if not is_number(alpha):
            raise ValueError(f"{where}: lora_alpha is {alpha!r}; expected a number")
    return settings


def is_number(value):
    """Whether this is a finite number, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def by_layer(where, settings, name):
    """rank_pattern or alpha_pattern {pattern: number}. A pattern is a regular expression."""
    table = settings.get(name) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {name} is no table of patterns; save the file again")
    for pattern in table:
        try:
            # A repeated group can take for ever on a long name.
            is_plain = len(pattern) < 200 and not re.search(r"\)[*+{?]", pattern)
            re.compile(pattern)
        except re.error:
            is_plain = False
        if not is_plain:
            raise ValueError(f"{where}: {name} has the pattern {pattern!r}; write names of layers")
    return table


def for_layer(table, layer, default):
    """The value of the first pattern that the end of a layer's name matches, as in peft."""
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


# --------------------------------------------------------------------------------------------------
# The file.


class LoraFile(Mapping):
    """The tensors that a LoRA file changes: W + scale B A, by their names in the base.

    file: an opened safetensors file (tensors.Weights) of the name `path`; base: that of the
    network. Raises ValueError, in one line, for a file that means anything else.
    """

    def __init__(self, path, file, base):
        self.file = file
        self.base = base
        self.facts = file.facts
        self.layers = {}  # {layer of the base: its name in the file}
        self.scales = {}  # {layer of the base: scale}
        unknown = []
        for name in file:
            in_base, in_file = layer_in(name, base)
            if name.endswith(KNOWN):
                self.layers[in_base] = in_file
            if not name.endswith(KNOWN) or in_base + ".weight" not in base:
                unknown.append(name)
        check_layout(path, unknown)
        settings = read_settings(path, file)
        for layer, in_file in self.layers.items():
            self.check_layer(path, layer)
            self.scales[layer] = self.scale(path, layer, in_file, settings)

    def names_of(self, layer):
        """The names in the file of what changes a layer: A, B and alpha."""
        in_file = self.layers[layer]
        return in_file + ".lora_A.weight", in_file + ".lora_B.weight", in_file + ".alpha"

    def check_layer(self, path, layer):
        """A layer has its A and B, of one rank, and an alpha that is one number if it has any."""
        name_A, name_B, name_alpha = self.names_of(layer)
        for name in (name_A, name_B):
            if name not in self.file:
                raise ValueError(f"{path}: {layer} lacks {name}; get the whole file")
        if 0 in self.file.shape(name_A) or 0 in self.file.shape(name_B):
            raise ValueError(f"{path}: {layer} has a rank of 0; get the whole file")
        if name_alpha in self.file:
            shape = self.file.shape(name_alpha)
            if math.prod(shape) != 1:
                raise ValueError(f"{path}: {name_alpha} has the shape {shape}, and is one number")
            if not math.isfinite(self.file[name_alpha].item()):
                raise ValueError(f"{path}: {name_alpha} is not finite")

    def scale(self, path, layer, in_file, settings):
        """The number before B A."""
        name_A, _, name_alpha = self.names_of(layer)
        rank = self.file.shape(name_A)[0]
        alpha = None
        if name_alpha in self.file:
            alpha = self.file[name_alpha].item()
        for prefix, said in settings.items():
            if in_file.startswith(prefix):
                return self.stated_scale(path, layer, rank, alpha, said)
        if settings:
            raise ValueError(
                f"{path}: {METADATA} says nothing of {in_file}, so its alpha is unknown; "
                "save the file again"
            )
        return 1.0 if alpha is None else alpha / rank

    def stated_scale(self, path, layer, rank, alpha, said):
        """The scale by peft's settings `said`; alpha: that of the file's own tensor, or None."""
        stated_rank = for_layer(said.get("rank_pattern") or {}, layer, said["r"])
        stated_alpha = for_layer(said.get("alpha_pattern") or {}, layer, said["lora_alpha"])
        if stated_rank != rank:
            raise ValueError(
                f"{path}: {layer} has the rank {rank}, and its settings say {stated_rank}; "
                "they belong to another file"
            )
        if alpha is not None and alpha != stated_alpha:
            raise ValueError(
                f"{path}: {layer} has the alpha {alpha:g}, and its settings say {stated_alpha}; "
                "they belong to another file"
            )
        return stated_alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)

    def __getitem__(self, name):
        layer = name.removesuffix(".weight")
        name_A, name_B, _ = self.names_of(layer)
        A = self.file[name_A].float()  # [r, in, ...]
        B = self.file[name_B].float()  # [out, r, ...]
        change = self.scales[layer] * (B.flatten(1) @ A.flatten(1))
        return self.base[name].float() + change.reshape(self.base.shape(name))

    def shape(self, name):
        """The shape of W if A and B fit it, else theirs, which is no shape of the base."""
        name_A, name_B, _ = self.names_of(name.removesuffix(".weight"))
        A = self.file.shape(name_A)
        B = self.file.shape(name_B)
        W = self.base.shape(name) if name in self.base else (None,)
        fits = len(A) > 1 and len(B) > 1
        fits = fits and (B[0], B[1], math.prod(A[1:])) == (W[0], A[0], math.prod(W[1:]))
        return W if fits else (*B, *A)

    def __iter__(self):
        return iter(sorted(layer + ".weight" for layer in self.layers))

    def __len__(self):
        return len(self.layers)
