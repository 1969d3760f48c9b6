"""A safe reader of EDM2's released snapshots: read_pickle(path) -> state dict.

A snapshot is a pickle of objects that carry their own source text and run it when they are loaded
in the usual way. Here every global that the pickle names becomes an inert class, which remembers
its arguments and does nothing; so there is no call that a hostile file could make. The tree of
objects is then walked for its tensors. Left out on purpose: the rest of a snapshot (encoder,
dataset), and names that no snapshot needs: a file that asks for one is refused.
"""

import io
import math
import pickle
import pickletools

import torch

# The constants of every released network. bases.edm2 computes with them.
SIGMA_DATA = 0.5
LABEL_BALANCE = 0.5
CONCAT_BALANCE = 0.5
RESIDUAL_BALANCE = 0.3
CLIP = 256

# What a snapshot calls them. A snapshot with another value is another network.
FIXED = {
    "sigma_data": SIGMA_DATA,
    "label_balance": LABEL_BALANCE,
    "concat_balance": CONCAT_BALANCE,
    "res_balance": RESIDUAL_BALANCE,
    "attn_balance": RESIDUAL_BALANCE,
    "clip_act": CLIP,
    "resample_filter": [1, 1],
}

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
PARAMETER = "torch._utils._rebuild_parameter"
TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"

# The globals that snapshots name; numpy 1 wrote numpy.core where numpy 2 writes numpy._core.
ADMITTED = {
    PERSISTENT,
    PARAMETER,
    TENSOR,
    STORAGE,
    "dnnlib.util.EasyDict",
    "collections.OrderedDict",
    "torch.nn.modules.container.ModuleDict",
    "torch.device",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "_codecs.encode",
}

# The only globals within the bytes of a storage.
DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
}

LARGEST_MEMO = 1_000_000

# --------------------------------------------------------------------------------------------------
# A pickle as inert objects.


class Inert(dict):
    """Stands for a global of the pickle, and for what calling it with `args` would make.

    It is a dict because the pickle may set items on it.
    """

    origin = None  # the name of the global
    args = ()

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class InertUnpickler(pickle.Unpickler):
    """Finds an Inert class in place of every admitted global, and refuses the others."""

    def __init__(self, file, admitted):
        super().__init__(file)
        self.admitted = admitted

    def find_class(self, module, name):
        origin = f"{module}.{name}"
        if origin not in self.admitted:
            raise ValueError(f"it asks for {origin}, which no snapshot needs")
        return type("Inert", (Inert,), {"origin": origin})

    def persistent_load(self, key):
        """A storage's bytes hold a key in place of the storage; the key will do."""
        return key


def check_opcodes(file):
    """Raises ValueError for an opcode that is dangerous before any global is found.

    EXT1, EXT2 and EXT4 name a global by a number, which find_class never sees. A memo slot of 2^31
    is ten bytes of a file that take 32 GB of memory.
    """
    for opcode, argument, _ in pickletools.genops(file):  # reads only
        is_extension = opcode.name.startswith("EXT")
        is_memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if is_extension or (is_memo and argument > LARGEST_MEMO):
            raise ValueError(f"it holds {opcode.name} {argument}, which no snapshot needs")


def unpickle(file, admitted):
    """The next pickle of a binary file, in inert objects.

    Raises whatever a damaged or hostile pickle makes pickle raise.
    """
    start = file.tell()
    check_opcodes(file)
    file.seek(start)
    return InertUnpickler(file, admitted).load()


# --------------------------------------------------------------------------------------------------
# Inert objects as tensors.


def read_storage(content):
    """The bytes of a storage, as torch wrote them -> dtype, number of elements, data.

    They are five pickles (magic number, version, system, storage, keys), a count and the data.
    """
    file = io.BytesIO(content)
    pickles = [unpickle(file, DTYPES) for _ in range(5)]
    storage_class = pickles[3][1]  # the fourth is ("storage", class, key, device, count, ...)
    dtype = DTYPES[storage_class.origin]
    count = int.from_bytes(file.read(8), "little")
    data = bytearray(file.read())
    if len(data) != count * dtype.itemsize:
        raise ValueError("a tensor and its storage differ in size")
    return dtype, count, data


def tensor_of(node):
    """The tensor of an inert object that stands for a parameter or a tensor."""
    if node.origin == PARAMETER:
        node = node.args[0]
    storage, offset, size, stride = node.args[:4]
    if node.origin != TENSOR or storage.origin != STORAGE:
        raise ValueError(f"a weight is made by {node.origin} from {storage.origin}")
    dtype, count, data = read_storage(storage.args[0])
    # A stride of 0 could ask for any amount of memory.
    if not 0 < math.prod(size) <= count:
        raise ValueError("a tensor and its storage differ in size")
    elements = torch.frombuffer(data, dtype=dtype)
    view = elements.as_strided(size, stride, offset)  # raises if it leaves the storage
    return view.contiguous().clone()


class Collector:
    """Walks an inert network, and collects its tensors and the widths of its attention heads."""

    def __init__(self):
        self.state = {}  # {published name: tensor}
        self.head_widths = set()
        self.visited = set()  # ids of modules

    def visit(self, module, prefix=""):
        """Takes in a module, whose tensors' names begin with `prefix`, and those below it."""
        # Shared modules could make a small file unfold to an endless network.
        if id(module) in self.visited:
            raise ValueError(f"{prefix[:-1]} is shared or contains itself")
        self.visited.add(id(module))
        if module.origin == PERSISTENT:
            fields = module.args[0]["state"]
        else:
            fields = module.state

        for name, value in FIXED.items():
            if fields.get(name, value) != value:
                raise ValueError(f"{prefix}{name} is not {value}, the only value built here")
        for name, node in [*fields["_parameters"].items(), *fields["_buffers"].items()]:
            if node is not None and name not in fields["_non_persistent_buffers_set"]:
                self.state[prefix + name] = tensor_of(node)
        for name, child in fields["_modules"].items():
            if child is not None:
                self.visit(child, f"{prefix}{name}.")

        if "attn_qkv" in fields["_modules"]:
            channels = self.state[f"{prefix}attn_qkv.weight"].shape[1]
            self.head_widths.add(channels // fields["num_heads"])


def read_snapshot(path):
    """The averaged network ("ema") of a snapshot -> its state dict, the widths of its heads.

    The widths are a set, of one number if all is well. Raises whatever a damaged file raises.
    """
    collector = Collector()
    with open(path, "rb") as file:
        collector.visit(unpickle(file, ADMITTED)["ema"])
    return collector.state, collector.head_widths


def read_pickle(path):
    """The state dict of a released snapshot, {published name: tensor in the file's dtype}.

    Whether it is an EDM2 network is for bases.edm2.check to say. Raises ValueError, in one line,
    for a file that cannot be read.
    """
    try:
        state, _ = read_snapshot(path)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise unreadable(path, error) from None
    return state


def unreadable(path, error):
    """The one-line ValueError for a file that raised `error`."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    reason = reason.removeprefix("ValueError: ")[:200]
    return ValueError(
        f"{path}: not an EDM2 network that can be read here ({reason}); "
        "give a released snapshot, fetched anew"
    )
