"""Tensors: the weights of a network by name, read from files one at a time.

A merge asks only for a mapping name -> tensor, so a checkpoint is one of
    Weights    safetensors files as they are
    Held       a network's tensors in memory, where its file is of another kind
    LoraFile   W + scale B A, from a file of A and B (lora_files.py)
    Over       either of them, over the base that it changes
But for Held, nothing is in memory but the tensor that was asked for. A snapshot carries the
fingerprint of its base, so that it is never merged into another.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import bases
from bases.files import network_files, wrapper_of
from bases.lora_files import LoraFile, is_lora, lora_in
from support import files, processes
from support.sharding import whole

# --------------------------------------------------------------------------------------------------
# Mappings.


class Weights(Mapping):
    """The tensors of safetensors files, each read when it is asked for.

    facts: the metadata of the first file that has any. Raises ValueError for another kind of file.
    """

    def __init__(self, paths):
        self.files = {}  # {name: the open file that holds it}
        self.facts = {}
        for path in paths:
            files.check_regular(path)
            try:
                opened = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: not a safetensors file ({error})") from None
            self.facts = self.facts or dict(opened.metadata() or {})
            for name in opened.keys():
                self.files[name] = opened

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)

    def shape(self, name):
        """The shape of a tensor, which is not read."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def __iter__(self):
        return iter(sorted(self.files))

    def __len__(self):
        return len(self.files)


class Held(Mapping):
    """The tensors of a network, in memory: {name: tensor} with the interface of Weights."""

    def __init__(self, state):
        self.state = state
        self.facts = {}

    def __getitem__(self, name):
        return self.state[name]

    def shape(self, name):
        """The shape of a tensor."""
        return tuple(self.state[name].shape)

    def __iter__(self):
        return iter(sorted(self.state))

    def __len__(self):
        return len(self.state)


def open_weights(name, network=None):
    """The tensors of a model's network by name -> Weights, or Held if no safetensors hold them.

    name: as for bases.load. network: the model's own, if it is loaded already.
    """
    paths = network_files(name)
    if paths:
        return Weights(paths)
    if network is None:
        network = bases.load(name).network
    return Held(network.state_dict())


class Over(Mapping):
    """A checkpoint that changes some of a base's tensors, or all, seen under the names `names`."""

    def __init__(self, changed, base, names, facts=None):
        self.changed = changed
        self.base = base
        self.names = names
        self.facts = facts or {}

    def __getitem__(self, name):
        return self.changed[name] if name in self.changed else self.base[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


# --------------------------------------------------------------------------------------------------
# Snapshots of a run.


def fingerprint(weights):
    """A digest of a base: all names and shapes, and the numbers of some 30 tensors."""
    names = list(weights)
    digest = hashlib.sha256()
    digest.update(json.dumps([(name, weights.shape(name)) for name in names]).encode())
    step = max(1, len(names) // 30)
    for name in names[::step]:
        digest.update(weights[name].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_facts(name, network):
    """What a snapshot says of its base: the name, and the fingerprint of its weights.

    network: the base's own, before anything has changed it.
    """
    return {"base": str(name), "fingerprint": fingerprint(open_weights(name, network))}


def save_snapshots(out, iteration, trained, averages, facts, keep):
    """Writes the trained weights and their averages {length: {name: tensor}} to out/snapshots/.

    NNNNN.safetensors and NNNNN-0.050.safetensors, ...; only the last `keep` iterations stay.
    facts: those of the base. Collective: call on every process.
    """
    folder = Path(out) / "snapshots"
    facts = facts | {"iteration": str(iteration)}
    if processes.rank() == 0:
        folder.mkdir(exist_ok=True)

    save_snapshot(folder / f"{iteration:05d}.safetensors", trained, facts | {"sigma_rel": ""})
    for length, average in averages.items():
        path = folder / f"{iteration:05d}-{length:.3f}.safetensors"
        save_snapshot(path, average, facts | {"sigma_rel": str(length)})

    if processes.rank() == 0:
        snapshots = sorted(folder.glob("[0-9]*.safetensors"), key=iteration_of)
        for old in snapshots[: -keep * (1 + len(averages))]:
            old.unlink()


def save_snapshot(path, tensors, facts):
    """Writes whole float32 tensors, by the first process. Collective."""
    wholes = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
    if processes.rank() > 0:
        return
    for name, tensor in wholes.items():
        wholes[name] = tensor.float().cpu().contiguous()
    files.write_atomic(path, lambda temporary: save_file(wholes, temporary, facts))


def iteration_of(path):
    """The iteration in a snapshot's name."""
    return int(re.match(r"\d+", path.name)[0])


# --------------------------------------------------------------------------------------------------
# Checkpoints to merge.


def open_checkpoints(paths, model=""):
    """Checkpoints of one base -> its name, and a mapping of each over the same names, with facts.

    paths: models, snapshots or LoRA files. model: the base (default: what they name).
    Raises ValueError naming what does not fit.
    """
    paths = [lora_in(path) for path in paths]
    name = model or named_base(paths)
    bases.check(name)
    base = open_weights(name)
    opened = [open_checkpoint(path, base, name) for path in paths]
    check_fingerprints(paths, opened, base, name)
    for path, weights in zip(paths, opened):
        check_tensors(path, weights, base, name)

    names = sorted(set().union(*opened))
    views = []
    for path, weights in zip(paths, opened):
        facts = facts_of(path, weights)
        views.append(Over(weights, base, names, facts))
    return name, views


def is_model(path):
    """Whether a checkpoint is a whole model: a folder, or a name with a prefix."""
    return Path(path).is_dir() or (":" in path and not Path(path).exists())


def named_base(paths):
    """The base that the checkpoints name, or the first of them that is a whole model."""
    for path in paths:
        if not is_model(path):
            facts = Weights([path]).facts
            if "base" in facts:
                return facts["base"]
    for path in paths:
        if is_model(path):
            return path
    raise ValueError(f"{paths[0]}: does not say what its base is; name it with --model FOLDER")


def open_checkpoint(path, base, folder):
    """One checkpoint -> Weights, Held or LoraFile. folder: what the base is called."""
    if not is_model(path):
        weights = Weights([path])
        return LoraFile(path, weights, base) if is_lora(weights) else weights
    bases.check(path)
    weights = open_weights(path)
    in_one_only = sorted(set(weights) ^ set(base))
    if in_one_only:
        raise ValueError(f"{path}: {in_one_only[0]} is in only one of it and the base {folder}")
    return weights


def check_fingerprints(paths, opened, base, folder):
    """The checkpoints that say whose they are, are of this base."""
    marked = []
    for path, weights in zip(paths, opened):
        if "fingerprint" in weights.facts:
            marked.append((path, weights.facts))
    if not marked:
        return
    mark = fingerprint(base)
    for path, facts in marked:
        if facts["fingerprint"] != mark:
            other = facts.get("base", "unnamed")
            raise ValueError(f"{path}: was made from another base than {folder} ({other})")


def check_tensors(path, weights, base, folder):
    """A checkpoint holds something, and its tensors have the names and shapes of the base."""
    if not len(weights):
        raise ValueError(f"{path}: holds no tensor")
    wrapper = wrapper_of(weights)
    if wrapper:
        raise ValueError(
            f"{path}: all its names begin with {wrapper}; save it from the unwrapped model"
        )
    for name in weights:
        if name not in base:
            raise ValueError(f"{path}: {name} is not in the base {folder}")
        if weights.shape(name) != base.shape(name):
            raise ValueError(
                f"{path}: {name} has the shape {weights.shape(name)}, "
                f"the base {folder} {base.shape(name)}"
            )


def facts_of(path, weights):
    """What a checkpoint says of itself, or its name: NNNNN-0.050 is an average, ours or EDM2's."""
    facts = weights.facts
    named = re.search(r"(\d+)-(0\.\d+)(?:\.|$)", Path(path).name)
    if named and not facts.get("sigma_rel"):
        facts = {"iteration": named[1], "sigma_rel": named[2]}
    if facts.get("sigma_rel"):
        check_average(path, facts.get("iteration"), facts["sigma_rel"])
    return facts


def check_average(path, iteration, sigma_rel):
    """Raises ValueError unless an average's iteration and length, as texts, are such numbers."""
    try:
        is_right = 0 < float(iteration) < math.inf and 0 < float(sigma_rel) < 0.288
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"{path}: says that it is the average {str(sigma_rel)[:99]} of iteration "
            f"{str(iteration)[:99]}; expected 0 to 0.288 of 1 or more"
        )


# --------------------------------------------------------------------------------------------------
# Names and networks.


def block_of(name):
    """The block that a parameter belongs to: its name up to the first number, or "rest".

    >>> block_of("transformer_blocks.3.attn.to_q.weight"), block_of("pos_embed.weight")
    ('transformer_blocks.3', 'rest')
    """
    found = re.match(r"(.*?\.(?:\d+|\d+x\d+_\w+))\.", name)  # blocks.3, or EDM2's 64x64_block0
    return found[1] if found else "rest"


@torch.no_grad()
def put(network, tensors):
    """Copies tensors, by name, into a network's parameters and buffers."""
    for name, own in network.state_dict(keep_vars=True).items():
        if name in tensors:
            own.copy_(tensors[name])
