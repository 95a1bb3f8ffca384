"""Read what torch.save wrote, without torch and without executing what the pickle asks for.

A torch file is a zip archive of a pickle and one record per storage. The pickle is read by a small
machine of our own rather than by ``pickle``: it knows the opcodes that torch.save writes and a
closed list of names, each standing for a function of this module. Nothing is imported, nothing of
the file's choosing is called, no object outside the machine is touched.
"""

import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

LONGEST_TEXT = 2**16
MOST_DIMENSIONS = 64  # NumPy's limit
MAX_EXPANDED = 2**20  # elements of a tensor that repeats its storage by strides of 0


class CheckpointError(ValueError):
    """A file, or what it holds, is no checkpoint that this library can use."""


@dataclass
class Offset:
    """CEBRA's window of time steps: ``left`` before, ``right`` from the current one on."""

    left: int = 0
    right: int = 1


@dataclass
class DType:
    """A NumPy dtype; its byte order follows its name in a pickle."""

    dtype: np.dtype


@dataclass(eq=False)
class Record:
    """An object of a known class as an inert record: its class's name, and its attributes."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    values: np.ndarray


class _Global(NamedTuple):
    """A name that the pickle asked for and that is on the list."""

    module: str
    name: str


def _tensor(
    storage: object, offset: object, size: object, stride: object, *rest: object
) -> np.ndarray:
    """A tensor as a read-only view of its storage, checked to lie within it."""
    if not (
        isinstance(storage, _Storage)
        and isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
    ):
        raise CheckpointError("a tensor is not described as torch does it.")
    values = storage.values
    if 0 in size:
        return np.empty(size, values.dtype)
    if math.prod(size) > max(values.size, MAX_EXPANDED):
        raise CheckpointError(f"a tensor of size {size} repeats a storage of {values.size}.")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= values.size:
        raise CheckpointError(
            f"a tensor of size {size}, strides {stride} and offset {offset} reaches beyond its "
            f"storage of {values.size} elements."
        )
    strides = [n * values.itemsize for n in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)


def _parameter(data: object, *rest: object) -> object:
    return data


def _dtype(name: object, *rest: object) -> DType:
    if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
        raise CheckpointError("it describes a NumPy dtype that is not one of numbers.")
    return DType(np.dtype(name))


def _bytes(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise CheckpointError("bytes are encoded in an unknown way.")
    return text.encode("latin1")


def _scalar(kind: object, data: object) -> int | float | bool:
    if not (
        isinstance(kind, DType) and isinstance(data, bytes) and len(data) == kind.dtype.itemsize
    ):
        raise CheckpointError("a NumPy scalar is not described as NumPy does it.")
    return np.frombuffer(data, kind.dtype)[0].item()


def _ordered_dict(items: object = ()) -> dict[object, object]:
    if not isinstance(items, list | tuple) or not all(
        isinstance(item, list | tuple) and len(item) == 2 for item in items
    ):
        raise CheckpointError("an OrderedDict is not described as Python does it.")
    return {_key(key): value for key, value in items}


def _key(key: object) -> object:
    """A dictionary's key: hashing anything else may take forever, or the process down.

    Of long integers any number may share one hash.
    """
    if not isinstance(key, str | int):
        raise CheckpointError(f"a dictionary has a key of kind {type(key).__name__}.")
    if isinstance(key, int) and key.bit_length() > 32:
        raise CheckpointError(f"a dictionary has a key of {key.bit_length()} bits.")
    return key


def _version(text: object) -> str:
    if not isinstance(text, str):
        raise CheckpointError("a version is no text.")
    return text


def _size(dimensions: object = ()) -> tuple[object, ...]:
    return tuple(dimensions)  # type: ignore[arg-type]


def _items(items: object = ()) -> list[object]:
    """A set as the list that it is pickled as."""
    if not isinstance(items, list | tuple):
        raise CheckpointError("a set is not described as Python does it.")
    return list(items)


def _device(*where: object) -> str:
    return ":".join(str(part) for part in where if isinstance(part, str | int))


_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
_DTYPES = [
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "bool",
]

_VALUES: dict[_Global, object] = {
    **{_Global("torch", name): _StorageType(np.dtype(d)) for name, d in _STORAGES.items()},
    **{_Global("torch", name): name for name in _DTYPES},
}
_FUNCTIONS: dict[_Global, Callable[..., object]] = {
    _Global("collections", "OrderedDict"): _ordered_dict,
    _Global("_codecs", "encode"): _bytes,
    _Global("cebra.data.datatypes", "Offset"): Offset,
    _Global("numpy", "dtype"): _dtype,
    _Global("numpy.core.multiarray", "scalar"): _scalar,
    _Global("numpy._core.multiarray", "scalar"): _scalar,
    _Global("torch", "Size"): _size,
    _Global("torch._utils", "_rebuild_parameter"): _parameter,
    _Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Global("torch.torch_version", "TorchVersion"): _version,
    _Global("torch", "device"): _device,
    **{_Global(module, "set"): _items for module in ("__builtin__", "builtins")},
}
# Classes of CEBRA's estimator, its parts and its optimiser, which save(backend="torch") pickles
# whole. Nothing of them is imported or called: they become records.
_CLASSES = {
    r"cebra\.integrations\.sklearn\.cebra": r"CEBRA",
    r"cebra\.integrations\.sklearn\.dataset": r"SklearnDataset",
    r"cebra\.(data|distributions)\.\w+": r"[A-Z]\w*",  # of an adapted estimator
    r"cebra\.solver\.(base|single_session|multi_session)": r"\w+Solver",
    r"cebra\.models\.(model|layers|criterions|multiobjective)": r"_?[A-Z]\w*",
    r"torch\.nn\.modules\.\w+": r"[A-Z]\w*",
    r"torch\.optim\.adam": r"Adam",
    r"torch\._C": r"Generator",
    r"collections": r"defaultdict",
    r"__builtin__|builtins": r"slice|dict",
}


class _Machine:
    """Executes the pickle opcodes that torch.save writes (protocol 2), on a stack of plain data."""

    def __init__(self, archive: "_Archive") -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.allowance = 0  # items that may still be copied

    def run(self, pickle: bytes) -> object:
        """Return what the pickle describes."""
        self.allowance = len(pickle)
        operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(pickle)
        for opcode, argument, _ in operations:
            name = opcode.name
            if name == "BINUNICODE" and len(argument) > LONGEST_TEXT:
                raise CheckpointError(f"it holds a text of {len(argument)} characters.")
            if name in _PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in _PUSH_NEW:
                self.stack.append(_PUSH_NEW[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in _STEPS:
                _STEPS[name](self)
            elif name == "GLOBAL":
                self.stack.append(_look_up(*argument.split(" ", 1)))
            elif name not in ("PROTO", "STOP"):
                raise CheckpointError(
                    f"its pickle uses {name}, which torch.save does not write; it was refused."
                )
        return self.stack.pop()

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def make_tuple(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise CheckpointError("its pickle appends to what is no list.")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            return  # the optimiser's notes, by parameter
        if type(target) is not dict:
            raise CheckpointError("its pickle sets items of what is no dictionary.")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def count_copies(self, *values: Any) -> None:
        """Refuse to copy more items than the pickle writes: it has to name some many times."""
        self.allowance -= sum(len(x) for x in values if isinstance(x, _SIZED))
        if self.allowance < 0:
            raise CheckpointError("its pickle copies the same items again and again.")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise CheckpointError("its pickle calls what is no function.")
        self.count_copies(*arguments)
        make = _FUNCTIONS.get(function)
        self.stack.append(Record(function.name) if make is None else make(*arguments))

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self.count_copies(state)
        match target, state:
            case Offset(), (None, {"left": int(left), "right": int(right)}):
                target.left, target.right = left, right
            case DType(), (_, str(order), *_) if order in tuple("<>|="):
                target.dtype = target.dtype.newbyteorder(order)  # type: ignore[arg-type]
            case Record(), dict():
                target.attributes.update(state)
            case Record(), _:
                pass  # of a random generator, say
            case ((dict() | str()), dict()):
                pass  # torch's notes on a state dict, a version's attributes
            case _:
                raise CheckpointError("its pickle sets the state of what has none.")

    def load_storage(self) -> None:
        match self.stack.pop():
            case ("storage", _StorageType(dtype), str(key), str(), int(count)):
                self.stack.append(self.archive.storage(key, dtype, count))
            case _:
                raise CheckpointError("a storage is not described as torch does it.")


_SIZED = str | bytes | list | tuple | dict
_PUSH_ARGUMENT = frozenset(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"])
_PUSH_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda m: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m: m.make_tuple(1),
    "TUPLE2": lambda m: m.make_tuple(2),
    "TUPLE3": lambda m: m.make_tuple(3),
    "APPEND": lambda m: m.extend([m.stack.pop()]),
    "APPENDS": lambda m: m.extend(m.since_mark()),
    "SETITEM": lambda m: m.update([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m: m.update(m.since_mark()),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.load_storage,
}


def _look_up(module: str, name: str) -> object:
    key = _Global(module, name)
    if key in _FUNCTIONS:
        return key
    if key in _VALUES:
        return _VALUES[key]
    if any(re.fullmatch(m, module) and re.fullmatch(n, name) for m, n in _CLASSES.items()):
        return key
    raise CheckpointError(
        f"it asks for {module}.{name}, which no CEBRA checkpoint needs; it was refused, and "
        "nothing of the file was executed."
    )


class _Archive:
    """The records of a torch zip file."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self._file = file
        names = file.namelist()
        if len(set(names)) != len(names):
            raise CheckpointError("it holds several records of one name.")
        if any(name.startswith("/") or ".." in re.split(r"[/\\]", name) for name in names):
            raise CheckpointError("it holds a record whose name leads out of it.")
        claimed = sum(info.file_size for info in file.infolist())
        if claimed > size:  # compressed, overlapping or untrue
            raise CheckpointError(f"its records claim {claimed} bytes, but it has only {size}.")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            number = "several" if pickles else "no"
            raise CheckpointError(f"it holds {number} data.pkl, torch.save did not write it.")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self.read("byteorder") if f"{self._root}byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise CheckpointError(f"its byte order {order!r} is unknown.")
        self._is_big_endian = order == b"big"
        self._storages: dict[str, _Storage] = {}

    def read(self, record: str) -> bytes:
        """Read the bytes of a record; torch stores them uncompressed."""
        try:
            info = self._file.getinfo(self._root + record)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"record {record!r} is compressed, which torch never does.")
            return self._file.read(info)
        except KeyError:
            raise CheckpointError(f"record {record!r} is missing.") from None

    def storage(self, key: str, dtype: np.dtype, count: int) -> _Storage:
        """Read a storage once, in this machine's byte order."""
        if key not in self._storages:
            data = self.read(f"data/{key}")
            if len(data) != count * dtype.itemsize:
                raise CheckpointError(
                    f"storage {key!r} should hold {count} elements of {dtype}, but has {len(data)} "
                    "bytes."
                )
            values = np.frombuffer(data, dtype)
            if self._is_big_endian:
                values = values.byteswap()
            self._storages[key] = _Storage(values)
        storage = self._storages[key]
        if storage.values.dtype != dtype or storage.values.size != count:
            raise CheckpointError(f"storage {key!r} is described in two ways.")
        return storage

    def unpickle(self) -> object:
        """The object that was saved."""
        return _Machine(self).run(self.read("data.pkl"))


def read_torch_zip(path: str | os.PathLike[str]) -> object:
    """Read a file that ``torch.save`` wrote as plain containers, numbers and NumPy arrays.

    Tensors come as read-only arrays with their dtype, wherever they were saved from; torch's dtypes
    come as their names, NumPy's as :class:`DType`, CEBRA's offset as :class:`Offset`, objects of
    CEBRA's and torch's classes as :class:`Record`.

    Raises:
        CheckpointError: Not a torch zip file, a damaged one, or one whose pickle asks for anything
            but the data that a CEBRA checkpoint is made of. Nothing of it is executed.
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file:
        try:
            return _Archive(zipfile.ZipFile(file), os.fstat(file.fileno()).st_size).unpickle()
        except CheckpointError as error:
            raise CheckpointError(f"Cannot read {str(path)!r}: {error}") from None
        except Exception as error:  # whatever a damaged file makes the parsers stumble over
            raise CheckpointError(
                f"Cannot read {str(path)!r}: it is truncated, damaged or no file of torch.save "
                f"({type(error).__name__}: {error})."
            ) from error
