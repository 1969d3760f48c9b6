"""Models: the base generators behind one small interface, which is all that the algorithm knows of them.

    model(x_t, t, prompt) -> (x0_hat, eps_hat)     the prediction; prompt is what encode returned; differentiable in model.network
    model.encode(texts) -> tuple of [B, ...]       prompt embeddings, frozen        model.path      its Gaussian path (sampling.py)
    model.decode(latents) -> [B, 3, H, W]          pictures in [0, 1]               model.shape     of one latent
    model.network                                  the module that is trained       model.save(folder)   writes a folder that `load` reads
    model.folder                                   the files it came from           model.frozen()  the same model with its weights of now
Here: Stable Diffusion 3 in pixel space, the embedded default. `check` looks at the files without loading a weight.
"""
import copy
import json
import shutil
from pathlib import Path

import torch

from sampling import Flow

PARTS = {"transformer": ("config.json", "diffusion_pytorch_model.safetensors"), "text_encoder": ("config.json", "model.safetensors"),
         "tokenizer": ("tokenizer.json",), "scheduler": ("scheduler_config.json",)}


def check(name):
    """Raises ValueError, in one line, if `name` is not a model that `load` can read. Returns its folder."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"--model {name}: no such folder; build the default with experiments/build_tiny.py or give a diffusers folder")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        kind = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--model {name}: no readable model_index.json with a _class_name, so this is not a diffusers folder") from None
    if kind != "StableDiffusion3Pipeline" or index.get("vae", [None])[0] is not None:
        raise ValueError(f"--model {name}: holds a {kind}; known here: StableDiffusion3Pipeline in pixel space (no vae), as in assets/tiny")
    for part, files in PARTS.items():
        for file in files:
            path = folder / part / file
            if not path.is_file():
                raise ValueError(f"--model {name}: {part}/{file} is missing; the folder is incomplete")
            if file.endswith(".json"):
                _check_json(name, path)
            else:
                _check_safetensors(name, path)
    if "shift" not in json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")):
        raise ValueError(f"--model {name}: scheduler/scheduler_config.json has no shift, so this is not the scheduler of a flow")
    return folder


def _check_json(name, path):
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--model {name}: {path.name} in {path.parent.name} is not JSON ({error})") from None


def _check_safetensors(name, path):
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt"):                                      # reads the header and compares it with the file's size
            pass
    except SafetensorError as error:
        raise ValueError(f"--model {name}: {path.name} in {path.parent.name} is damaged ({error})") from None


def network_files(folder):
    """The safetensors files of the network that is trained: what a merge reads."""
    return [Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors"]


def load(name, device="cpu", precision="float32"):
    """Loads a model for training: weights in float32, forwards under bfloat16 autocast if precision says so."""
    return StableDiffusion3(check(name), torch.device(device), precision)


class StableDiffusion3:
    """Stable Diffusion 3 (arXiv 2403.03206) with one CLIP text encoder and no VAE: a latent is the picture, scaled to [-1, 1]."""

    def __init__(self, folder, device, precision):
        import diffusers                                                 # here, so that a bad flag is answered in a second
        import transformers
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        self.folder, self.device, self.precision = folder, device, precision
        self.network = diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32).to(device).eval()
        encoder = transformers.CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
        self.text_encoder = encoder.to(device).eval()
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.path = Flow(json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"])
        self.shape = (self.network.config.in_channels, *[self.network.config.sample_size] * 2)

    def __call__(self, x_t, t, prompt):
        tokens, pooled = prompt
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            v = self.network(hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=tokens, pooled_projections=pooled,
                             return_dict=False)[0].float()
        t = t.reshape(-1, *[1] * (x_t.dim() - 1))
        return x_t - t * v, x_t + (1 - t) * v                            # v = eps - x_0 on the path x_t = (1-t) x_0 + t eps

    @torch.no_grad()
    def encode(self, texts):
        """-> (token embeddings [B, L, D], pooled embedding [B, D]), float32. The empty text is the null prompt of guidance."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(self.device)
        out = self.text_encoder(ids)
        return out.last_hidden_state, out.text_embeds

    def decode(self, latents):
        return ((latents + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def frozen(self):
        """A copy whose network no longer learns: the reference policy of the KL."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network).requires_grad_(False)
        return twin

    def save(self, folder):
        """Everything the base folder holds, with the network as it is now (float32), so that the result loads like the base."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        self.network.save_pretrained(Path(folder) / "transformer")
