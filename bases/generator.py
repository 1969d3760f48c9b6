"""The interface that the algorithm knows of a base model, and what all bases share.

    model(x_t, t, prompt) -> (x0_hat, eps_hat)    all [B, *shape], t [B]; prompt from `encode`
    model.network           the nn.Module that is trained; predictions are differentiable in it
    model.path              its Gaussian path (sampling.py)
    model.shape             of one latent
    model.initial_std       of x_T: x_T = initial_std * noise, where the stock sampler starts
    model.folder            where the base's files lie
    model.embed(texts)      prompt embeddings of a few texts: a tuple of [B, ...]; one of integers
                            (a mask of padding) takes no prompt noise
    model.encode(texts)     the same of any number of texts, float32, without gradients
    model.picture(latents)  pictures [B, 1 or 3, H, W] of a few latents
    model.decode(latents)   pictures [B, 3, H, W] of any number of latents, in [0, 1]
    model.frozen()          a copy whose network no longer learns
    model.save(folder)      writes a folder that bases.load reads
Three attributes of a base are optional: `guide`, `guided_channels` and `guided`, see
sampling.predict.
Deterministic samples equal the stock pipeline's. Weights are float32; precision bfloat16 means
autocast, and text encoders in bfloat16.
"""

import copy
import functools
import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bases.files import BESIDE, copy_folder, named_parts
from bases.lora import TARGETS, can_have_lora, merged
from support.files import read_json
from support.guards import check_weights

# Bytes of prompt embeddings that are kept: 36,000 prompts of Stable Diffusion 1, 1,500 of 3.5.
REMEMBERED = 8 * 2**30

TEXTS_AT_ONCE = 64  # in one forward of the text encoders


def _libraries():
    """diffusers and transformers. Imported here, so that a bad flag is answered in a second."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return diffusers, transformers


def _part(cls, folder, device=None, dtype=torch.float32):
    """Loads a part of a pipeline: a frozen network in eval(), or a tokenizer if device is None.

    Raises ValueError if its files are not whole.
    """
    try:
        if device is None:
            return cls.from_pretrained(folder, local_files_only=True)
        network = _read_network(cls, folder, dtype)
    except Exception as error:  # each kind of damage raises another one in these libraries
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--model {folder.parent}: {folder.name} is not the {cls.__name__} of its config "
            f"({reason})"
        ) from None
    network = network.to(device).eval().requires_grad_(False)
    check_weights(network, f"--model {folder.parent}: {folder.name}")
    return network


def _read_network(cls, folder, dtype):
    """Raises ValueError for weights that no file holds: the libraries draw them at random."""
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if cls.__module__.startswith("diffusers"):
        options["torch_dtype"] = dtype
    else:
        options["dtype"] = dtype
    network, report = cls.from_pretrained(folder, **options)
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        raise ValueError(f"no weights of its shape for {min(map(str, lacking))}")
    if report["unexpected_keys"] and cls.__module__.startswith("diffusers"):
        raise ValueError(f"it has no place for {min(map(str, report['unexpected_keys']))}")
    return network


def _encoder(folder, suffix, classes, device, dtype):
    """A pipeline's text encoder, "", _2 or _3 -> (tokenizer, encoder); classes: theirs."""
    tokenizer_class, encoder_class = classes
    tokenizer = _part(tokenizer_class, folder / f"tokenizer{suffix}")
    return tokenizer, _part(encoder_class, folder / f"text_encoder{suffix}", device, dtype)


def _tokens(tokenizer, texts, length, device):
    """Token numbers [B, length], padded or cut off at the end."""
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids.to(device)


def from_velocity(x_t, t, v):
    """v = eps - x_0 on the path x_t = (1 - t) x_0 + t eps -> x0_hat, eps_hat; t [B]."""
    t = t.reshape(-1, *[1] * (x_t.dim() - 1))
    return x_t - t * v, x_t + (1 - t) * v


def attention_kernel(device, precision):
    """The context that chooses the kernel of attention.

    A CPU's fused attention is slow in bfloat16: its backward takes twice the time of all the rest.
    There the formula itself is used.
    """
    if precision == "bfloat16" and device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def is_attention(name, module):
    """Whether a module of a network, by its own name or its class, is an attention."""
    is_list = isinstance(module, nn.ModuleList)  # Stable Diffusion 1 has `attentions` of blocks
    return (
        "attn" in name
        or "attention" in type(module).__name__.lower()
        or ("attention" in name and not is_list)
    )


def attention_parameters(network):
    """The names of the parameters that lie in an attention, at any depth."""
    found = set()
    for path, module in network.named_modules():
        if is_attention(path.rpartition(".")[2], module):
            found.update(f"{path}.{name}" for name, _ in module.named_parameters())
    return found


class Generator:
    """What the bases share, and what a generator of your own extends (docs/bases.md).

    A base gives network, path, shape, __call__, embed and picture. All else has a default.
    """

    initial_std = 1.0
    encoders = None  # [(tokenizer, text encoder)], [] once they are forgotten; None: classes
    vae = None  # None: a latent is a picture

    def __init__(self, source, device, precision, decode_batch):
        """source: the file or folder that the base is read from."""
        self.source = Path(source)
        self.folder = self.source if self.source.is_dir() else self.source.parent
        self.device = torch.device(device)
        self.precision = precision
        self.decode_batch = decode_batch
        self.known = {}  # {text: its embeddings, on the CPU}

    @property
    def encoder_type(self):
        """The type of the numbers of a text encoder."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @functools.cached_property
    def attention_names(self):
        """The names of the parameters of attention; those of all, where there is none."""
        names = [name for name, _ in self.network.named_parameters()]
        return attention_parameters(self.network) or set(names)

    def trained(self, name):
        """Whether the parameter `name` learns under --train attention."""
        return name in self.attention_names

    def lora_targets(self):
        """The ends of the names of the layers that --lora changes, whole between dots.

        Those that diffusers, SiT and EDM2 use, if the network has any; else all linear layers whose
        weights learn; else all linear layers.
        """
        ends = tuple("." + target for target in TARGETS)
        linear = [name for name, layer in self.network.named_modules() if can_have_lora(layer)]
        known = [name for name in linear if ("." + name).endswith(ends)]
        learning = [name for name in linear if self.trained(f"{name}.weight")]
        return tuple(known or learning or linear)

    def stock_sample(self, texts, x_T, steps):
        """Latents by the deterministic sampler of the library that the base comes from, or None.

        Without guidance, from x_T [B, ...]. `train.py --check` compares them with ours.
        """
        return None

    def stock_pipeline(self, part):
        """diffusers' own pipeline of the base's folder, with this network as its `part`."""
        diffusers, _ = _libraries()
        parts = {part: self.network, "vae": self.vae}
        for name, value in read_json(self.folder / "model_index.json").items():
            is_absent = isinstance(value, list) and not (self.folder / name).is_dir()
            if is_absent:  # like the safety checker, or the third text encoder
                parts[name] = None
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.folder, local_files_only=True, **parts
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def autocast(self):
        """The precision of a forward, and its attention."""
        is_low = self.precision == "bfloat16"
        low_precision = torch.autocast(self.device.type, torch.bfloat16, enabled=is_low)
        with low_precision, attention_kernel(self.device, self.precision):
            yield

    @torch.no_grad()
    def encode(self, texts):
        """texts -> prompt embeddings, a tuple of [B, ...] in float32.

        The empty text is the null prompt of guidance. Raises RuntimeError for a text that
        forget_text_encoders did not keep; where prompts are classes, ValueError for a text that
        is no class.
        """
        unknown = [text for text in texts if text not in self.known]
        if not unknown:
            rows = [self.known[text] for text in texts]
            return tuple(torch.stack(embeddings).to(self.device) for embeddings in zip(*rows))
        if self.encoders == []:
            raise RuntimeError(
                "the text encoders have been forgotten, "
                f"and the embedding of {unknown[0]!r} was not kept"
            )
        # Each text once, however many rollouts share it.
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        places = [place[text] for text in texts]
        parts = [self.embed(part) for part in _split(distinct, TEXTS_AT_ONCE)]
        prompt = []
        for pieces in zip(*parts):
            embedding = torch.cat(pieces)[places]
            # Integers stay what they are: a mask of padding.
            prompt.append(embedding.float() if embedding.is_floating_point() else embedding)
        return tuple(prompt)

    def forget_text_encoders(self, texts=()):
        """Keeps the embeddings of `texts` on the CPU and frees the encoders, of frozen copies too.

        Embeddings of classes are kept as well. If all that takes more than REMEMBERED bytes, the
        encoders stay instead and encode each iteration's prompts anew.
        """
        if self.encoders == []:
            return
        texts = list(dict.fromkeys(texts))
        size = sum(embedding.nbytes for embedding in self.encode(texts[:1]))  # of one text
        if len(texts) * size > REMEMBERED:
            return
        for part in _split(texts, TEXTS_AT_ONCE):
            embeddings = [embedding.cpu() for embedding in self.encode(part)]
            self.known.update(zip(part, zip(*embeddings)))
        if self.encoders:
            self.encoders.clear()  # in place: copies share the list

    def decode(self, latents):
        """latents [B, *shape] -> pictures [B, 3, H, W] in [0, 1], float32.

        `decode_batch` of them at a time. B may be 0: a process may have no rollouts.
        """
        if not len(latents):  # a VAE cannot decode nothing
            return self.decode(latents.new_zeros(1, *self.shape))[:0]
        pictures = []
        for part in latents.split(self.decode_batch):
            pictures.append(self.picture(part.float()).float().clamp(0, 1))
        return torch.cat(pictures).expand(-1, 3, -1, -1)  # one channel is grey

    def frozen(self):
        """A copy whose network no longer learns: the reference policy of the KL."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network).requires_grad_(False)
        return twin

    def weights(self):
        """The network's tensors as `save` writes them, LoRA folded in -> {name: tensor}.

        Collective if the network is in pieces (support/sharding.py): call it on every process.
        """
        return merged(self.network)

    def save(self, folder, weights=None):
        """Writes a folder that bases.load reads: see plug.py, whose folders these are.

        Pipelines, SiT and EDM2 write their own layouts in place of it.
        """
        folder = Path(folder)
        if self.source.is_dir():
            copy_folder(self.source, folder, ".git", ".cache")
        else:
            self.copy_beside(folder)
            shutil.copyfile(self.source, folder / self.source.name)
        cls = type(self)
        path = "." if self.source.is_dir() else self.source.name
        facts = {"class": f"{cls.__module__}:{cls.__qualname__}", "path": path}
        (folder / "generator.json").write_text(json.dumps(facts, indent=2) + "\n")
        save_file(weights or self.weights(), folder / "network.safetensors", {"format": "pt"})

    def save_pipeline(self, folder, part, weights=None):
        """Writes a diffusers folder that loads like the base.

        It holds what the base's folder holds, without whole models in one file and pickles, and in
        folder/part the network as it is now (float32, LoRA folded in).
        """
        folder = Path(folder)
        left_out = [part, "*.bin", "*.ckpt", "*.fp16*", ".git", ".cache"]
        copy_folder(self.folder, folder, *left_out, top="*.safetensors")
        self.network.save_config(folder / part)
        file = folder / part / "diffusion_pytorch_model.safetensors"
        save_file(weights or self.weights(), file, {"format": "pt"})

        # Parts that a hub id names but that were not fetched, like the safety checker.
        absent = [name for name in named_parts(self.folder) if not (folder / name).is_dir()]
        if absent:
            index = read_json(self.folder / "model_index.json")
            for name in absent:
                index[name] = [None, None]
            (folder / "model_index.json").write_text(json.dumps(index, indent=2))

    def save_own(self, folder, kind, facts, weights=None):
        """Writes KIND.safetensors and copies of what lies beside the base's file.

        KIND.safetensors is the network as it is now (float32, LoRA folded in); facts {name:
        anything} becomes its metadata, as text.
        """
        folder = Path(folder)
        self.copy_beside(folder)
        metadata = {key: str(value) for key, value in facts.items()}
        save_file(weights or self.weights(), folder / f"{kind}.safetensors", metadata)

    def copy_beside(self, folder):
        """Makes a folder with copies of what may lie beside the file of a base."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in BESIDE:
            path = self.folder / name
            if path.is_dir():
                copy_folder(path, folder / name)
            elif path.is_file():
                shutil.copyfile(path, folder / name)


def _split(texts, size):
    """A list in parts of at most `size`."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]
