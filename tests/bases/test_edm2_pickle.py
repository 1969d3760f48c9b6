"""Snapshots of EDM2: honest ones, damaged ones and hostile ones."""

import builtins
import importlib
import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_edm2 import MORE, SMALL, WIDE, build, inputs

from bases import edm2, edm2_pickle
from bases.edm2_pickle import read_pickle

# --------------------------------------------------------------------------------------------------
# Pickles of the released structure, with stand-ins for the two packages that they name.


class Persistent:
    """What a released snapshot has in place of each of its own modules."""

    def __init__(self, class_name, state):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit('module_src has run')",
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Reduce:
    """Pickles as a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


PERSISTENCE_SOURCE = """
def _reconstruct_persistent_obj(meta):
    exec(meta["module_src"], {})
    return meta
"""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """torch_utils.persistence, which runs what it is given, and dnnlib.util."""
    for package, module in (("torch_utils", "persistence"), ("dnnlib", "util")):
        parent = types.ModuleType(package)
        child = types.ModuleType(f"{package}.{module}")
        setattr(parent, module, child)
        monkeypatch.setitem(sys.modules, package, parent)
        monkeypatch.setitem(sys.modules, f"{package}.{module}", child)
    exec(PERSISTENCE_SOURCE, sys.modules["torch_utils.persistence"].__dict__)
    exec("class EasyDict(dict):\n    pass", sys.modules["dnnlib.util"].__dict__)


def module_state(parameters=(), buffers=(), modules=()):
    """The attributes of a torch module, as a pickle has them."""
    state = {"training": False}
    state["_parameters"] = dict(parameters)
    state["_buffers"] = dict(buffers)
    state["_non_persistent_buffers_set"] = set()
    for hooks in ("_backward_hooks", "_forward_hooks", "_state_dict_hooks"):
        state[hooks] = OrderedDict()
    state["_modules"] = dict(modules)
    state["_init_args"] = ()
    return state


def unchanged(name, tensor):
    return tensor


def pickled_module(network, prefix, change, constants):
    """The module of a network whose tensors' names begin with `prefix`, and those below it."""
    parameters = {}
    buffers = {}
    children = {}
    for name, tensor in network.state_dict().items():
        if not name.startswith(prefix):
            continue
        child, dot, _ = name.removeprefix(prefix).partition(".")
        if dot:
            children[child] = None
        elif child in ("freqs", "phases"):
            buffers[child] = change(name, tensor)
        else:
            parameters[child] = torch.nn.Parameter(change(name, tensor))
    for child in children:
        children[child] = pickled_module(network, f"{prefix}{child}.", change, constants)
    state = module_state(parameters, buffers, children)

    if prefix in ("unet.enc.", "unet.dec."):  # these two are torch's own
        container = torch.nn.ModuleDict()
        container.__dict__["_modules"] = state["_modules"]
        return container
    if "conv_res0" in children:
        heads = 0
        if "attn_qkv" in children:
            qkv = network.state_dict()[f"{prefix}attn_qkv.weight"]
            heads = qkv.shape[1] // network.channels_per_head
        state |= {"num_heads": heads, "flavor": "enc", "resample_filter": [1, 1], "dropout": 0.1}
        state |= {"res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256}
    if prefix == "":
        state |= {"img_resolution": 8, "use_fp16": True, "sigma_data": 0.5}
    for name, value in constants.items():
        if name in state:
            state[name] = value
    return Persistent("Module", state)


def snapshot(network, change=unchanged, **constants):
    """The object tree of a released snapshot; change(name, tensor) is what it has for a tensor."""
    encoder = {
        "scale": np.float32([0.1, 0.2]),
        "bias": np.float64([3]),
        "batch": np.int64(8),
        "device": torch.device("cpu"),
    }
    return {
        "ema": pickled_module(network, "", change, constants),
        "encoder": Persistent("Encoder", encoder),
        "dataset_kwargs": sys.modules["dnnlib.util"].EasyDict(path="x"),
    }


def write(path, content, protocol=4):
    """A file of these bytes, or of the pickle of this object."""
    if not isinstance(content, bytes):
        content = pickle.dumps(content, protocol)
    path.write_bytes(content)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.pkl"


def refused(path):
    """The one line with which check and load refuse a file; it names the file."""
    messages = []
    for function in (edm2.check, edm2.load):
        with pytest.raises(ValueError) as error:
            function(path)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{path}: ") and "give" in messages[0]
    assert len(messages[0].splitlines()) == 1
    return messages[0]


def unread(path):
    """The same line, from read_pickle too: the file cannot even be read."""
    message = refused(path)
    with pytest.raises(ValueError) as error:
        read_pickle(path)
    assert str(error.value) == message
    return message


# --------------------------------------------------------------------------------------------------
# Honest snapshots.


@pytest.mark.parametrize(
    "arguments, protocol",
    [(SMALL, 4), (WIDE, 5), (MORE, 4)],
    ids=["small", "wide", "more"],
)
def test_a_snapshot_gives_its_state_dict_and_its_arguments(path, arguments, protocol):
    network = build(arguments)
    expected = network.state_dict()
    write(path, snapshot(network), protocol)
    state = read_pickle(path)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert edm2.check(path)[1] == arguments
    loaded = edm2.load(path)
    assert loaded.channels_per_head == arguments["channels_per_head"]
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(*inputs(arguments)), network(*inputs(arguments)))


def test_every_float_type_is_read_and_becomes_float32(path):
    network = build()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):

        def as_dtype(name, tensor, dtype=dtype):
            return tensor.to(dtype)

        write(path, snapshot(network, as_dtype))
        state = read_pickle(path)
        loaded = edm2.load(path).state_dict()
        for name, tensor in network.state_dict().items():
            assert state[name].dtype == dtype and torch.equal(state[name], tensor.to(dtype))
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], tensor.to(dtype).float())


def odd_strides(name, tensor):
    """The same tensor with other strides, or half-way in its storage."""
    if tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if tensor.dim() == 4 and "res0" in name:
        return tensor.to(memory_format=torch.channels_last)
    if tensor.dim() == 4:
        before = torch.full((tensor.numel(),), 9.0)
        storage = torch.cat([before, tensor.flatten()])
        return storage[tensor.numel() :].view(tensor.shape)
    return tensor


def test_strides_and_offsets_of_the_file_are_followed(path):
    network = build()
    state = read_pickle(write(path, snapshot(network, odd_strides)))
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].is_contiguous(), name


def test_none_and_non_persistent_entries_are_no_part_of_the_state_dict(path):
    tree = snapshot(build())
    top = tree["ema"].meta["state"]
    top["_buffers"] |= {"scratch": torch.zeros(3), "nothing": None}
    top["_parameters"]["bias"] = None
    top["_modules"]["absent"] = None
    top["_non_persistent_buffers_set"].add("scratch")
    assert read_pickle(write(path, tree)).keys() == build().state_dict().keys()
    top["_non_persistent_buffers_set"].clear()
    assert "scratch has shape [3], and None" in refused(write(path, tree))


def test_the_top_may_be_an_easydict(path):
    tree = sys.modules["dnnlib.util"].EasyDict(snapshot(build()))
    assert read_pickle(write(path, tree)).keys() == build().state_dict().keys()


def test_arrays_of_either_numpy_are_passed_over(path, monkeypatch):
    """numpy 1 wrote numpy.core where numpy 2 writes numpy._core."""
    old = types.ModuleType("numpy.core.multiarray")
    exec("def _reconstruct(*args):\n    raise SystemExit", old.__dict__)
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", old)
    state = (1, (2,), np.dtype("f4"), False, b"12345678")
    array = Reduce(old._reconstruct, (np.ndarray, (0,), b"b"), state)
    tree = beside([array, np.ones(3), np.float64(2), np.ones((4, 3)).T])
    assert read_pickle(write(path, tree)).keys() == build().state_dict().keys()


def test_a_snapshot_with_other_constants_is_refused(path):
    others = {
        "sigma_data": 1.0,
        "res_balance": 0.5,
        "attn_balance": 0.1,
        "clip_act": None,
        "resample_filter": [1, 3, 3, 1],
    }
    for name, value in others.items():
        assert f"{name} is not" in unread(write(path, snapshot(build(), **{name: value})))


def test_a_snapshot_of_another_architecture_is_refused(path):
    layer = Persistent("Conv", module_state({"weight": torch.nn.Parameter(torch.ones(2))}))
    tree = {"ema": Persistent("SongUNet", module_state(modules={"map": layer}))}
    write(path, tree)
    assert read_pickle(path).keys() == {"map.weight"}  # it can be read
    assert "names are not those of EDM2" in refused(path)


# --------------------------------------------------------------------------------------------------
# Hostile files. `marker` is what they would leave behind. Where a call is hidden, the usual loader
# is shown to make it.


@pytest.fixture
def marker(tmp_path):
    """A file that no test may make."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def touch(marker):
    return Reduce(os.system, (f"touch '{marker}'",))


def at_top(evil):
    return {"ema": evil}


def beside(evil):
    return snapshot(build()) | {"encoder": evil}


def among_the_weights(evil):
    tree = snapshot(build())
    tree["ema"].meta["state"]["_parameters"]["extra"] = evil
    return tree


def in_place_of_an_attribute(evil):
    tree = snapshot(build())
    tree["ema"].meta["state"]["training"] = [{"deep": (evil,)}]
    return tree


@pytest.mark.parametrize("place", [at_top, beside, among_the_weights, in_place_of_an_attribute])
def test_a_call_is_refused_by_its_name_wherever_it_is(path, marker, place):
    assert "asks for posix.system" in unread(write(path, place(touch(marker))))


def test_every_call_is_refused_by_its_name(path, marker):
    statement = f"open({str(marker)!r}, 'w')"
    module = Reduce(importlib.import_module, ("os",))
    calls = {
        "builtins.eval": (builtins.eval, (statement,)),
        "builtins.exec": (builtins.exec, (statement,)),
        "io.open": (open, (str(marker), "w")),
        "builtins.getattr": (getattr, (module, "system")),
        "subprocess.Popen": (subprocess.Popen, (["touch", str(marker)],)),
        "torch.serialization.load": (torch.load, (str(marker),)),
        "torch.hub.load": (torch.hub.load, (str(marker), "x")),
        "numpy.save": (np.save, (str(marker), 1)),
    }
    for name, call in calls.items():
        assert f"asks for {name}" in unread(write(path, at_top(Reduce(*call))))


def storage_of(tensor):
    """The bytes of a tensor's storage, as torch writes them into a pickle."""
    return tensor._typed_storage().__reduce__()[1][0]


def storage_with(evil, place):
    """The bytes of a real storage with `evil` in place of one of its five pickles."""
    stream = io.BytesIO(storage_of(torch.ones(3)))
    parts = []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(stream.getvalue()[start : stream.tell()])
    parts[place] = pickle.dumps(evil, 2)
    return b"".join(parts) + stream.read()


def tensor_of(content, size=(3,), stride=(1,), offset=0):
    """A snapshot with one more weight: the bytes of its storage, and how to look at them."""
    storage = Reduce(torch.storage._load_from_bytes, (content,))
    args = (storage, offset, size, stride, False, OrderedDict())
    return among_the_weights(Reduce(torch._utils._rebuild_tensor_v2, args))


def test_a_call_inside_the_bytes_of_a_storage_is_refused(path, marker):
    honest = tensor_of(storage_of(torch.ones(3)))
    assert read_pickle(write(path, honest))["extra"].tolist() == [1, 1, 1]
    for place in range(5):
        hostile = tensor_of(storage_with(touch(marker), place))
        assert "asks for posix.system" in unread(write(path, hostile))


def test_those_calls_would_have_been_made(tmp_path):
    first = tmp_path / "first"
    pickle.loads(pickle.dumps(at_top(touch(first))))
    assert first.exists()
    second = tmp_path / "second"
    try:
        torch.storage._load_from_bytes(storage_with(touch(second), 0))
    except Exception:
        pass  # what comes after the call is not its concern
    assert second.exists()


def test_a_storage_asks_for_its_type_only_and_has_the_bytes_it_says(path):
    names_a_dict = tensor_of(storage_with(OrderedDict(), 2))
    assert "asks for collections.OrderedDict" in unread(write(path, names_a_dict))
    too_long = tensor_of(storage_of(torch.ones(3)) + bytes(4))
    assert "differ in size" in unread(write(path, too_long))


def test_a_zip_of_torch_is_no_storage(path, marker):
    buffer = io.BytesIO()
    torch.save(touch(marker), buffer)
    unread(write(path, tensor_of(buffer.getvalue())))


def test_the_embedded_source_never_runs(path):
    tree = snapshot(build())
    assert read_pickle(write(path, tree)).keys() == build().state_dict().keys()
    with pytest.raises(SystemExit):  # while the stand-in does run what it is given
        pickle.loads(path.read_bytes())


def test_an_admitted_name_is_no_gadget(path, marker):
    """Neither calls of admitted names, nor attributes set on what they make, have any effect."""
    load = torch.storage._load_from_bytes
    rebuild = torch._utils._rebuild_tensor_v2
    before = rebuild.__defaults__
    attributes = dict(edm2_pickle.Inert.__dict__)
    payload = Reduce(load, (pickle.dumps(touch(marker)),))
    unread(write(path, at_top(payload)))
    unread(write(path, at_top(Reduce(OrderedDict, ([("_modules", 1)],)))))

    # Beside the network they are skipped unread.
    reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
    source = {"module_src": f"open({str(marker)!r}, 'w')"}
    for evil in (payload, Reduce(reconstruct, (source,))):
        read_pickle(write(path, beside(evil)))

    # BUILD on the name itself, with attributes, with slots, and with a method's name.
    attribute = b"}X\x0c\x00\x00\x00__defaults__K\x01s"
    method = b"N}X\x08\x00\x00\x00__init__K\x01s\x86"
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
        for state in (attribute, b"N" + attribute + b"\x86", method):
            unread(write(path, b"\x80\x02" + name + state + b"b."))
    assert rebuild.__defaults__ == before
    assert dict(edm2_pickle.Inert.__dict__) == attributes


# --------------------------------------------------------------------------------------------------
# Files that would take all memory, and files that are something else.


def text(name):
    """The opcodes of a string."""
    return b"X" + len(name).to_bytes(4, "little") + name


def nested_modules(depth=2000):
    """A module inside a module, and so on."""
    before = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    before += b"}" + text(b"state") + b"}(" + text(b"_modules") + b"}" + text(b"m")
    after = b"s"
    for name in (b"_parameters", b"_buffers", b"_non_persistent_buffers_set"):
        after += text(name) + b"}"
    after += b"us\x85R"
    return b"\x80\x02}" + text(b"ema") + before * depth + b"N" + after * depth + b"s."


def shared_modules(depth=60):
    """Each module holds the next one twice: as a tree it has 2^60 leaves."""
    module = Persistent("Module", module_state())
    for _ in range(depth):
        module = Persistent("Module", module_state(modules={"a": module, "b": module}))
    return at_top(module)


def circle():
    container = torch.nn.ModuleDict()
    container.__dict__["_modules"] = {"again": container}
    return at_top(container)


BOMBS = {  # what the message says: a function that makes the file, and its arguments
    "LONG_BINPUT": (bytes, b"\x80\x04K\x01r\xff\xff\xff\x7f."),  # a memo slot that takes 32 GB
    "EXT1": (bytes, b"\x80\x02\x82\x01."),
    "too large": (bytes, b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fx."),
    "Recursion": (nested_modules,),
    "is shared": (shared_modules,),
    "contains itself": (circle,),
    "KeyError: 'ema'": (dict, {"G_ema": 1}),
}


@pytest.mark.parametrize("reason", BOMBS)
def test_a_bomb_is_refused_for_its_own_reason(path, reason):
    make, *args = BOMBS[reason]
    assert reason in unread(write(path, make(*args)))


def viewed(size, stride, offset=0):
    """A weight that looks at a storage of three numbers in its own way."""
    return tensor_of(storage_of(torch.ones(3)), size, stride, offset)


def test_a_tensor_that_is_not_in_its_storage_is_refused(path):
    cut = tensor_of(storage_of(torch.ones(3))[:-1])
    endless = viewed((1 << 40,), (0,))
    empty = viewed((0,), (1,))
    for tree in (cut, endless, empty):
        assert "a tensor and its storage differ in size" in unread(write(path, tree))
    assert "out of bounds" in unread(write(path, viewed((3,), (2,))))
    assert "out of bounds" in unread(write(path, viewed((3,), (1,), 1)))
    assert "storage offset -1" in unread(write(path, viewed((2,), (1,), -1)))
    for size in ((-1, -2), "3"):
        unread(write(path, viewed(size, (1, 1))))


def test_a_weight_that_is_no_tensor_of_floats_is_refused(path):
    integers = among_the_weights(torch.ones(3).long())
    assert "asks for torch.LongStorage" in unread(write(path, integers))
    storage = Reduce(torch.storage._load_from_bytes, (storage_of(torch.ones(3)),))
    odd = among_the_weights(Reduce(OrderedDict, (storage, 0, (3,), (1,))))
    assert "a weight is made by collections.OrderedDict" in unread(write(path, odd))
    for weight in (3, storage, sys.modules["dnnlib.util"].EasyDict()):
        unread(write(path, among_the_weights(weight)))


def test_what_is_no_snapshot_is_refused(path):
    contents = [
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>\n<body>not found</body>",
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",  # lists in lists
        b"\x80\x02K\x01Q.",  # a persistent id
        [1],
        at_top(None),
        at_top("ema"),
        at_top(torch.ones(3)),
        at_top(Persistent("Module", module_state(modules={"a": [1]}))),
    ]
    for content in contents:
        unread(write(path, content))


def test_a_file_that_is_not_there(path):
    with pytest.raises(ValueError, match="a.pkl: .*No such file"):
        read_pickle(path)


def test_a_truncated_snapshot_is_refused_wherever_it_ends(path):
    whole = pickle.dumps(snapshot(build()), 4)
    somewhere = random.Random(0).sample(range(40, len(whole)), 40)
    for end in [*range(0, 40, 3), *somewhere, len(whole) - 1]:
        unread(write(path, whole[:end]))


def test_no_flipped_byte_raises_anything_else(path):
    whole = pickle.dumps(snapshot(build()), 4)
    dice = random.Random(0)
    refusals = 0
    for _ in range(100):
        broken = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            end = len(broken) if dice.random() < 0.3 else 3000
            broken[dice.randrange(end)] = dice.randrange(256)
        try:
            edm2.check(write(path, bytes(broken)))
        except ValueError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
            refusals += 1
    assert refusals > 30


def test_a_name_with_line_breaks_still_makes_one_line(path):
    unread(write(path, b"\x80\x04\x8c\x04a\nb\nK\x01\x93."))
    long = b"\x80\x04X\x10\x27\x00\x00" + b"m" * 10000 + b"\x8c\x01n\x93."
    assert len(unread(write(path, long))) < 500
