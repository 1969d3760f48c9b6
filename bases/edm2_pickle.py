"""The safe reader of EDM2 snapshots."""
import io
import math
import pickle
import pickletools
import torch

SIGMA_DATA, LABEL_BALANCE, CONCAT_BALANCE, RESIDUAL_BALANCE, CLIP = 0.5, 0.5, 0.5, 0.3, 256
DTYPES = {"torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16, "torch.FloatStorage": torch.float32}
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
ADMITTED = {PERSISTENT, "dnnlib.util.EasyDict", "collections.OrderedDict", "torch.nn.modules.container.ModuleDict", "torch.device",
            "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes", "numpy.ndarray",
            "numpy.dtype", "_codecs.encode"} | {f"numpy.{core}.{name}" for core in ("core", "_core") for name in
                                                ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")}
FIXED = {"sigma_data": SIGMA_DATA, "label_balance": LABEL_BALANCE, "concat_balance": CONCAT_BALANCE, "res_balance": RESIDUAL_BALANCE,
         "attn_balance": RESIDUAL_BALANCE, "clip_act": CLIP, "resample_filter": [1, 1]}       # what the network above takes for granted


class Inert(dict):
    """Stands for a global of the pickle, `origin`, and for what calling it with `args` would make; a dict, as the pickle may set items."""
    origin, args = None, ()

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


def _unpickle(file, admitted):
    """The next pickle of a binary file, with an Inert for every global. Raises whatever a damaged or hostile pickle makes pickle raise."""
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" not in admitted:
                raise ValueError(f"it asks for {module}.{name}, which no snapshot needs")
            return type("Inert", (Inert,), {"origin": f"{module}.{name}"})

        persistent_load = staticmethod(lambda pid: pid)                  # a storage's bytes have it in place of the storage

    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):                 # reads, runs nothing
        if opcode.name.startswith("EXT") or opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > 1_000_000:
            raise ValueError(f"it holds {opcode.name} {argument}, which no snapshot needs")     # memo slot 2^31: ten bytes that take 32 GB
    file.seek(start)
    return Unpickler(file).load()


def _tensor(node):
    """The tensor of a node. A storage's bytes are five pickles (magic number, version, system, storage, keys), a count and the data."""
    node = node.args[0] if node.origin == "torch._utils._rebuild_parameter" else node
    storage, offset, size, stride = node.args[:4]
    if (node.origin, storage.origin) != ("torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"):
        raise ValueError(f"a weight is made by {node.origin} from {storage.origin}")
    file = io.BytesIO(storage.args[0])
    kind = [_unpickle(file, DTYPES) for _ in range(5)][3][1]             # the storage is ("storage", its class, key, device, count, ...)
    dtype, count, data = DTYPES[kind.origin], int.from_bytes(file.read(8), "little"), bytearray(file.read())
    if len(data) != count * dtype.itemsize or not 0 < math.prod(size) <= count:
        raise ValueError("a tensor and its storage differ in size")      # a stride of 0 could ask for any amount of memory
    return torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset).contiguous().clone()     # raises if it leaves the storage


def _collect(module, prefix, state, heads, seen):
    """Adds a pickled module's tensors to `state` under their published names, and the widths of its attention heads to `heads`."""
    if id(module) in seen:
        raise ValueError(f"{prefix[:-1]} is shared or contains itself")  # else a small file could unfold to an endless one
    seen.add(id(module))
    fields = module.args[0]["state"] if module.origin == PERSISTENT else module.state
    for name, value in FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{prefix}{name} is not {value}, the only value built here")
    for name, node in [*fields["_parameters"].items(), *fields["_buffers"].items()]:
        if node is not None and name not in fields["_non_persistent_buffers_set"]:
            state[prefix + name] = _tensor(node)
    for name, child in fields["_modules"].items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", state, heads, seen)
    if "attn_qkv" in fields["_modules"]:
        heads.add(state[f"{prefix}attn_qkv.weight"].shape[1] // fields["num_heads"])


def read_pickle(path):
    """The state dict of a released snapshot: check(path)[0]."""
    from bases.edm2 import check
    return check(path)[0]
