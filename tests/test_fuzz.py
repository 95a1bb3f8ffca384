"""Damaged and hostile input: only the library's own errors, in bounded memory and time.

Hypothesis makes the same cases in every run. What was found is kept as tests of its own: here, as
``BOMBS`` in ``test_torch_zip.py``, and as ``test_damaged_descriptions`` in ``test_checkpoints.py``.
"""

import contextlib
import copy
import io
import itertools
import json
import pickletools
import resource
import signal
import struct
import tracemalloc
import warnings
import zipfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck

import cebra_jax_metrics as cjm
from cebra_jax_metrics import CheckpointError
from cebra_jax_metrics.arrays import check_finite
from cebra_jax_metrics.cli import files, main
from cebra_jax_metrics.model import CHUNK, encode_recording
from tests.test_torch_zip import FLOATS, estimator, expanded, module, pack, payload, storage

CASES = {
    "bytes of a torch file": 2500,
    "opcodes": 3500,
    "members": 1500,
    "bytes of our file": 1500,
    "header": 2000,
    "command line": 600,
}
SECONDS = 30  # for a case that takes milliseconds: not a timing, but an end to what never ends
MEGABYTES = 512  # that the process may grow by, compiled functions included

EDITS = ("flip", "cut", "drop", "repeat", "swap", "put")
NUMBERS = (0, 1, 2, 3, 8, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1)
integers = st.integers(0, 2**20)
edits = st.lists(st.tuples(st.sampled_from(EDITS), integers, integers), min_size=1, max_size=4)


def test_there_are_enough_cases():
    assert sum(CASES.values()) >= 10_000


def fuzz(name, strategy, check):
    """Check so many cases, each of them within time, all within memory.

    ``check`` tells whether the input was taken. Enough of it has to be taken, and enough refused:
    or the edits would do nothing, or the first look would end them all.
    """

    def stop(*_):
        pytest.fail(f"a case took more than {SECONDS} s")  # no Exception: no reader catches it

    taken, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def checked(case):
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of numbers too large for float32
                taken.append(check(case))
        finally:
            signal.alarm(0)

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        hypothesis.settings(
            max_examples=CASES[name],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(hypothesis.given(strategy)(checked))()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert len(taken) >= CASES[name]
    assert 0.03 < np.mean(taken) < 0.97
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < MEGABYTES


def edited(data, changes):
    """Bytes after edits of their bits, bytes and numbers."""
    data = bytearray(data)
    for kind, where, what in changes:
        start = where % (len(data) + 1)
        stop = start + what % 64
        match kind:
            case "flip" if start < len(data):
                data[start] ^= 1 << what % 8
            case "cut":
                del data[start:]
            case "drop":
                del data[start:stop]
            case "repeat":
                data[start:start] = data[start:stop]
            case "swap":
                middle = (start + stop) // 2
                data[start:stop] = data[middle:stop] + data[start:middle]
            case "put":
                number = NUMBERS[what % len(NUMBERS)] % 2**64
                size = (1, 2, 4, 8)[what // len(NUMBERS) % 4]
                data[start : start + size] = number.to_bytes(8, "little")[:size]
    return bytes(data)


def check_load(path):
    """A file is refused in the library's words, or becomes a checkpoint that can be used."""
    try:
        checkpoint = cjm.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert len(str(error)) < 100_000  # noqa: PT017
        return False
    assert len(repr(checkpoint)) < 1000
    again = path.with_name("again.safetensors")
    cjm.save(checkpoint, again)
    assert cjm.load(again).settings.keys() == checkpoint.settings.keys()
    with contextlib.suppress(ValueError, NotImplementedError):
        cjm.goodness_of_fit_history(checkpoint)
    return True


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def written(tmp_path, golden_folder):
    """A checkpoint in our own file."""
    path = tmp_path / "written.safetensors"
    cjm.save(cjm.load(golden_folder / "offset1-model.pt"), path)
    return path.read_bytes()


# Torch files


@pytest.mark.heavy
def test_bytes_of_a_torch_file(file, golden_folder):
    whole = (golden_folder / "offset1-model.pt").read_bytes()

    def check(changes):
        file.write_bytes(edited(whole, changes))
        return check_load(file)

    fuzz("bytes of a torch file", edits, check)


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path, members, **options):
    """Write a zip file of names, not all of them different, and what they hold."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, data)


OPCODES = [
    *(bytes([code]) for code in b"(.)]}N\x88\x89tesuabRQ\x81\x85\x86\x87"),
    *(b"h" + bytes([i]) for i in range(8)),
    *(b"q" + bytes([i]) for i in range(4)),
    *(b"J" + struct.pack("<i", number) for number in (-1, 0, 3, 2**31 - 1)),
    *(b"\x8a\x09" + number.to_bytes(9, "little") for number in (2**31, 2**62, 2**64)),
    *(b"G" + struct.pack(">d", x) for x in (np.nan, np.inf, -1.0, 1e308)),
    *(b"X" + struct.pack("<I", len(x)) + x for x in (b"", b"0", b"cosine", b"\xed\xa0\x80")),
    *(
        f"c{name}\n".encode()
        for name in (
            "torch\nSize",
            "torch\nFloatStorage",
            "torch.nn.modules.linear\nLinear",
            "torch._utils\n_rebuild_tensor_v2",
            "collections\nOrderedDict",
            "builtins\nset",
            "numpy\ndtype",
            "numpy._core.multiarray\nscalar",
            "cebra.data.datatypes\nOffset",
            "os\nsystem",
        )
    ),
]


def edited_opcodes(pickled, changes):
    """A pickle after edits of its opcodes, as whole ones mostly."""
    starts = [place for _, _, place in pickletools.genops(pickled)]
    codes = [pickled[a:b] for a, b in itertools.pairwise([*starts, len(pickled)])]
    for kind, where, what in changes:
        start = where % (len(codes) + 1)
        stop = start + 1 + what % 8
        match kind:
            case "flip" if start < len(codes):
                codes[start] = edited(codes[start], [("flip", what // 8, what)])
            case "put":
                codes[start : start + what % 2] = [OPCODES[what // 2 % len(OPCODES)]]
            case "drop":
                del codes[start:stop]
            case "repeat":
                codes[start:start] = codes[start:stop] * (1 + what % 5)
            case "swap":
                codes[start:stop] = reversed(codes[start:stop])
            case "cut":
                other = what % (len(codes) + 1)
                codes[start : start + 1] = codes[other : other + 1]
    return b"".join(codes)


@pytest.mark.heavy
def test_opcodes(tmp_path, file, golden_folder):
    """The pickle is edited inside the zip file, so that what reads it is reached."""
    whole = tmp_path / "estimator.pt"
    parameters = {key: expanded(shape) for key, shape in (("weight", (2, 1)), ("bias", (2,)))}
    pack(whole, estimator(module({}, {"net": module(parameters, {}, memo=1)})), FLOATS)
    plain = pack(tmp_path / "plain.pt", payload({"temperature": 0.5}, loss=[1.0, 2.0]), FLOATS)
    golden = [golden_folder / f"{name}.pt" for name in ("criterion_cosine_auto", "multisession")]
    sources = [members_of(path) for path in (*golden, plain, whole)]

    def check(case):
        source, changes = case
        members = dict(sources[source])
        (name,) = (name for name in members if name.endswith("data.pkl"))
        members[name] = edited_opcodes(members[name], changes)
        rezip(file, members.items())
        return check_load(file)

    fuzz("opcodes", st.tuples(st.integers(0, len(sources) - 1), edits), check)


NAMES = ("../evil", "/evil", "a/../../evil", "a\\..\\evil", ".", "data.pkl", "a/data.pkl", "é")
MEMBER_EDITS = ("drop", "rename", "again", "resize", "compress", "claim", "encrypt", "overlap")
member_edits = st.lists(
    st.tuples(st.sampled_from(MEMBER_EDITS), integers, integers), min_size=1, max_size=3
)
CENTRAL = b"PK\x01\x02"


@pytest.mark.heavy
def test_members(file, golden_folder):
    """Names, sizes, methods and places of what is in the zip file."""
    source = list(members_of(golden_folder / "offset1-model.pt").items())

    def check(changes):
        members, later, options = list(source), [], {}
        for kind, where, what in changes:
            place = where % len(members)
            name, data = members[place]
            match kind:
                case "drop":
                    del members[place]
                case "rename":
                    members[place] = NAMES[what % len(NAMES)], data
                case "again":
                    members.append((name, members[what % len(members)][1]))
                case "resize":
                    members[place] = name, (data * 3)[: what % (3 * len(data) + 1)]
                case "compress":
                    options["compression"] = (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[what % 2]
                case _:
                    later.append((kind, where, what))
        rezip(file, members, **options)
        data = bytearray(file.read_bytes())
        entries = [i for i in range(len(data)) if data[i : i + 4] == CENTRAL]
        for kind, where, what in later:
            entry = entries[where % len(entries)]
            other = entries[what % len(entries)]
            number = (NUMBERS[what % len(NUMBERS)] % 2**32).to_bytes(4, "little")
            match kind:
                case "claim":
                    data[entry + 20 : entry + 28] = number * 2  # sizes, packed and not
                case "encrypt":
                    data[entry + 8] |= 1
                case "overlap":
                    data[entry + 42 : entry + 46] = data[other + 42 : other + 46]
        file.write_bytes(data)
        is_taken = check_load(file)
        assert {path.name for path in file.parent.iterdir()} <= {file.name, "again.safetensors"}
        return is_taken

    fuzz("members", member_edits, check)


# Our own file


@pytest.mark.heavy
def test_bytes_of_our_file(file, written):
    def check(changes):
        file.write_bytes(edited(written, changes))
        return check_load(file)

    fuzz("bytes of our file", edits, check)


VALUES = [
    *(None, True, 0, -1, 1, 7, 2.5, 2**31, 2**62, 2**64, -(2**62), 10**300, 1e308, float("nan")),
    *("", "0", "cosine", "infonce", "auto", "F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4"),
    *("C64", "I64", "BOOL", "U8", "offset10-model", "a" * 3000, "\ud800"),
    *([], {}, [[]], [1, 2], ["a"], {"a": 1}, [{"dtype": "float32", "shape": [3, 2**62]}], [2**62]),
    [0] * 100,
]
KEYS = ("a", "", "settings", "label_types", "batch_size", "__metadata__", "history", "total")


def nodes(tree, path=()):
    """Paths of keys to everything in a JSON value."""
    inner = tree.items() if type(tree) is dict else enumerate(tree) if type(tree) is list else ()
    for key, value in inner:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def edited_json(tree, changes):
    tree = copy.deepcopy(tree)
    for kind, where, what in changes:
        paths = list(nodes(tree))
        if not paths:
            return tree
        *parents, key = paths[where % len(paths)]
        holder = tree
        for parent in parents:
            holder = holder[parent]
        value = copy.deepcopy(VALUES[what % len(VALUES)])
        match kind:
            case "drop":
                del holder[key]
            case "repeat" if type(holder) is list:
                holder.extend(holder[key : key + 1] * (1 + what % 3))
            case "swap" if type(holder) is dict:
                holder[KEYS[what % len(KEYS)]] = holder.pop(key)
            case _:
                holder[key] = value
    return tree


@pytest.mark.heavy
def test_header(file, written):
    """Names, kinds, shapes and places of the arrays, and what the checkpoint says of itself."""
    size = int.from_bytes(written[:8], "little")
    header, data = json.loads(written[8 : 8 + size]), written[8 + size :]
    description = json.loads(header["__metadata__"]["checkpoint"])
    description["settings"] |= {"label_types": [{"dtype": "float32", "shape": [120, 2]}]}

    def check(case):
        is_inner, changes = case
        tree = copy.deepcopy(header)
        inner = edited_json(description, changes) if is_inner else description
        tree["__metadata__"]["checkpoint"] = json.dumps(inner)
        text = json.dumps(tree if is_inner else edited_json(tree, changes)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return check_load(file)

    fuzz("header", st.tuples(st.booleans(), edits), check)


# Files that claim much, or unfold to much


@contextlib.contextmanager
def little_memory(most=2**24):
    """Python and NumPy allocate no more than that at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F32", "F64", "F8_E4M3", "U8"])
@pytest.mark.parametrize("shape", [[2**62], [2**31, 2**31], [2**62, 0], [2**64], [2**40]])
def test_arrays_that_claim_to_be_vast(file, dtype, shape):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}
    for text in (json.dumps({"a": entry}), json.dumps({"a": entry, "__metadata__": {}})):
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
        with little_memory(), pytest.raises(CheckpointError, match=str(file)):
            cjm.load(file)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1, 2**31, 100_000_000])
def test_headers_that_claim_to_be_vast(file, size):
    file.write_bytes(size.to_bytes(8, "little") + b"{}" + bytes(100))
    with little_memory(), pytest.raises(CheckpointError, match=str(file)):
        cjm.load(file)


def test_storages_that_claim_to_be_vast(file):
    pack(file, storage(count=2**62), FLOATS)
    with little_memory(), pytest.raises(CheckpointError, match="should hold"):
        cjm.load(file)


def test_members_that_claim_to_be_vast(file):
    """Sizes of 2**62 bytes in the fields of zip64."""
    pack(file, storage(), FLOATS)
    data = file.read_bytes()
    entry = data.rindex(CENTRAL)
    length = struct.unpack_from("<H", data, entry + 28)[0]
    end = entry + 46 + length
    extra = struct.pack("<HHQQ", 1, 16, 2**62, 2**62)
    fields = bytearray(data[entry:end])
    fields[20:28] = b"\xff" * 8
    fields[30:32] = struct.pack("<H", len(extra))
    tail = bytearray(data[end:])
    directory = struct.unpack_from("<I", tail, 12)[0]
    tail[12:16] = struct.pack("<I", directory + len(extra))
    file.write_bytes(data[:entry] + fields + extra + tail)
    with zipfile.ZipFile(file) as archive:
        assert archive.infolist()[-1].file_size == 2**62
    with little_memory(), pytest.raises(CheckpointError, match="records claim 46"):
        cjm.load(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs(file, method):
    pack(file, None, bytes(2**26), compression=method)
    assert file.stat().st_size < 2**18
    with little_memory(), pytest.raises(CheckpointError, match=r"records claim|compressed"):
        cjm.load(file)


def test_members_that_overlap(file):
    """Many names of one record: small as a file, large as what it holds."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/data/0", bytes(2**20))
        for i in range(1, 64):
            info = copy.copy(archive.getinfo("a/data/0"))
            info.filename = f"a/data/{i}"
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    with little_memory(), pytest.raises(CheckpointError, match="records claim"):
        cjm.load(file)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a/data/../../../b", "a\\..\\..\\b"])
def test_names_that_lead_out(file, name):
    rezip(file, [("a/data.pkl", b"\x80\x02N."), (name, b"evil")])
    with pytest.raises(CheckpointError, match="leads out"):
        cjm.load(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# The command line


def check_command(*arguments):
    """It answers, or says in one line what is wrong; which of them."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main(["--no-cache", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2), errors.getvalue()
    lines = errors.getvalue().splitlines()
    assert all(line.startswith("cebra-jax-metrics: ") for line in lines)
    assert sum(line.startswith("cebra-jax-metrics: error: ") for line in lines) == (code == 2)
    assert bool(out.getvalue()) == (code == 0)
    return code == 0


@pytest.mark.heavy
def test_command_line(tmp_path, golden_folder, recording, written):
    """Files of arrays and of models, damaged as files and inside."""
    X = recording["X"][:30]
    arrays = {"X": X, "y": recording["position"][:30]}
    model, npz, npy = tmp_path / "model", tmp_path / "data.npz", tmp_path / "data.npy"
    np.savez(npz, **arrays)
    np.save(npy, X)
    members, alone = members_of(npz), npy.read_bytes()
    torch = (golden_folder / "offset1-model.pt").read_bytes()
    sound = golden_folder / "offset1-model.pt"

    def check(case):
        kind, changes = case
        match kind:
            case "info":
                model.write_bytes(edited(written, changes))
                return check_command("info", model)
            case "torch":
                model.write_bytes(edited(torch, changes))
                return check_command("info", model)
            case "npz":
                np.savez(npz, **arrays)
                npz.write_bytes(edited(npz.read_bytes(), changes))
                return check_command("score", sound, npz, "--num-batches", 2)
            case "member":
                rezip(npz, {**members, "X.npy": edited(members["X.npy"], changes)}.items())
                return check_command("score", sound, npz, "--num-batches", 2)
            case "npy":
                npy.write_bytes(edited(alone, changes))
                return check_command("consistency", npy, npy, "--between", "runs")

    kinds = st.sampled_from(["info", "torch", "npz", "member", "npy"])
    fuzz("command line", st.tuples(kinds, edits), check)


def test_members_that_are_no_arrays(tmp_path, golden_folder, recording):
    """Found by fuzzing: NumPy gives their bytes, whatever their names say."""
    np.savez(tmp_path / "data.npz", X=recording["X"], y=recording["position"])
    members = members_of(tmp_path / "data.npz")
    rezip(tmp_path / "data.npz", [("text.npy", b"text"), ("text", b""), *members.items()])
    model = golden_folder / "offset1-model.pt"
    assert check_command("score", model, tmp_path / "data.npz", "--num-batches", 2)


def test_bombs_of_arrays(tmp_path, golden_folder, recording, monkeypatch, capsys):
    """Zeros compress a thousandfold; where that would fill the memory, nothing is unpacked."""
    model, path = golden_folder / "offset1-model.pt", tmp_path / "data.npz"
    arrays = {"X": recording["X"], "y": recording["position"]}
    np.savez_compressed(path, **arrays, zeros=np.zeros(2 * 10**5))
    assert check_command("score", model, path, "--num-batches", 2)
    monkeypatch.setattr(files, "MOST_BYTES", 10**6)
    assert check_command("score", model, path, "--num-batches", 2)  # but a few times its size
    np.savez_compressed(path, **arrays, zeros=np.zeros(2 * 10**7))
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match=r"data\.npz.*0\.1 GiB, over 300 times its size"):
        files.Recording(str(path))


# Values that are not finite


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.float64, lambda x: x.astype("f2")])
@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
def test_first_value_that_is_not_finite(kind, value, word):
    x = np.zeros((100, 7), np.float32)
    x[17, 3] = x[17, 5] = x[40, 0] = value
    with pytest.raises(
        ValueError, match=rf"^Input contains {word}.*, first at row 17, column 3 \(counted from 0\)"
    ):
        check_finite(kind(x), "X")
    with pytest.raises(ValueError, match=rf"{word}.*first at row 17 \(counted from 0\)"):
        check_finite(kind(x[:, 3]), "X")
    with pytest.raises(ValueError, match=rf"{word}.*first at row 1017, column 3"):
        check_finite(kind(x), "X", start=1000)
    check_finite(kind(np.zeros_like(x)), "X")


def test_nan_is_named_before_infinity():
    x = np.zeros((9, 2), np.float32)
    x[2, 0], x[5, 1] = np.inf, np.nan
    with pytest.raises(ValueError, match="contains NaN, first at row 5, column 1"):
        check_finite(x, "X")


def test_values_too_large_for_float32():
    x = np.zeros((9, 2))
    x[6, 1] = 1e300
    with pytest.raises(ValueError, match=r"too large for float32, first at row 6, column 1"):
        check_finite(x, "X")


@pytest.mark.parametrize("row", [0, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 8])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_rows_of_recordings_that_are_read_in_chunks(row, pad, kind):
    encoder = cjm.Encoder.init(jax.random.key(0), "offset10-model", 3, 2, 2)
    X = np.zeros((3 * CHUNK + 9, 3), np.float32)
    X[row, 2] = np.nan
    with pytest.raises(ValueError, match=f"NaN, first at row {row}, column 2"):
        cjm.embed(cjm.Model((encoder,)), kind(X), pad=pad)


def test_rows_of_recordings_that_are_spread_over_devices():
    encoder = cjm.Encoder.init(jax.random.key(0), "offset10-model", 3, 2, 2)
    X = np.zeros((3 * CHUNK + 9, 3), np.float32)
    X[CHUNK + 100, 1] = np.inf
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for x in (X, jnp.asarray(X)):
        with pytest.raises(ValueError, match=f"infinity.*row {CHUNK + 100}, column 1"):
            encode_recording(encoder, x, mesh=mesh)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_rows_of_labels(value):
    y = np.zeros((50, 2))
    y[31, 1] = value
    with pytest.raises(ValueError, match="first at row 31, column 1"):
        cjm.samplers.TimeDelta(y)
    with pytest.raises(ValueError, match=r"first at row 31 \(counted from 0\)"):
        cjm.samplers.TimeDelta(y[:, 1])


@pytest.mark.parametrize("wrong", ["X", "position"])
def test_rows_of_scores(golden_folder, recording, wrong):
    data = {name: recording[name].copy() for name in ("X", "position")}
    data[wrong][77, 1] = np.nan
    with pytest.raises(ValueError, match="Input contains NaN, first at row 77, column 1"):
        cjm.infonce_loss(golden_folder / "offset1-model.pt", *data.values())
