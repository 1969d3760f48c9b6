"""Weights: the tensors of a network by name, read from files one at a time: whole models, snapshots of a run, LoRA files.

A mapping name -> tensor is all that a merge asks for, so a checkpoint is one of
    Weights   safetensors files as they are        Lora   W + alpha / r B A, from a file of A and B
    Over      either of them, over the base that it changes
and nothing is in memory but the tensor that was asked for. A snapshot carries its base's fingerprint, so that it is never merged into another.
Below them, the averages whose weights are powers of time, from which an average of any other length can be made afterwards (post-hoc EMA).
Left out: files that are not safetensors (edm2.read_pickle and sit.load make a state dict of theirs).
"""
import hashlib
import json
import math
import re
import torch
from collections.abc import Mapping
from pathlib import Path
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import save_file
import bases
from bases import files as base_files
from support import files
from support import processes
from support.sharding import whole

class Weights(Mapping):
    """The tensors of safetensors files, each read when it is asked for; `facts` is the first file's metadata. Raises ValueError, in one line."""

    def __init__(self, files):
        self.files, self.facts = {}, {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file}: not a safetensors file ({error})") from None
            self.facts = self.facts or dict(opened.metadata() or {})
            self.files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)

    def shape(self, name):
        return tuple(self.files[name].get_slice(name).get_shape())

    def __iter__(self):
        return iter(sorted(self.files))

    def __len__(self):
        return len(self.files)


class Over(Mapping):
    """A checkpoint that changes some of a base's tensors, or holds them all; seen under the names `names`."""

    def __init__(self, changed, base, names):
        self.changed, self.base, self.names = changed, base, names

    def __getitem__(self, name):
        return self.changed[name] if name in self.changed else self.base[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


class Lora(Mapping):
    """The tensors that a LoRA file changes: W + alpha / r B A. Names as diffusers and peft write them: [part.]layer.lora_A.weight."""

    def __init__(self, file, base):
        self.file, self.base, self.facts = file, base, file.facts
        self.prefix = {n if n + ".weight" in base else re.sub(r"^(transformer|unet)\.", "", n): n
                       for n in (n.removesuffix(".lora_A.weight") for n in file if n.endswith(".lora_A.weight"))}

    def __getitem__(self, name):
        layer = self.prefix[name.removesuffix(".weight")]
        down, up = self.file[layer + ".lora_A.weight"].float(), self.file[layer + ".lora_B.weight"].float()
        alpha = self.file[layer + ".alpha"].item() if layer + ".alpha" in self.file else len(down)
        change = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        return self.base[name].float() + change.reshape(self.base.shape(name))

    def shape(self, name):
        layer = self.prefix[name.removesuffix(".weight")]
        up, down = self.file.shape(layer + ".lora_B.weight"), self.file.shape(layer + ".lora_A.weight")
        whole = self.base.shape(name) if name in self.base else ()
        return whole if (up[0], up[1], math.prod(down[1:])) == (whole[0], down[0], math.prod(whole[1:])) else (up[0], *down, up[1])

    def __iter__(self):
        return iter(sorted(layer + ".weight" for layer in self.prefix))

    def __len__(self):
        return len(self.prefix)


def fingerprint(weights):
    """A digest of a base: all names and shapes, and the numbers of some 30 tensors, so that a snapshot knows whose it is."""
    names, digest = list(weights), hashlib.sha256()
    digest.update(json.dumps([(n, weights.shape(n)) for n in names]).encode())
    for name in names[::max(1, len(names) // 30)]:
        digest.update(weights[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_snapshots(out, iteration, weights, averages, base, keep):
    """out/snapshots/NNNNN.safetensors, the raw trained weights, and NNNNN-0.050.safetensors for each average; only the last `keep` stay."""
    first, folder = processes.rank() == 0, Path(out) / "snapshots"
    facts = {"base": str(base), "fingerprint": fingerprint(Weights(base_files.network_files(base))), "iteration": str(iteration)} if first else {}
    for suffix, tensors, length in (("", weights, ""), *((f"-{s:.3f}", average, str(s)) for s, average in averages.items())):
        tensors = {n: whole(p.detach()) for n, p in tensors.items()}     # every process must come here
        if first:
            folder.mkdir(exist_ok=True)
            tensors = {n: t.float().cpu().contiguous() for n, t in tensors.items()}
            files.write_atomic(folder / f"{iteration:05d}{suffix}.safetensors", lambda path: save_file(tensors, path, facts | {"sigma_rel": length}))
    for old in () if not first else sorted(folder.glob("[0-9]*.safetensors"), key=lambda path: int(re.match(r"\d+", path.name)[0]))[:-keep * (1 + len(averages))]:
        old.unlink()


def open_checkpoints(paths, model=""):
    """-> the base's folder, and a mapping of each checkpoint over the same names, with .facts. Raises ValueError naming what does not fit."""
    opened = [None if Path(p).is_dir() else Weights([p]) for p in paths]
    named = [w.facts["base"] for w in opened if w and "base" in w.facts]
    folder = model or next(iter(named), next((p for p, w in zip(paths, opened) if w is None), ""))
    if not folder:
        raise ValueError(f"{paths[0]}: does not say what its base is; name it with --model FOLDER")
    bases.check(folder)
    base, mark = Weights(base_files.network_files(folder)), None
    for k, path in enumerate(paths):
        if opened[k] is None:
            opened[k] = Weights(base_files.network_files(bases.check(path)))
            if odd := sorted({*opened[k]} ^ {*base}):
                raise ValueError(f"{path}: {odd[0]} is in only one of it and the base {folder}")
        elif any(name.endswith(".lora_A.weight") for name in opened[k]):
            opened[k] = Lora(opened[k], base)
        if "fingerprint" in opened[k].facts:
            mark = mark or fingerprint(base)
            if opened[k].facts["fingerprint"] != mark:
                raise ValueError(f"{path}: was made from another base than {folder} ({opened[k].facts.get('base', 'unnamed')})")
        if not len(opened[k]):
            raise ValueError(f"{path}: holds no tensor")
        for name in opened[k]:
            if name not in base:
                raise ValueError(f"{path}: {name} is not in the base {folder}")
            if isinstance(opened[k], Lora):
                layer = opened[k].prefix[name.removesuffix(".weight")]
                if layer + ".lora_B.weight" not in opened[k].file:
                    raise ValueError(f"{path}: {name} has a lora_A without its lora_B")
                if layer + ".alpha" in opened[k].file and math.prod(opened[k].file.shape(layer + ".alpha")) != 1:
                    raise ValueError(f"{path}: {layer}.alpha has the shape {opened[k].file.shape(layer + '.alpha')}, and is one number")
            if opened[k].shape(name) != base.shape(name):
                raise ValueError(f"{path}: {name} has the shape {opened[k].shape(name)}, the base {folder} {base.shape(name)}")
    names = sorted(set().union(*opened))
    views = [Over(weights, base, names) for weights in opened]
    for view, weights, path in zip(views, opened, paths):
        found = re.search(r"(\d+)-(0\.\d+)(?:\.|$)", Path(path).name)          # a file of ours or of EDM2, or a folder named like it
        view.facts = {"iteration": found[1], "sigma_rel": found[2]} if found and not weights.facts.get("sigma_rel") else weights.facts
        if view.facts.get("sigma_rel"):
            check_average(path, view.facts.get("iteration"), view.facts["sigma_rel"])
    return Path(folder), views


def check_average(path, iteration, sigma_rel):
    """Raises ValueError if what an average says of itself, in words, is no iteration and no length."""
    try:
        right = 0 < float(iteration) < math.inf and 0 < float(sigma_rel) < 0.288
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{path}: says that it is the average {str(sigma_rel)[:99]} of iteration {str(iteration)[:99]}; expected 0 to 0.288 of 1 or more")


def block_of(name):
    """The block that a parameter belongs to: its name up to the first part that is a number, or "rest"."""
    found = re.match(r"(.*?\.(?:\d+|\d+x\d+_\w+))\.", name)            # blocks.3, or EDM2's 64x64_block0
    return found[1] if found else "rest"


def put(network, tensors):
    """Copies tensors, by name, into a network's parameters and buffers."""
    with torch.no_grad():
        for name, own in network.state_dict(keep_vars=True).items():
            if name in tensors:
                own.copy_(tensors[name])
