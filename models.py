"""Models: the base generators behind one small interface, which is all that the algorithm knows of them.

    model(x_t, t, prompt) -> (x0_hat, eps_hat)     the prediction; prompt is what encode returned; differentiable in model.network
    model.encode(texts) -> tuple of [B, ...]       prompt embeddings, frozen        model.path      its Gaussian path (sampling.py)
    model.decode(latents) -> [B, 3, H, W]          pictures in [0, 1]               model.shape     of one latent
    model.network                                  the module that is trained       model.save(folder)   writes a folder that `load` reads
    model.folder                                   the files it came from           model.frozen()  the same model with its weights of now
    model.initial_std                              of x_T, what the stock sampler starts from: x_T = initial_std * noise
Here: Stable Diffusion 1, 2, 3 and 3.5 (diffusers folders or hub ids; the embedded default is a 3 in pixel space), and SiT and EDM2
(`sit:FILE`, `edm2:FILE[,GUIDE]`, with an AutoencoderKL in vae/ beside FILE). `check` looks at the files without building a network.
Deterministic samples equal the stock pipeline's. Weights are float32; precision bfloat16 means autocast, and text encoders in bfloat16.
"""
import copy
import functools
import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot, pad
from torch.utils.checkpoint import checkpoint

import edm2
import sit
from lora import merged
from model_files import BESIDE, check, class_ids, class_names, copy_folder, locate, named_parts, network_files, read_json, stated_heads
from sampling import EDM, VP, Flow

__all__ = ["check", "network_files", "load"]                             # what callers use; the first two live in model_files.py
T5_TOKENS = 256                                                          # of a prompt, as in the stock pipeline
REMEMBERED = 8 * 2**30                                                   # bytes of prompt embeddings: 36,000 prompts of Stable Diffusion 1, 1,500 of 3.5


def load(name, device="cpu", precision="float32", checkpointing=False, decode_batch=8, compile=False):
    """Loads a model for training: weights in float32, forwards under bfloat16 autocast if precision says so.

    checkpointing: recompute in the backward instead of keeping activations; decode_batch: pictures that the VAE decodes at once. Both
    are for memory only. compile: by torch.compile, in place, so that no name of a weight changes. Raises ValueError, in one line, as
    `check` does, or if the weights turn out not to be those of their config.
    """
    check(name)
    kind, folder, file, guide = locate(name)
    adapter = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3, "sit": SiT, "edm2": EDM2}[kind]
    model = adapter(file or folder, torch.device(device), precision, decode_batch, *([guide] if guide else []))
    if compile:
        # Rollout and update are two graphs and must round nearly alike: to bfloat16 where the plain network does, and each size of a batch by itself.
        torch._dynamo.config.recompile_limit = 64                        # not 8: a size beyond it would go through the plain network, which rounds otherwise
        model.network.compile(dynamic=False, options={"emulate_precision_casts": True})
    if checkpointing:
        recompute(model.network, model.attention)
    return model


def recompute(network, attention=nullcontext):
    """Has a network keep only what goes into its blocks, and compute their activations again in the backward, within attention()."""
    again = functools.partial(_again, attention)
    blocks = [module for module in network.modules() if isinstance(module, (sit.Block, edm2.Block))]
    for block in blocks:
        block.forward = functools.partial(_recomputed, again, block.forward)    # a bound method in a partial: deepcopy binds it to the copy
    if not blocks:
        network.enable_gradient_checkpointing(again)


def _again(attention, *call):
    within = {} if torch.compiler.is_compiling() else {"context_fn": lambda: (nullcontext(), attention())}      # a compiler takes none, and needs none
    return checkpoint(*call, use_reentrant=False, **within)


def _recomputed(again, forward, *inputs):
    return again(forward, *inputs) if torch.is_grad_enabled() else forward(*inputs)


# ---------------------------------------------------------------------------------------------------------------------
# What the adapters share.

def _libraries():
    import diffusers                                                     # here, so that a bad flag is answered in a second
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


def _part(cls, folder, device=None, dtype=torch.float32):
    """A network of diffusers or transformers, in eval() and without gradients, or (no device) a tokenizer. Raises ValueError if its files are not whole."""
    keyword = "torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"
    try:
        if device is None:
            return cls.from_pretrained(folder, local_files_only=True)
        network, found = cls.from_pretrained(folder, **{keyword: dtype}, use_safetensors=True, local_files_only=True, output_loading_info=True)
        if found["missing_keys"] or found["mismatched_keys"]:
            raise ValueError(f"no weights of its shape for {sorted(map(str, [*found['missing_keys'], *found['mismatched_keys']]))[0]}")
    except Exception as error:                                           # a library's: each kind of damage raises another
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {folder.parent}: {folder.name} is not the {cls.__name__} of its config ({reason})") from None
    return network.to(device).eval().requires_grad_(False)


def _tokens(tokenizer, texts, length, device):
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids.to(device)


def _from_velocity(x_t, t, v):
    """v = eps - x_0 on the path x_t = (1 - t) x_0 + t eps -> x0_hat, eps_hat."""
    t = t.reshape(-1, *[1] * (x_t.dim() - 1))
    return x_t - t * v, x_t + (1 - t) * v


class Generator:
    """What the bases share. Each adds network, path, shape, __call__, embed (a few texts at a time), picture (of latents) and save."""
    initial_std, encoders, vae = 1.0, None, None

    def __init__(self, folder, device, precision, decode_batch):
        self.folder, self.device, self.precision, self.decode_batch, self.known = folder, device, precision, decode_batch, {}

    def attention(self):
        """A CPU's fused attention is slow in bfloat16, its backward takes twice the time of all the rest: there, the formula itself."""
        slow = self.precision == "bfloat16" and self.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()

    @contextmanager
    def autocast(self):
        """The precision of a forward, and its attention."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"), self.attention():
            yield

    @torch.no_grad()
    def encode(self, texts):
        """-> tuple of prompt embeddings [B, ...], float32. The empty text is the null prompt of guidance.

        Raises RuntimeError for a text that forget_text_encoders did not keep; where prompts are classes, ValueError for a text that is none."""
        unknown = [text for text in texts if text not in self.known]
        if not unknown:
            return tuple(torch.stack(found).to(self.device) for found in zip(*(self.known[text] for text in texts)))
        if self.encoders == []:
            raise RuntimeError(f"the text encoders have been forgotten, and what they made of {unknown[0]!r} was not kept")
        each = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # once, however many rollouts share it
        parts = zip(*(self.embed([*each][i:i + 64]) for i in range(0, len(each), 64)))
        return tuple(torch.cat(found).float()[[each[text] for text in texts]] for found in parts)

    def forget_text_encoders(self, texts=()):
        """Frees their memory, also that of frozen copies, and keeps what they (or a network that embeds classes itself) make of `texts`, on the CPU.

        If that is more than REMEMBERED bytes they stay instead, and encode each iteration's prompts anew."""
        texts = list(dict.fromkeys(texts))
        if self.encoders == [] or len(texts) * sum(y.nbytes for y in self.encode(texts[:1])) > REMEMBERED:
            return
        for part in (texts[i:i + 64] for i in range(0, len(texts), 64)):
            self.known.update(zip(part, zip(*(y.cpu() for y in self.encode(part)))))
        self.encoders and self.encoders.clear()                          # in place: copies share the list

    def decode(self, latents):
        """latents [B, *shape] -> pictures [B, 3, H, W] in [0, 1], float32, `decode_batch` at a time."""
        if not len(latents):                                             # a VAE cannot decode none, and a process may have none
            return self.decode(latents.new_zeros(1, *self.shape))[:0]
        return torch.cat([self.picture(z.float()).clamp(0, 1) for z in latents.split(self.decode_batch)])

    def frozen(self):
        """A copy whose network no longer learns: the reference policy of the KL."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network).requires_grad_(False)
        return twin

    def weights(self):
        """What `save` writes of the network; every process must come here if it is dealt to them (sharding.py)."""
        return merged(self.network)

    def save_pipeline(self, folder, part, weights):
        """What the base folder holds, except a whole model in one file, with the network as it is now (float32, LoRA folded in): it loads like the base."""
        copy_folder(self.folder, folder, part, "*.bin", "*.ckpt", "*.fp16*", ".git", ".cache", top="*.safetensors")
        self.network.save_config(Path(folder) / part)
        save_file(weights or self.weights(), Path(folder) / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        if absent := [name for name in named_parts(self.folder) if not (Path(folder) / name).is_dir()]:        # the safety checker of a hub id, say
            index = read_json(self.folder / "model_index.json") | dict.fromkeys(absent, [None, None])
            (Path(folder) / "model_index.json").write_text(json.dumps(index, indent=2))

    def save_own(self, folder, kind, facts, weights):
        """KIND.safetensors, the network as it is now (float32, LoRA folded in), and copies of what lies beside the base's file."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in (self.folder / name for name in BESIDE):
            if path.is_dir():
                copy_folder(path, Path(folder) / path.name)
            elif path.is_file():
                shutil.copyfile(path, Path(folder) / path.name)
        save_file(weights or self.weights(), Path(folder) / f"{kind}.safetensors", {name: str(value) for name, value in facts.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The adapters.

class StableDiffusion(Generator):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet in the latents of a VAE, one CLIP; epsilon or v-prediction."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        self.network = _part(diffusers.UNet2DConditionModel, folder / "unet", device).requires_grad_(True)
        self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
        frozen = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.encoders = [(_part(transformers.CLIPTokenizer, folder / "tokenizer"), _part(transformers.CLIPTextModel, folder / "text_encoder", device, frozen))]
        scheduler = diffusers.DDIMScheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        self.path = VP(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, offset=1)      # whatever steps_offset says, as the stock pipeline
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        self.shape = (self.network.config.in_channels, *[self.network.config.sample_size] * 2)

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            out = self.network(x_t, t.round().long(), encoder_hidden_states=prompt[0], return_dict=False)[0].float()
        alpha, sigma = (c(t).float().reshape(-1, 1, 1, 1) for c in (self.path.alpha, self.path.sigma))
        if self.velocity:                                                # v = alpha eps - sigma x_0
            return alpha * x_t - sigma * out, alpha * out + sigma * x_t
        return (x_t - sigma * out) / alpha, out

    def embed(self, texts):
        [(tokenizer, encoder)] = self.encoders
        return (encoder(_tokens(tokenizer, texts, tokenizer.model_max_length, self.device))[0],)

    def picture(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "unet", weights)


class StableDiffusion3(Generator):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and perhaps a T5, latents of a VAE, the stock scheduler's times.

    And the embedded miniature of it: one CLIP, no VAE (a latent is the picture, scaled to [-1, 1]), and evenly spaced times. The stock ones would
    end at t = 1/1000 and then 0, a step in which nothing happens; with few steps that is one wasted."""

    def __init__(self, folder, device, precision, decode_batch):
        super().__init__(folder, device, precision, decode_batch)
        diffusers, transformers = _libraries()
        self.network = _part(diffusers.SD3Transformer2DModel, folder / "transformer", device).requires_grad_(True)
        named = named_parts(folder)
        frozen = torch.bfloat16 if precision == "bfloat16" and "vae" in named else torch.float32   # the miniature's encoder is small enough
        clip, t5 = (transformers.CLIPTokenizer, transformers.CLIPTextModelWithProjection), (transformers.T5TokenizerFast, transformers.T5EncoderModel)
        self.encoders = [(_part(tokenizer, folder / f"tokenizer{n}"), _part(encoder, folder / f"text_encoder{n}", device, frozen))
                         for n, (tokenizer, encoder) in (("", clip), ("_2", clip), ("_3", t5)) if not n or f"text_encoder{n}" in named]
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        self.path = Flow(config["shift"])
        if "vae" in named:
            self.vae = _part(diffusers.AutoencoderKL, folder / "vae", device)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)

            def times(steps):
                scheduler.set_timesteps(steps)
                return scheduler.sigmas.double()
            self.path = self.path._replace(times=times)
        self.shape = (self.network.config.in_channels, *[self.network.config.sample_size] * 2)

    def __call__(self, x_t, t, prompt):
        tokens, pooled = prompt
        with self.autocast():
            v = self.network(hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False)[0]
        return _from_velocity(x_t, t, v.float())

    def embed(self, texts):
        """-> token embeddings [B, L, D], pooled embedding [B, D]."""
        length = self.encoders[0][0].model_max_length
        clips = [encoder(_tokens(tokenizer, texts, length, self.device), output_hidden_states=True) for tokenizer, encoder in self.encoders[:2]]
        if len(clips) == 1:
            return clips[0].last_hidden_state, clips[0].text_embeds
        tokens, pooled = torch.cat([clip.hidden_states[-2] for clip in clips], 2), torch.cat([clip.text_embeds for clip in clips], 1)
        more = tokens.new_zeros(len(texts), T5_TOKENS, self.network.config.joint_attention_dim)
        for tokenizer, encoder in self.encoders[2:]:
            more = encoder(_tokens(tokenizer, texts, T5_TOKENS, self.device))[0]
        return torch.cat([pad(tokens, (0, more.shape[2] - tokens.shape[2])), more], 1), pooled

    def decode(self, latents):
        return super().decode(latents) if self.vae else ((latents + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def picture(self, z):
        config = self.vae.config
        return self.vae.decode(z / config.scaling_factor + (config.shift_factor or 0), return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_pipeline(folder, "transformer", weights)


class SiT(Generator):
    """SiT (arXiv 2401.08740, sit.py) in our direction of time, 1 noise, 0 data; prompts are classes, and their embedding is what takes noise."""

    def __init__(self, file, device, precision, decode_batch):
        super().__init__(file.parent, device, precision, decode_batch)
        self.network, self.path = sit.load(file, stated_heads(file))[0].to(device), Flow()
        self.vae, self.names = _part(_libraries()[0].AutoencoderKL, self.folder / "vae", device), class_names(self.folder, self.network.num_classes)
        self.shape = self.network.shape

    guided_channels = 3                                                  # as published; the fourth latent follows the prompt alone

    def __call__(self, x_t, t, prompt):
        with self.autocast():
            v = -self.network(x_t, 1 - t, prompt[0])
        return _from_velocity(x_t, t, v.float())

    def embed(self, texts):
        return (self.network.embed(torch.tensor(class_ids(self.folder, self.names, texts, self.network.num_classes), device=self.device)),)

    def picture(self, z):
        return self.vae.decode(z / 0.18215, return_dict=False)[0] / 2 + 0.5

    def save(self, folder, weights=None):
        self.save_own(folder, "sit", {"num_heads": self.network.blocks[0].heads}, weights)


class EDM2(Generator):
    """EDM2 (arXiv 2312.02696, edm2.py); prompts are classes, and their embedding is what takes noise; the null label is zeros."""
    initial_std = 80.0                                                   # sigma_max

    def __init__(self, file, device, precision, decode_batch, guide=None):
        super().__init__(file.parent, device, precision, decode_batch)
        self.network, self.path = edm2.load(file).to(device), EDM
        self.guide_network = edm2.load(guide).to(device).requires_grad_(False) if guide else None
        self.guide = self.weaker if guide else None                      # stands in for the null prompt in `sampling.predict`
        self.vae, self.names = _part(_libraries()[0].AutoencoderKL, self.folder / "vae", device), class_names(self.folder, self.network.label_dim)
        side = int(next(iter(self.network.unet.enc)).split("x")[0])      # the first layer is called 64x64_conv
        self.shape = (len(self.network.unet.out_conv.weight), side, side)

    def __call__(self, x_t, t, prompt):
        return self.predict(self.network, x_t, t, prompt[0])

    def predict(self, network, x_t, t, embedding):
        with self.autocast():
            x0_hat = network(x_t, t, embedding=embedding).float()
        return x0_hat, (x_t - x0_hat) / t.reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def weaker(self, x_t, t, prompt):
        """The guide's prediction at the same prompt, or at none if it knows no classes."""
        return self.predict(self.guide_network, x_t, t, prompt[1] if self.guide_network.label_dim else None)

    def embed(self, texts):
        ids = torch.tensor(class_ids(self.folder, self.names, texts, self.network.label_dim), device=self.device)
        labels = one_hot(ids, self.network.label_dim + 1)[:, :-1].float()
        return tuple(network.embed(labels) for network in (self.network, self.guide_network) if network and network.label_dim)

    def picture(self, z):
        return self.vae.decode(edm2.latents_to_vae(z), return_dict=False)[0]

    def save(self, folder, weights=None):
        self.save_own(folder, "edm2", {"channels_per_head": self.network.channels_per_head}, weights)
        if self.guide_network:
            edm2.save(self.guide_network, Path(folder) / "guide.safetensors")
