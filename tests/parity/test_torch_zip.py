"""Our reader of torch's files against torch.load, on files that the real torch.save wrote."""

import math
import os
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cebra_jax_metrics import CheckpointError
from cebra_jax_metrics.checkpoints.torch_zip import DType, read_torch_zip

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def make(*size, dtype=torch.float32):
    torch.manual_seed(math.prod(size))
    return (10 * torch.randn(size)).to(dtype)


def assert_equal(ours, theirs):
    """Containers alike, and tensors as arrays of the same dtype, shape and bytes."""
    if isinstance(theirs, torch.Tensor):
        name = str(theirs.dtype).removeprefix("torch.")
        assert isinstance(ours, np.ndarray)
        assert ours.dtype == jnp.dtype(name)
        assert ours.shape == tuple(theirs.shape)
        raw = torch.empty(theirs.numel(), dtype=theirs.dtype).copy_(theirs.detach().flatten())
        np.testing.assert_array_equal(
            np.ascontiguousarray(ours).reshape(-1).view("u1"), raw.view(torch.uint8)
        )
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs


def check(value, path):
    torch.save(value, path)
    assert_equal(read_torch_zip(path), torch.load(path, weights_only=False))


TENSORS = {
    "0-d": torch.tensor(3.5),
    "zero-size": torch.zeros(0),
    "zero-size matrix": torch.zeros(3, 0, 2),
    "contiguous": make(3, 4, 5),
    "view with an offset": make(40)[7:31].view(4, 6),
    "row of a matrix": make(6, 5)[3],
    "column of a matrix": make(6, 5)[:, 3],
    "strided": make(9, 8)[1::3, ::2],
    "transposed": make(4, 7).T,
    "permuted": make(2, 3, 4).permute(2, 0, 1),
    "expanded": make(1, 4).expand(3, 4),
    "expanded scalar": torch.tensor(2.0).expand(5),
    "of one element": make(1, 1, 1),
    "overlapping": make(10).unfold(0, 4, 1),
    "element of a vector": make(10)[4],
    "leaf with grad": make(3).requires_grad_(),
    "parameter": torch.nn.Parameter(make(3, 2)),
    "frozen parameter": torch.nn.Parameter(make(3, 2), requires_grad=False),
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor(name, tmp_path):
    check(TENSORS[name], tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(dtype, tmp_path):
    tensor = make(4, 6, dtype=dtype)
    check([tensor, tensor[1:, ::2].T, dtype_extremes(dtype)], tmp_path / "x.pt")
    torch.save({"dtype": dtype, "size": tensor.shape}, tmp_path / "y.pt")
    ours = read_torch_zip(tmp_path / "y.pt")
    assert ours == {"dtype": str(dtype).removeprefix("torch."), "size": (4, 6)}


def dtype_extremes(dtype):
    if dtype == torch.bool:
        return torch.tensor([True, False])
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return torch.tensor([limits.min, limits.max], dtype=dtype)


def test_tensors_that_share_a_storage(tmp_path):
    storage = make(60)
    views = [storage, storage[10:20], storage.view(6, 10)[:, ::3], storage.view(6, 10).T]
    check({"views": views, "again": storage}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert sum("/data/" in name for name in file.namelist()) == 1


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 5),
    dimensions=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4),
)
def test_any_strides(tmp_path_factory, dtype, offset, dimensions):
    size, strides = [n for n, _ in dimensions], [step for _, step in dimensions]
    length = offset + sum(max(n - 1, 0) * step for n, step in dimensions) + 1
    tensor = make(length, dtype=dtype).as_strided(size, strides, offset)
    check(tensor, tmp_path_factory.mktemp("strides") / "x.pt")


def test_containers_and_numbers(tmp_path):
    value = OrderedDict(
        numbers=[0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 2**63, -(2**70), 10**400],
        floats=[0.0, -0.0, 1e-300, math.inf, 0.1],
        texts=["", "τ", "a" * 300, "\U0001f9e0"],
        others=(None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        nested={1: {"a": [{}, []]}, "b": {-1: ((0.9, 0.999),)}},
        long=list(range(2500)),
        empty=OrderedDict(),
        raw=b"\x00\xff\x80",
        size=torch.Size([3, 4]),
        repeated=["same", "same"],
    )
    check(value, tmp_path / "x.pt")
    ours = read_torch_zip(tmp_path / "x.pt")
    assert type(ours) is dict
    assert math.copysign(1, ours["floats"][1]) == -1


def test_an_object_that_occurs_twice_is_one_object(tmp_path):
    shared = [1, 2]
    torch.save([shared, shared], tmp_path / "x.pt")
    first, second = read_torch_zip(tmp_path / "x.pt")
    assert first is second


@pytest.mark.parametrize(
    "scalar",
    [
        np.float32(0.1),
        np.float64(-0.1),
        np.int32(-5),
        np.int64(2**40),
        np.uint8(200),
        np.bool_(True),
        np.float64("nan"),
    ],
    ids=repr,
)
def test_numpy_scalar(scalar, tmp_path):
    torch.save({"x": scalar}, tmp_path / "x.pt")
    value = read_torch_zip(tmp_path / "x.pt")["x"]
    assert type(value) is type(scalar.item())
    np.testing.assert_equal(value, scalar.item())


@pytest.mark.parametrize(
    "name", ["float32", "float64", "int32", "int64", "bool", "uint8", "float16", ">f4", ">i8"]
)
def test_numpy_dtype(name, tmp_path):
    torch.save([np.dtype(name)], tmp_path / "x.pt")
    (value,) = read_torch_zip(tmp_path / "x.pt")
    assert isinstance(value, DType)
    assert value.dtype == np.dtype(name)


def test_version_and_state_dict(tmp_path):
    torch.save(torch.__version__, tmp_path / "x.pt")
    value = read_torch_zip(tmp_path / "x.pt")
    assert type(value) is str
    assert value == str(torch.__version__)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network(make(5, 3)).sum().backward()
    optimizer.step()
    check({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "y.pt")


def rewrite(path, change):
    """Write a file again, its records changed by ``change(name, bytes)``."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in records.items():
            file.writestr(name, change(name.partition("/")[2], data))


@pytest.mark.parametrize("place", ["cuda:0", "cuda:17", "mps:0"])
def test_file_saved_on_an_accelerator(place, tmp_path):
    value = {"weight": make(3, 4), "steps": make(5, dtype=torch.int64)}
    path = tmp_path / "x.pt"
    torch.save(value, path)

    def text(word):
        return b"X" + len(word).to_bytes(4, "little") + word

    def move(name, data):
        if name != "data.pkl":
            return data
        assert text(b"cpu") in data
        return data.replace(text(b"cpu"), text(place.encode()))

    rewrite(path, move)
    assert_equal(read_torch_zip(path), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_big_endian_file(dtype, tmp_path):
    value = [make(3, 4, dtype=dtype), make(7, dtype=dtype)[2:5]]
    path = tmp_path / "x.pt"
    torch.save(value, path)

    def turn(name, data):
        if name == "byteorder":
            assert data == b"little"
            return b"big"
        if name.startswith("data/"):
            return np.frombuffer(data, "u1").reshape(-1, dtype.itemsize)[:, ::-1].tobytes()
        return data

    rewrite(path, turn)
    assert all(map(torch.equal, torch.load(path), value))
    assert_equal(read_torch_zip(path), value)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, __import__, getattr])
def test_files_that_ask_for_a_call_are_refused(function, nested, tmp_path):
    victim = tmp_path / "victim"
    arguments = {
        os.system: (f"touch {victim}",),
        eval: (f"open({str(victim)!r}, 'w')",),
        exec: (f"open({str(victim)!r}, 'w')",),
        os.mkdir: (str(victim),),
        __import__: ("antigravity",),
        getattr: (make(3), "numpy"),
    }[function]
    value = Call(function, *arguments)
    path = tmp_path / "x.pt"
    torch.save({"model": OrderedDict(weight=make(3)), "args": [value]} if nested else value, path)
    with pytest.raises(CheckpointError, match=r"asks for .*refused"):
        read_torch_zip(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.functional.one_hot,
        make(3).to(torch.complex64),
        make(3).to_sparse(),
        frozenset([1, 2]),
        1j,
    ],
    ids=["function", "complex tensor", "sparse tensor", "frozen set", "complex number"],
)
def test_what_no_checkpoint_holds_is_refused(value, tmp_path):
    torch.save([value], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"asks for .*refused"):
        read_torch_zip(tmp_path / "x.pt")


def test_the_old_format_is_refused(tmp_path):
    torch.save([make(3)], tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError):
        read_torch_zip(tmp_path / "x.pt")
