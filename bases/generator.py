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
import json
import shutil
import torch
from contextlib import contextmanager
from contextlib import nullcontext
from pathlib import Path
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from bases.files import BESIDE, copy_folder, named_parts
from support.files import read_json

REMEMBERED = 8 * 2**30                                                   # bytes of prompt embeddings: 36,000 prompts of Stable Diffusion 1, 1,500 of 3.5


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
        from bases.lora import merged
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
