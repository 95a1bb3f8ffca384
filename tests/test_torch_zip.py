"""The restricted reader of torch files: it reads what is right, refuses the rest, runs nothing."""

import itertools
import pickle
import struct
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import cebra_jax_metrics as cjm
from cebra_jax_metrics.checkpoints.cebra import _payload_of
from cebra_jax_metrics.checkpoints.torch_zip import (
    CheckpointError,
    DType,
    Offset,
    Record,
    read_torch_zip,
)
from cebra_jax_metrics.encoders import get_architecture

FLOATS = np.arange(6, dtype="<f4")


class Code(bytes):
    """Pickle opcodes that leave one object on the stack."""


def only_text(value):
    """The name of a parameter of a test: opcodes would be unreadable."""
    return value if isinstance(value, str) else ""


def code(value):
    """Opcodes of a plain value, as protocol 2 writes them; containers may hold further opcodes."""
    match value:
        case Code():
            return value
        case str():
            text = value.encode()
            return Code(b"X" + struct.pack("<I", len(text)) + text)
        case tuple():
            return Code(b"(" + b"".join(map(code, value)) + b"t")
        case list():
            return Code(b"](" + b"".join(map(code, value)) + b"e")
        case dict():
            return Code(b"}(" + b"".join(map(code, itertools.chain(*value.items()))) + b"u")
        case _:
            return Code(pickle.dumps(value, protocol=2)[2:-1])


def name(module, attribute):
    return Code(f"c{module}\n{attribute}\n".encode())


def call(module, attribute, *arguments):
    return Code(name(module, attribute) + code(arguments) + b"R")


def build(target, state):
    return Code(code(target) + code(state) + b"b")


def put(number):
    return b"r" + struct.pack("<I", number)


def get(number):
    return b"j" + struct.pack("<I", number)


def storage(kind="FloatStorage", count=6, key="0", location="cpu"):
    return Code(code(("storage", name("torch", kind), key, location, count)) + b"Q")


def tensor(source, size, stride, offset=0):
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", source, offset, size, stride, False, hooks)


def dtype(text, order="<"):
    """A NumPy dtype as NumPy pickles it."""
    made = call("numpy", "dtype", text, False, True)
    return build(made, (3, order, None, None, None, -1, -1, 0))


def scalar(value, order="<", module="numpy._core.multiarray"):
    value = np.asarray(value)
    data = value.astype(value.dtype.newbyteorder(order)).tobytes().decode("latin1")
    encoded = call("_codecs", "encode", data, "latin1")
    return call(module, "scalar", dtype(value.dtype.str[1:], order), encoded)


def pack(path, value, *arrays, byteorder=b"little", compression=zipfile.ZIP_STORED):
    """Write a torch zip file: a value or opcodes, and one storage per array (or bytes)."""
    pickled = value if type(value) is bytes else b"\x80\x02" + code(value) + b"."
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        if byteorder is not None:
            file.writestr("archive/byteorder", byteorder)
        for number, array in enumerate(arrays):
            data = array if type(array) is bytes else array.tobytes()
            file.writestr(f"archive/data/{number}", data)
    return path


def records(path):
    """All records of a zip file, in order."""
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def same(a, b):
    """Whether two results of the reader are equal, bit by bit."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file.pt"


@pytest.fixture
def golden(golden_folder):
    return golden_folder / "offset1-model.pt"


# Right files


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, None),
        ([True, False, -1, 2**15, 2**40, -(2**80), 0.1, "é"], None),
        ({"a": (1, (2, 3)), 4: [[], {}, ()]}, None),
        (call("torch", "Size", [2, 3]), (2, 3)),
        (name("torch", "float32"), "float32"),
        (name("torch", "bfloat16"), "bfloat16"),
        (dtype("f4"), DType(np.dtype("<f4"))),
        (dtype("i8", ">"), DType(np.dtype(">i8"))),
        (build(call("cebra.data.datatypes", "Offset"), (None, {"left": 5, "right": 6})), None),
        (call("torch.torch_version", "TorchVersion", "2.1"), "2.1"),
        (Code(code("2.1") + code({"cmp": 1}) + b"b"), "2.1"),
        (call("collections", "OrderedDict", [["a", 1]]), {"a": 1}),
        (build(call("collections", "OrderedDict"), {"_metadata": 1}), {}),
        (scalar(np.float64(0.1)), 0.1),
        (scalar(np.float64(0.1), ">"), 0.1),
        (scalar(np.float32(0.5), module="numpy.core.multiarray"), 0.5),
        (scalar(np.int64(-3)), -3),
        (scalar(np.bool_(True)), True),
    ],
)
def test_values(file, written, expected):
    if expected is None:
        is_offset = b"Offset" in code(written)
        expected = Offset(5, 6) if is_offset else written
    assert same(read_torch_zip(pack(file, written)), expected)


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("FloatStorage", FLOATS),
        ("DoubleStorage", np.array([0.1, -np.inf, np.nan])),
        ("HalfStorage", np.array([0.1, 65504], np.float16)),
        ("BFloat16Storage", np.array([0.1, -3e38], jnp.bfloat16)),
        ("LongStorage", np.array([-(2**60), 1])),
        ("IntStorage", np.array([-(2**30), 1], np.int32)),
        ("ShortStorage", np.array([-(2**10), 1], np.int16)),
        ("CharStorage", np.array([-100, 1], np.int8)),
        ("ByteStorage", np.array([200, 1], np.uint8)),
        ("BoolStorage", np.array([True, False, True])),
        ("FloatStorage", np.zeros(0, np.float32)),
    ],
)
@pytest.mark.parametrize("byteorder", [b"little", b"big", None])
def test_tensors_of_all_types(file, kind, array, byteorder):
    stored = array.byteswap() if byteorder == b"big" else array
    written = tensor(storage(kind, len(array)), (len(array),), (1,))
    read = read_torch_zip(pack(file, written, stored, byteorder=byteorder))
    assert same(read, array)
    assert not read.flags.writeable or not read.size


@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        ((2, 3), (3, 1), 0, FLOATS.reshape(2, 3)),
        ((3, 2), (1, 3), 0, FLOATS.reshape(2, 3).T),
        ((2, 2), (3, 1), 1, FLOATS.reshape(2, 3)[:, 1:]),
        ((3,), (2,), 1, FLOATS[1::2]),
        ((1, 6), (100, 1), 0, FLOATS[None]),
        ((), (), 5, FLOATS[5]),
        ((0, 3), (3, 1), 0, FLOATS.reshape(2, 3)[:0]),
        ((0,), (1,), 6, FLOATS[6:]),
    ],
)
def test_strided_views(file, size, stride, offset, expected):
    read = read_torch_zip(pack(file, tensor(storage(), size, stride, offset), FLOATS))
    assert same(read, np.asarray(expected))


def test_tensors_share_a_storage(file):
    whole, part = tensor(storage(), (6,), (1,)), tensor(storage(), (2,), (1,), 4)
    a, b = read_torch_zip(pack(file, (whole, part), FLOATS))
    assert np.shares_memory(a, b)
    np.testing.assert_array_equal(b, FLOATS[4:])


@pytest.mark.parametrize("location", ["cpu", "cuda:0", "mps"])
def test_tensors_from_any_device(file, location):
    source = tensor(storage(location=location), (6,), (1,))
    written = call("torch._utils", "_rebuild_parameter", source, True, {})
    np.testing.assert_array_equal(read_torch_zip(pack(file, written, FLOATS)), FLOATS)


# Files that ask for more than data

FORBIDDEN = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "list"),
    ("__builtin__", "eval"),
    ("subprocess", "Popen"),
    ("pickle", "loads"),
    ("numpy", "load"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("torch", "load"),
    ("torch", "ComplexFloatStorage"),
    ("torch", "float32.__class__"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch.jit._serialization", "load"),
    ("torch.nn.modules.linear", "Linear.__init__"),
    ("torch.nn.functional", "Linear"),
    ("torch.optim.adam", "adam"),
    ("cebra.solver.single_session", "copy"),
    ("cebra.integrations.sklearn.cebra", "_safe_torch_load"),
    ("collections", "OrderedDict.fromkeys"),
    ("cebra.data.datatypes", "Offset.__init__"),
    ("cebra_jax_metrics.checkpoints.torch_zip", "_look_up"),
    ("copyreg", "_reconstructor"),
    ("makes_marker", "run"),
]


@pytest.mark.parametrize(("module", "attribute"), FORBIDDEN)
def test_forbidden_names(tmp_path, file, monkeypatch, module, attribute):
    marker = tmp_path / "marker"
    effect = f"open({str(marker)!r}, 'w')"
    (tmp_path / "makes_marker.py").write_text(f"{effect}\ndef run(text): {effect}\n")
    monkeypatch.syspath_prepend(tmp_path)
    argument = effect if attribute == "eval" else f"touch '{marker}'"
    pack(file, [call(module, attribute, argument)])
    with pytest.raises(CheckpointError, match=f"{file}.*{module}.{attribute}"):
        read_torch_zip(file)
    assert not marker.exists()
    assert "makes_marker" not in sys.modules


@pytest.mark.parametrize(
    ("opcode", "written"),
    [
        ("STACK_GLOBAL", code("os") + code("system") + b"\x93" + code(("touch marker",)) + b"R"),
        ("INST", b"(" + code("touch marker") + b"ios\nsystem\n"),
        ("OBJ", b"(" + name("collections", "OrderedDict") + b"o"),
        ("NEWOBJ_EX", name("collections", "OrderedDict") + b")}\x92"),
        ("EXT1", b"\x82\x01"),
        ("EXT2", b"\x83\x01\x00"),
        ("EXT4", b"\x84\x01\x00\x00\x00"),
        ("PERSID", b"P0\n"),
        ("STRING", b"S'a'\n"),
        ("UNICODE", b"Va\n"),
        ("INT", b"I1\n"),
        ("GET", b"Np0\n0g0\n"),
        ("DUP", b"N2"),
        ("BINBYTES", b"B\x01\x00\x00\x00a"),
        ("BYTEARRAY8", b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a"),
        ("NEXT_BUFFER", b"\x97"),
        ("FROZENSET", b"(\x91"),
        ("MEMOIZE", b"N\x94"),
        ("FRAME", b"\x95\x01\x00\x00\x00\x00\x00\x00\x00N"),
    ],
    ids=only_text,
)
def test_forbidden_opcodes(file, opcode, written):
    refused = "PUT" if opcode == "GET" else opcode
    with pytest.raises(CheckpointError, match=f"uses {refused},"):
        read_torch_zip(pack(file, Code(written)))


LISTED = name("collections", "OrderedDict")
OFFSET = call("cebra.data.datatypes", "Offset")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (Code(name("torch", "float32") + b")R"), "calls"),
        (Code(name("torch", "FloatStorage") + b")R"), "calls"),
        (Code(name("torch", "FloatStorage") + b")\x81"), "calls"),
        (Code(code("os.system") + b")R"), "calls"),
        (Code(LISTED + b"]R"), "calls"),
        (Code(LISTED + LISTED + b"R"), "calls"),
        (call("collections", "OrderedDict", 5), "Cannot read"),
        (call("torch._utils", "_rebuild_tensor_v2"), "Cannot read"),
        (call("_codecs", "encode", "a", "utf-8"), "encoded"),
        (call("_codecs", "encode", "a", "rot13"), "encoded"),
        (call("_codecs", "encode", 1, "latin1"), "encoded"),
        *(
            (call("numpy", "dtype", kind), "NumPy dtype")
            for kind in ("O", "V8", "U5", "S5", "M8[s]", "c8", "bytes", "i8,O", "i8,i8", 8, None)
        ),
        (call("numpy._core.multiarray", "scalar", dtype("f8"), "12345678"), "NumPy scalar"),
        (call("numpy._core.multiarray", "scalar", "f8", "12345678"), "NumPy scalar"),
        (
            call("numpy._core.multiarray", "scalar", dtype("f8"), call("_codecs", "encode", "a")),
            "Cannot read",
        ),
        (build(LISTED, {"__globals__": {}}), "sets the state"),
        (build(name("torch._utils", "_rebuild_tensor_v2"), {"__code__": 1}), "sets the state"),
        (build(name("torch", "FloatStorage"), {"dtype": 1}), "sets the state"),
        (build(OFFSET, {"__class__": 1}), "sets the state"),
        (build(OFFSET, (None, {"left": "a", "right": 1})), "sets the state"),
        (build(call("numpy", "dtype", "f8"), (3, "x")), "sets the state"),
        (build(storage(), {"values": 1}), "sets the state"),
        (build([], {}), "sets the state"),
        (Code(b"NNa"), "appends"),
        (Code(b")(Ne"), "appends"),
        (Code(b"](NNu"), "sets items"),
        (Code(b"}(Nu"), "Cannot read"),
        (Code(b"}]Ns"), "Cannot read"),
        (Code(b"t"), "Cannot read"),
        (Code(b"h\x01"), "Cannot read"),
        (Code(b""), "Cannot read"),
        (Code(b"\x86"), "Cannot read"),
        (Code(b"cos system\n\n"), "refused"),
        (Code(b"\xff"), "Cannot read"),
        (b"\x80\x02N", "Cannot read"),
        (b"", "Cannot read"),
    ],
    ids=only_text,
)
def test_misuse_of_what_is_allowed(file, written, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch_zip(pack(file, written, FLOATS))


def test_refused_files_leave_nothing_behind(file, golden):
    before = read_torch_zip(golden)
    state = {"__dict__": {}, "__globals__": {}, "left": 7, "dtype": "O", "__class__": "evil"}
    for target in (
        *(name(*listed) for listed in [("torch", "FloatStorage"), ("torch", "float32")]),
        *(name("torch._utils", f) for f in ("_rebuild_tensor_v2", "_rebuild_parameter")),
        *(name(*listed) for listed in [("numpy", "dtype"), ("cebra.data.datatypes", "Offset")]),
        LISTED,
        OFFSET,
        dtype("f8"),
        storage(),
    ):
        for poison in (state, (None, state), (3, ">", state, state)):
            try:
                read_torch_zip(pack(file, build(target, poison), FLOATS))
            except CheckpointError:
                continue
    assert same(read_torch_zip(golden), before)
    assert read_torch_zip(pack(file, OFFSET)) == Offset(0, 1)


# Tensors and storages that are not what they claim

FULL = storage()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (tensor(FULL, (7,), (1,)), "beyond"),
        (tensor(FULL, (6,), (1,), 1), "beyond"),
        (tensor(FULL, (2, 3), (4, 1)), "beyond"),
        (tensor(FULL, (1,), (1,), 6), "beyond"),
        (tensor(FULL, (2,), (2**62,)), "beyond"),
        (tensor(FULL, (2**62,), (1,)), "beyond"),
        (tensor(FULL, (2**62, 2**62), (2**62, 2**62)), "beyond"),
        (tensor(FULL, (6,), (-1,), 5), "described"),
        (tensor(FULL, (-6,), (1,)), "described"),
        (tensor(FULL, (6,), (1,), -1), "described"),
        (tensor(FULL, (6,), (1, 1)), "described"),
        (tensor(FULL, (2, 3), (1,)), "described"),
        (tensor(FULL, [6], [1]), "described"),
        (tensor(FULL, 6, 1), "described"),
        (tensor(FULL, (6.0,), (1,)), "described"),
        (tensor(FULL, (True,), (1,)), "described"),
        (tensor(FULL, ("6",), (1,)), "described"),
        (tensor(FULL, (6,), (1,), None), "described"),
        (tensor("0", (6,), (1,)), "described"),
        (tensor([0.0], (1,), (1,)), "described"),
        (tensor(FULL, (0, 2**62, 2**62), (1, 1, 1)), "Cannot read"),
        (tensor(FULL, (1,) * 100, (1,) * 100), "Cannot read"),
        (storage(count=7), "'0' should hold 7 elements"),
        (storage(count=5), "'0' should hold 5 elements"),
        (storage(count=-6), "'0' should hold -6 elements"),
        (storage(count=2**62), "'0' should hold"),
        (storage(key="1"), "'data/1' is missing"),
        (storage(key="../data.pkl"), "is missing"),
        (storage(count="6"), "storage is not described"),
        (storage(key=0), "storage is not described"),
        (storage(location=None), "storage is not described"),
        ([storage(), storage("IntStorage")], "'0' is described in two ways"),
        (Code(code(("module", LISTED, "0", "cpu", 6)) + b"Q"), "storage is not described"),
        (Code(code(("storage", LISTED, "0", "cpu", 6)) + b"Q"), "storage is not described"),
        (Code(code(("storage", "FloatStorage", "0", "cpu", 6)) + b"Q"), "storage is not described"),
        (Code(code("0") + b"Q"), "storage is not described"),
    ],
    ids=only_text,
)
def test_false_claims(file, written, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch_zip(pack(file, written, FLOATS))


# Files made to exhaust whoever reads them: each is loaded in a process of its own


def doubling(levels=60, start=b")"):
    """Tuples of two that all hold the same tuple twice: 2**levels in all."""
    return Code(start + b"".join(put(i) + get(i) + b"\x86" for i in range(levels)))


def widening(levels=5, width=4096, start=b"N"):
    """Lists of many references to the same list, a few levels deep."""
    text = b"](" + start * width + b"e"
    for i in range(levels):
        text = b"](" + text + put(i) + get(i) * (width - 1) + b"e"
    return Code(text)


def payload(args=(), state=(), model=(), metadata=(), **state_dict):
    """What CEBRA saves, of a model of one neuron unless other parameters are given."""
    shapes = get_architecture("offset1-model").shapes(1, 2, 1)
    parameters = {key: tensor(FULL, shape, (1,) * len(shape)) for key, shape in shapes.items()}
    return {
        "args": {"num_hidden_units": 2, "output_dimension": 1, **dict(args)},
        "state": dict(state),
        "state_dict": {"model": {**parameters, **dict(model)}, **state_dict},
        "metadata": dict(metadata),
    }


def expanded(shape):
    """A tensor of any shape, all of whose elements are the first one of its storage."""
    return tensor(FULL, shape, (0,) * len(shape))


def many(value, use, times=20_000):
    """A list of a value, which is memo 0, and of what so many uses of it leave."""
    return Code(b"](" + code(value) + put(0) + use * times + b"e")


def copies(module, attribute, value, *others):
    """A list of what a function makes of one and the same value, again and again."""
    rest = b"".join(get(2 + i) for i in range(len(others)))
    memos = [Code(code(other) + put(2 + i)) for i, other in enumerate(others)]
    use = get(1) + b"(" + get(0) + rest + b"tR"
    return [Code(name(module, attribute) + put(1)), memos, many(value, use)]


def module(parameters, modules, memo=0):
    """A torch module that was pickled whole, which may hold itself as a memo."""
    state = code({"_parameters": parameters, "_modules": modules})
    return Code(call("torch.nn.modules.linear", "Linear") + put(memo) + state + b"b")


def estimator(model):
    """An estimator that was pickled whole."""
    parts = {"model": model, "criterion": module({}, {}, memo=9)}
    solver = build(call("cebra.solver.single_session", "SingleSessionSolver"), parts)
    attributes = {"solver_": solver, "num_hidden_units": 2, "output_dimension": 1}
    return build(call("cebra.integrations.sklearn.cebra", "CEBRA"), attributes)


def sessions(number, neurons):
    """A model of many sessions, all of whose parameters are the same few tensors."""
    shapes = get_architecture("offset1-model").shapes(neurons, 2, 1)
    first = [Code(code(expanded(shape)) + put(i)) for i, shape in enumerate(shapes.values())]
    model = {
        f"{session}.{key}": Code(get(i)) if session else first[i]
        for session in range(number)
        for i, key in enumerate(shapes)
    }
    return {**payload(state={"n_features_": [neurons] * number}), "state_dict": {"model": model}}


LAUGHS = doubling()
DEEP = Code(b")" + b"\x85" * 300_000)
CYCLE = Code(b"]" + put(0) + get(0) + b"a")
LONG = 2**16 * "a"
HUGE = Code(b"(" + code(2**2000) + put(0) + get(0) * 200_000 + b"t")
COLLIDING = b"".join(code(i * (2**61 - 1)) + b"N" for i in range(50_000))  # one hash for all
VAST = 2**45
VAST_MODEL = get_architecture("offset1-model-mse").shapes(VAST, 2, 1)
BOMBS = {
    "nothing": payload(),
    "nested tuples": LAUGHS,
    "deep tuples": DEEP,
    "nested tuples as a key": {LAUGHS: None},
    "deep tuples as a key": {DEEP: None},
    "nested tuples as a key of an ordered dictionary": call(
        "collections", "OrderedDict", [(LAUGHS, None)]
    ),
    "nested tuples as a dtype": call("numpy", "dtype", LAUGHS),
    "nested tuples as a version": call("torch.torch_version", "TorchVersion", LAUGHS),
    "nested tuples as a size": tensor(FULL, LAUGHS, LAUGHS),
    "nested tuples as a dictionary": call("collections", "OrderedDict", LAUGHS),
    "nested tuples as a setting": payload({"delta": LAUGHS}),
    "wide lists as a setting": payload({"verbose": widening()}),
    "nested tuples as the solver": payload(state={"solver_name_": LAUGHS}),
    "nested tuples as metadata": payload(metadata={"backend": LAUGHS}),
    "nested tuples as a kind of labels": payload(state={"label_types_": [(LAUGHS, ())]}),
    "cycle as the labels": payload(state={"label_types_": CYCLE}),
    "nested tuples as a parameter": payload(model={"net.1.weight": LAUGHS}),
    "nested tuples as the history": payload(loss=LAUGHS),
    "cycle as the history": payload(loss=CYCLE),
    "vast tensor as the history": payload(loss=expanded((VAST,))),
    "vast tensors as parameters": {
        **payload({"model_architecture": "offset1-model-mse"}),
        "state_dict": {"model": {key: expanded(shape) for key, shape in VAST_MODEL.items()}},
    },
    "copies of a list as sizes": copies("torch", "Size", [None] * 100_000),
    "copies of a list as sets": copies("builtins", "set", [None] * 100_000),
    "copies of a list as ordered dictionaries": copies(
        "collections", "OrderedDict", [[f"{i}", None] for i in range(20_000)]
    ),
    "copies of a text as bytes": copies("_codecs", "encode", LONG, "latin1"),
    "copies of a state": [
        Code(name("torch.nn.modules.linear", "Linear") + put(1)),
        many({f"{i}": None for i in range(20_000)}, get(1) + b")R" + get(0) + b"b"),
    ],
    "long numbers as a size": tensor(FULL, HUGE, HUGE),
    "numbers that collide as keys": Code(b"}(" + COLLIDING + b"u"),
    "many sessions": sessions(5_000, 1),
    "one tensor as the parameters of many sessions": sessions(500, 2**18),
    "one list as many settings": payload(
        {f"{i}": Code(get(2)) if i else Code(widening(2, 32) + put(2)) for i in range(20_000)}
    ),
    "long texts as a setting": payload({"delta": widening(2, 32, code(LONG))}),
    "one list as the kinds of many labels": payload(
        state={"label_types_": many(many(("float32", (100, 2)), get(0)), get(0))}
    ),
    "one shape of many kinds of labels": payload(
        state={
            "label_types_": [
                Code(b"(" + code("float32") + code((1,) * 20_000) + put(0) + b"t"),
                *[Code(b"(" + code("float32") + get(0) + b"t")] * 20_000,
            ]
        }
    ),
    "one module in many": estimator(
        module(
            {},
            {
                f"{i}": module({f"{i}": 1.0 for i in range(20_000)}, {}) if not i else Code(get(0))
                for i in range(1_900)
            },
            memo=1,
        )
    ),
    "a module in itself": estimator(module({}, {f"{i}": Code(get(0)) for i in range(100_000)})),
}
LOAD_ALL = """
import os, resource, sys
from cebra_jax_metrics import CheckpointError, load
def kilobytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        outcome, before = "?", kilobytes()
        try:
            load(path)
            outcome = "loaded"
        except BaseException as error:
            outcome = type(error).__name__
            outcome += " for want of memory" if "MemoryError" in str(error) else ""
        finally:
            if kilobytes() - before > 2**18:
                outcome += f", taking {(kilobytes() - before) // 1024} MB"
            print(outcome, flush=True)
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print("killed by signal", -status, flush=True)
"""


@pytest.mark.heavy
def test_bombs_are_defused(tmp_path):
    files = [pack(tmp_path / str(i), BOMBS[key], FLOATS) for i, key in enumerate(BOMBS)]
    command = [sys.executable, "-W", "ignore", "-c", LOAD_ALL, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = dict(zip(BOMBS, done.stdout.splitlines(), strict=True))
    allowed = ("CheckpointError", "loaded")
    assert {bomb: what for bomb, what in outcomes.items() if what not in allowed} == {}
    assert outcomes["nothing"] == outcomes["many sessions"] == "loaded"


def test_cycles(file):
    for cycle in (CYCLE, Code(b"}" + put(0) + b"K\0" + get(0) + b"s")):
        read = read_torch_zip(pack(file, cycle))
        assert read[0] is read


# Damaged archives


def test_archives_that_torch_does_not_write(file, golden):
    good = {"a/data.pkl": b"\x80\x02N.", "a/byteorder": b"little"}
    for damage, message in (
        ({"a/byteorder": b"little"}, "no data.pkl"),
        ({"data.pkl": b"\x80\x02N."}, "no data.pkl"),
        ({**good, "a/byteorder": b"middle"}, "byte order b'middle'"),
        ({**good, "a/byteorder": b""}, "byte order b''"),
    ):
        with zipfile.ZipFile(file, "w") as archive:
            for record, data in damage.items():
                archive.writestr(record, data)
        with pytest.raises(CheckpointError, match=message):
            read_torch_zip(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("record", ["a/data.pkl", "a/byteorder", "a/data/0", "b/data.pkl"])
def test_duplicate_records(file, record):
    with zipfile.ZipFile(file, "w") as archive:
        for each in ("a/data.pkl", "a/byteorder", "a/data/0", record):
            archive.writestr(each, b"\x80\x02N." if each.endswith("pkl") else b"little")
    with pytest.raises(CheckpointError, match="several"):
        read_torch_zip(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records(file, method):
    pack(file, None, FLOATS, compression=method)
    with pytest.raises(CheckpointError, match="'byteorder' is compressed"):
        read_torch_zip(file)


def test_corrupt_record(file):
    pack(file, tensor(FULL, (6,), (1,)), FLOATS)
    file.write_bytes(file.read_bytes().replace(FLOATS.tobytes(), FLOATS[::-1].tobytes()))
    with pytest.raises(CheckpointError, match="CRC"):
        read_torch_zip(file)


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04", b"\x80\x02N.", bytes(1000)])
def test_files_of_another_kind(file, content):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(file)):
        read_torch_zip(file)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_zip(tmp_path / "nothing.pt")
    with pytest.raises(OSError, match="directory"):
        read_torch_zip(tmp_path)


def test_truncated_files(file, golden):
    whole = golden.read_bytes()
    for length in {*range(0, len(whole), 17), *range(len(whole) - 200, len(whole))}:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            read_torch_zip(file)


def test_flipped_bytes(file, golden):
    archive = {key.partition("/")[2]: data for key, data in records(golden).items()}
    arrays = [archive[f"data/{i}"] for i in range(sum(key.startswith("data/") for key in archive))]
    pickled = archive["data.pkl"]
    assert same(read_torch_zip(pack(file, pickled, *arrays)), read_torch_zip(golden))
    rng = np.random.default_rng(0)
    positions = rng.choice(len(pickled), 800, replace=False)
    num_refused = 0
    for position, flip in zip(positions, rng.integers(1, 256, 800), strict=True):
        damaged = bytearray(pickled)
        damaged[position] ^= flip
        try:
            read_torch_zip(pack(file, bytes(damaged), *arrays))
        except CheckpointError:
            num_refused += 1
    assert 0 < num_refused < 800


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("cebra.integrations.sklearn.cebra", "CEBRA"),
        ("cebra.solver.single_session", "SingleSessionSolver"),
        ("cebra.models.layers", "_Skip"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch.optim.adam", "Adam"),
        ("builtins", "slice"),
    ],
)
def test_known_classes_become_records(file, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)  # or importing would work
    pack(file, call(module, name, "an argument"))
    record = read_torch_zip(file)
    assert isinstance(record, Record)
    assert (record.kind, record.attributes) == (name, {})


def test_records_that_are_no_fitted_estimator(file):
    for module, name, message in (
        ("torch.nn.modules.linear", "Linear", "class Linear, no CEBRA estimator"),
        ("cebra.integrations.sklearn.cebra", "CEBRA", "not fitted"),
    ):
        pack(file, call(module, name))
        with pytest.raises(CheckpointError, match=message):
            cjm.load(file)


def estimator_of(module):
    """A record of an estimator whose solver's model is given."""
    criterion = Record("FixedCosineInfoNCE", {"_parameters": {}, "_modules": {}})
    solver = Record("SingleSessionSolver", {"model": module, "criterion": criterion})
    return Record("CEBRA", {"solver_": solver})


def test_modules_within_themselves_are_refused():
    module = Record("Sequential", {"_parameters": {}})
    module.attributes["_modules"] = {"0": module, "1": module}
    for wrong in (module, Record("Sequential", {"_modules": {"0": 3}}), "no record"):
        with pytest.raises(CheckpointError, match="not laid out as torch's"):
            _payload_of(estimator_of(wrong))
