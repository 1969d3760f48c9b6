"""A generator of one's own, --model module:Class:PATH, and the folder that its run writes.

    generator.json        {"class": "module:Class", "path": the name of PATH in this folder}
    network.safetensors   the network as it was trained
    PATH                  a copy of it, and of what lies beside it
The class extends Generator (generator.py) and is called as Class(PATH, device, precision,
decode_batch). Its module is found as Python finds any: beside train.py, or on PYTHONPATH. A folder
names the class and never holds its code.
"""

import importlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bases.generator import Generator
from sampling import Path as GaussianPath
from support.guards import check_weights

# What a class gives: its methods, and what its instances hold.
METHODS = ("__call__", "embed", "picture")
ATTRIBUTES = {"network": torch.nn.Module, "path": GaussianPath, "shape": tuple}


def find_class(name):
    """'module:Class' -> the class. Raises ValueError, in one line, if it is no Generator."""
    module, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), class_name)
    except Exception as error:  # your module's: of any class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{name} cannot be imported ({reason}); put the module beside train.py or on PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Generator)):
        raise ValueError(f"{name} is no subclass of bases.generator.Generator; make it one")
    given = set()
    for cls in found.__mro__:
        given.update(vars(cls))
    missing = [method for method in METHODS if method not in given]
    if missing:
        raise ValueError(f"{name} has no {missing[0]}; docs/bases.md says what it returns")
    return found


def check(location):
    """Raises ValueError, in one line, if what files.locate found cannot be a generator."""
    find_class(location.plug)
    if not location.source.exists():
        raise ValueError(f"{location.source}: no such file or folder; give what the class reads")


def load(location, device, precision, decode_batch):
    """What files.locate found -> the generator, its network in float32 and in eval().

    Raises ValueError, in one line, if it lacks a part or the saved weights are not its own.
    """
    # torch computes attention without gradients by a kernel of its own, which rounds otherwise:
    # the rollout would not be the update's.
    torch.backends.mha.set_fastpath_enabled(False)
    cls = find_class(location.plug)
    model = cls(location.source, device, precision, decode_batch)
    for name, kind in ATTRIBUTES.items():
        if not isinstance(getattr(model, name, None), kind):
            raise ValueError(
                f"{location.plug}: its {name} is no {kind.__name__}; set self.{name} in __init__"
            )
    model.network.to(device, torch.float32).eval()
    if location.file:
        load_network(model.network, location.file)
    check_weights(model.network, location.source)
    return model


def load_network(network, file):
    """Copies network.safetensors into a network. Raises ValueError, in one line."""
    try:
        network.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: not the weights of this network ({reason})") from None
