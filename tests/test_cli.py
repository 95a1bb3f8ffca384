"""The command line: what it prints, and one line for every mistake."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import cebra_jax_metrics as cjm

GOLDEN = Path(__file__).parent / "golden"
RECORDING = GOLDEN / "recording.npz"
SINGLE = GOLDEN / "offset10-model.pt"
FAST = GOLDEN / "offset1-model.pt"
TIME = GOLDEN / "time.pt"
MULTI = GOLDEN / "multisession.pt"
FEW = ("--num-batches", 3)
KEYS = {
    "schema_version",
    "goodness_of_fit_bits",
    "goodness_of_fit_stderr_bits",
    "infonce_nats",
    "infonce_stderr_nats",
    "align_nats",
    "uniform_nats",
    "chance_nats",
    "num_negatives",
    "num_batches",
    "num_steps",
    "session",
    "seed",
}


@pytest.fixture
def score(run):
    """Run ``score --json`` and return its numbers, all finite or null."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    def score(*arguments):
        code, out, err = run("score", *arguments, "--json")
        assert (code, err) == (0, "")
        result = json.loads(out, parse_constant=refuse)
        assert result.keys() == KEYS
        assert len(out.splitlines()) == 1
        return result

    return score


@pytest.fixture
def save_npz(tmp_path, recording):
    """Write the golden recording with other arrays, or without some."""

    def save_npz(**arrays):
        arrays = {name: x for name, x in {**recording, **arrays}.items() if x is not None}
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return save_npz


# score


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("offset10-model", ["position"]),
        ("discrete", ["direction"]),
        ("mixed", ["position", "direction"]),
        ("time", []),
        ("criterion_euclidean_auto", ["position"]),
    ],
)
def test_score(score, recording, name, labels):
    model = GOLDEN / f"{name}.pt"
    result = score(model, RECORDING, *FEW)
    assert score(model, RECORDING, *FEW, "--data", "X", "--labels", *labels) == result
    arrays = [recording[label] for label in labels]
    estimate = cjm.goodness_of_fit_score(
        model, recording["X"], *arrays, num_batches=3, key=jax.random.key(0), return_estimate=True
    )
    expected = {
        "schema_version": 1,
        "goodness_of_fit_bits": estimate.bits,
        "goodness_of_fit_stderr_bits": estimate.bits_stderr,
        "infonce_nats": estimate.loss,
        "infonce_stderr_nats": estimate.stderr,
        "align_nats": estimate.align,
        "uniform_nats": estimate.uniform,
        "chance_nats": np.log(16),
        "num_negatives": 16,
        "num_batches": 3,
        "num_steps": 120,
        "session": None,
        "seed": 0,
    }
    for key, value in expected.items():
        assert result[key] == (value if value is None else pytest.approx(float(value), abs=2e-5))


@pytest.mark.parametrize(("session", "num_steps"), [(0, 120), (1, 100)])
def test_score_of_a_session(score, recording, session, num_steps):
    result = score(MULTI, RECORDING, *FEW, "--session", session)
    assert (result["session"], result["num_steps"]) == (session, num_steps)
    X, position = ("X_1", "position_1") if session else ("X", "position")
    bits = cjm.goodness_of_fit_score(
        MULTI, recording[X], recording[position], session_id=session, num_batches=3
    )
    assert result["goodness_of_fit_bits"] == pytest.approx(bits, abs=2e-5)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        (("--rows", "20:100"), slice(20, 100)),
        (("--rows", "20:"), slice(20, None)),
        (("--rows", ":-20"), slice(-20)),
        (("--rows=-60:-10",), slice(-60, -10)),
        (("--rows", ":"), slice(None)),
        (("--rows", "20:10000"), slice(20, None)),
    ],
)
def test_rows(score, save_npz, recording, rows, kept):
    result = score(FAST, RECORDING, *FEW, *rows)
    cut = save_npz(X=recording["X"][kept], place=recording["position"][kept])
    assert score(FAST, cut, *FEW, "--labels", "place") == result
    assert result["num_steps"] == len(recording["X"][kept])


def test_seeds(score):
    first = score(FAST, RECORDING, *FEW, "--seed", 1)
    assert first["seed"] == 1
    assert score(FAST, RECORDING, *FEW, "--seed", 1) == first
    assert score(FAST, RECORDING, *FEW)["infonce_nats"] != first["infonce_nats"]


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**70])
def test_large_seeds(run, seed):
    """JAX's keys hold 32 bits of a seed: a larger one must not silently be another's draws."""
    code, out, err = run("score", FAST, RECORDING, *FEW, "--seed", seed)
    if code == 0:
        assert run("score", FAST, RECORDING, *FEW)[1] != out
    else:
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1


def test_hybrid_model(run):
    """Both objectives alone too; the bits belong to the losses and to chance."""
    arguments = "score", GOLDEN / "hybrid.pt", RECORDING, *FEW
    result = json.loads(run(*arguments, "--json")[1])
    assert result.keys() == KEYS | {"parts"}
    bits = (result["chance_nats"] - result["infonce_nats"]) / np.log(2)
    assert result["goodness_of_fit_bits"] == pytest.approx(bits, abs=1e-5)
    parts = [part["goodness_of_fit_bits"] for part in result["parts"].values()]
    assert sum(parts) == pytest.approx(bits, abs=1e-5)
    lines = run(*arguments)[1].splitlines()[-2:]
    assert [line.split()[0] for line in lines] == ["behavior", "time"]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(parts, abs=1e-4)


def test_one_batch_has_no_standard_error(score):
    result = score(TIME, RECORDING, "--num-batches", 1)
    assert result["goodness_of_fit_stderr_bits"] is None
    assert result["infonce_stderr_nats"] is None
    assert np.isfinite(result["goodness_of_fit_bits"])


def test_score_as_text(run, score):
    code, out, err = run("score", FAST, RECORDING, *FEW)
    result = score(FAST, RECORDING, *FEW)
    assert (code, err) == (0, "")
    assert f"goodness of fit  {result['goodness_of_fit_bits']:.4f} ± " in out
    assert f"InfoNCE          {result['infonce_nats']:.4f} ± " in out
    assert "3 batches of 16 on 120 time steps" in out


@pytest.mark.parametrize(
    "more",
    [
        {"scalar": np.float64(1), "text": np.array("x")},
        {"Z": np.zeros((7, 120)), "weights": np.zeros(120)},
        {"X": np.arange(840).reshape(120, 7).astype(np.uint16), "position": np.zeros((120, 2))},
    ],
)
def test_arrays_that_do_not_fit_are_left_alone(score, save_npz, more):
    assert np.isfinite(score(FAST, save_npz(**more), *FEW)["infonce_nats"])


def test_named_arrays_among_several(score, save_npz, recording):
    twice = save_npz(Y=recording["X"], place=recording["position"])
    expected = score(FAST, RECORDING, *FEW)
    assert score(FAST, twice, *FEW, "--data", "Y", "--labels", "place") == expected


# info


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "offset10-model",
            [
                "architecture offset10-model, window of 10 time steps",
                "sizes        6 hidden units, 3 dimensions",
                "sessions     1, neurons: 7",
                "similarity   cosine",
                "temperature  1, fixed",
                "labels 0     float32 (120, 2)",
            ],
        ),
        ("multisession", ["sessions     2, neurons: 7, 5", "float32 (120, 2), float32 (100, 2)"]),
        ("mixed", ["labels 0     float32 (120, 2)", "labels 1     int64 (120,)"]),
        ("hybrid", ["hybrid True", "3 steps; bits: "]),
        ("full_batch", ["batch_size None", "3 steps; no bits: "]),
        ("criterion_cosine_auto", ["temperature  0.4, learned"]),
        ("criterion_euclidean_constant", ["similarity   euclidean", "temperature  2, fixed"]),
    ],
)
def test_info(run, tmp_path, name, lines):
    code, out, err = run("info", GOLDEN / f"{name}.pt")
    assert (code, err) == (0, "")
    for line in [*lines, "history      3 steps; ", "cebra 0.6.1, torch 2."]:
        assert line in out
    assert run("convert", GOLDEN / f"{name}.pt", tmp_path / "own")[0] == 0
    assert run("info", tmp_path / "own") == (0, out, "")


def test_info_tells_the_history_in_bits(run):
    bits = cjm.goodness_of_fit_history(SINGLE)
    expected = ", ".join(f"{bit:.3f} (step {i})" for i, bit in enumerate(bits, start=1))
    assert f"3 steps; bits: {expected}" in run("info", SINGLE)[1]


@pytest.mark.parametrize("history", [{}, {"total": np.zeros(0)}, {"total": np.ones(3)}])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 16, "num_sessions": None}])
def test_info_on_checkpoints_that_know_little(run, tmp_path, history, settings):
    encoder = cjm.Encoder.init(jax.random.key(0), "offset1-model", 7, 4, 3)
    checkpoint = cjm.Checkpoint(cjm.Model((encoder,)), settings, history)
    cjm.save(checkpoint, tmp_path / "own")
    code, out, err = run("info", tmp_path / "own")
    assert (code, err) == (0, "")
    assert f"history      {len(history.get('total', ()))} steps" in out


# convert


@pytest.mark.parametrize("name", ["offset10-model", "criterion_cosine_auto", "mixed"])
def test_convert(run, tmp_path, name):
    source, target = GOLDEN / f"{name}.pt", tmp_path / "model.safetensors"
    code, out, err = run("convert", source, target)
    assert (code, err) == (0, "")
    assert str(target) in out
    before, after = (run("score", model, RECORDING, *FEW, "--json") for model in (source, target))
    assert before == after
    assert before[0] == 0


@pytest.mark.parametrize("other_name", [Path, Path.symlink_to, Path.hardlink_to])
def test_convert_onto_itself(run, tmp_path, other_name):
    source, target = tmp_path / "model.pt", tmp_path / "link"
    source.write_bytes(SINGLE.read_bytes())
    if other_name is Path:
        target = tmp_path / "." / "model.pt"
    else:
        other_name(target, source)
    code, out, err = run("convert", source, target)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "the one to read" in err
    assert source.read_bytes() == SINGLE.read_bytes()


def test_convert_that_fails_writes_nothing(run, tmp_path):
    target = tmp_path / "out"
    assert run("convert", RECORDING, target)[0] == 2
    target.write_text("kept")
    assert run("convert", RECORDING, target)[0] == 2
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"out": "kept"}


# Mistakes


@pytest.fixture(scope="module")
def files(tmp_path_factory, recording):
    """A folder of files that cannot be used, or not without choosing."""
    folder = tmp_path_factory.mktemp("files")
    X, position, direction = (recording[name] for name in ("X", "position", "direction"))
    for name, arrays in {
        "nan": {"X": np.where(np.arange(7) == 3, np.nan, X), "position": position},
        "infinite": {"X": np.where(np.arange(7) == 3, np.inf, X), "position": position},
        "nan_labels": {"X": X, "position": position * np.nan},
        "two": {"X": X, "Y": X, "position": position},
        "two_labels": {"X": X, "position": position, "place": position},
        "no_labels": {"X": X, "direction": direction},
        "text": {"X": X.astype(str), "position": position},
        "complex": {"X": X.astype(complex), "position": position},
        "one_dimension": {"X": X[:, 0], "position": position},
        "scalar": {"X": X, "position": position, "scalar": np.float64(1)},
        "nothing": {},
    }.items():
        np.savez(folder / f"{name}.npz", **arrays)
    np.save(folder / "array.npy", X)
    (folder / "text.txt").write_text("text")
    (folder / "empty").touch()
    whole = RECORDING.read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.npz").write_bytes(whole[:300] + bytes(300) + whole[600:])
    (folder / "truncated.pt").write_bytes(SINGLE.read_bytes()[:-10])
    checkpoint = cjm.load(SINGLE)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, checkpoint.model)
    cjm.save(dataclasses.replace(checkpoint, model=bad), folder / "nan_model")
    cjm.save(cjm.Checkpoint(checkpoint.model), folder / "bare_model")
    return folder


MISTAKES = {
    "missing model": ("score nothing.pt RECORDING", "nothing.pt"),
    "model is a folder": ("score . RECORDING", "directory"),
    "model is empty": ("score empty RECORDING", "empty"),
    "model is text": ("score text.txt RECORDING", "neither"),
    "model is a recording": ("score RECORDING RECORDING", "recording.npz"),
    "model is truncated": ("score truncated.pt RECORDING", "truncated.pt"),
    "model is not finite": ("score nan_model RECORDING --num-batches 3", "not finite"),
    "model does not know its labels": ("score bare_model RECORDING", "--labels"),
    "missing data": ("score SINGLE absent.npz", "No such file.*absent.npz"),
    "data is a folder": ("score SINGLE .", "directory"),
    "data is text": ("score SINGLE text.txt", "text.txt.*npz"),
    "data is empty": ("score SINGLE empty", "empty.*npz"),
    "data is one array": ("score SINGLE array.npy", "array.npy.*npz"),
    "data is a model": ("score SINGLE SINGLE", "npz"),
    "data is truncated": ("score SINGLE truncated.npz", "truncated.npz"),
    "data is damaged": ("score SINGLE damaged.npz", "damaged.npz"),
    "data without arrays": ("score SINGLE nothing.npz", "nothing.npz"),
    "data of another width": ("score SINGLE RECORDING --data X_1", r"7\).*5\)"),
    "data of one dimension": ("score SINGLE one_dimension.npz --data X", r"time, neurons"),
    "data of no dimension": ("score SINGLE scalar.npz --data scalar", "scalar|shape"),
    "data of no dimension, labels": (
        "score SINGLE scalar.npz --data scalar --labels position",
        "scalar|shape",
    ),
    "data with NaN": ("score SINGLE nan.npz", "NaN"),
    "data with infinity": ("score SINGLE infinite.npz", "infinity"),
    "data as text": ("score SINGLE text.npz", "Expected numbers.*U"),
    "complex data": ("score SINGLE complex.npz", "Complex data not supported.*complex"),
    "wrong name of the data": ("score SINGLE RECORDING --data Z", "'Z'.*X_1"),
    "wrong name of labels": ("score SINGLE RECORDING --labels Z", "'Z'.*X_1"),
    "two recordings": ("score SINGLE two.npz", "more than one.*--data"),
    "two kinds of labels": ("score SINGLE two_labels.npz", "more than one.*--labels"),
    "no labels": ("score SINGLE no_labels.npz", "no array.*--labels"),
    "labels with NaN": ("score SINGLE nan_labels.npz", "NaN"),
    "labels of another kind": ("score SINGLE RECORDING --labels direction", "[Ll]abels"),
    "labels of another length": ("score SINGLE RECORDING --labels position_1", "120.*100"),
    "labels of no dimension": ("score SINGLE scalar.npz --labels scalar", "scalar|shape"),
    "too many labels": ("score SINGLE RECORDING --labels position direction", "expects 1.*2"),
    "too few labels": ("score SINGLE RECORDING --labels", "expects 1.*0"),
    "no session": ("score MULTI RECORDING", "session_id"),
    "session too high": ("score MULTI RECORDING --session 2", "session_id 2"),
    "negative session": ("score MULTI RECORDING --session -1", "session_id -1"),
    "session of a single-session model": ("score SINGLE RECORDING --session 1", "session_id 1"),
    "session is no number": ("score SINGLE RECORDING --session x", "--session.*'x'"),
    "rows are no range": ("score SINGLE RECORDING --rows 5", "--rows.*'5'"),
    "rows are text": ("score SINGLE RECORDING --rows a:b", "--rows.*'a:b'"),
    "rows with a step": ("score SINGLE RECORDING --rows 1:50:2", "--rows.*'1:50:2'"),
    "rows beyond the end": ("score SINGLE RECORDING --rows 500:", "0 sample"),
    "rows backwards": ("score SINGLE RECORDING --rows 50:20", "0 sample"),
    "too few rows": ("score SINGLE RECORDING --rows :5", "5 sample"),
    "no batches": ("score SINGLE RECORDING --num-batches 0", "num_batches"),
    "negative batches": ("score SINGLE RECORDING --num-batches -3", "num_batches"),
    "batches are no number": ("score SINGLE RECORDING --num-batches x", "--num-batches.*'x'"),
    "negative seed": ("score SINGLE RECORDING --seed -1", "seed.*-1"),
    "info on nothing": ("info nothing.pt", "nothing.pt"),
    "info on a recording": ("info RECORDING", "recording.npz"),
    "convert nothing": ("convert nothing.pt out", "nothing.pt"),
    "convert a recording": ("convert RECORDING out", "recording.npz"),
    "convert into a missing folder": ("convert SINGLE nothing/out", "nothing/"),
    "convert into a file": ("convert SINGLE text.txt/out", "text.txt/"),
    "convert onto a folder": ("convert SINGLE .", "directory"),
    "unknown command": ("nonsense", "nonsense"),
    "unknown option": ("info SINGLE --nonsense", "--nonsense"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(run, files, monkeypatch, mistake):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    line, message = MISTAKES[mistake]
    known = {"RECORDING": RECORDING, "SINGLE": SINGLE, "MULTI": MULTI}
    code, out, err = run(*(known.get(word, word) for word in line.split()))
    assert (code, out) == (2, "")
    assert re.search(f"error: .*({message})", err), err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    assert sorted(files.iterdir()) == before


# As a program


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cebra_jax_metrics", *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_program(run):
    done = run_module("score", FAST, RECORDING, *FEW, "--json")
    expected = run("score", FAST, RECORDING, *FEW, "--json")
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_program_with_a_mistake():
    done = run_module("score", FAST, "nothing.npz")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_help(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in ("score", "info", "convert", "demo"))


def test_demo(run):
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert "place cells" in out
    assert out.count(" bits\n") == 4


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_bar_only_in_a_terminal(run, monkeypatch, is_terminal):
    """The bar waits a second before it shows: here the second is taken away."""

    def impatient(*arguments, **options):
        assert options.pop("delay") == 1
        return tqdm(*arguments, delay=0, mininterval=0, **options)

    monkeypatch.setattr("tqdm.tqdm", impatient)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    code, out, err = run("score", FAST, RECORDING, "--num-batches", 200, "--labels", "position")
    assert code == 0
    assert "bits" in out
    assert ("batches" in err) == is_terminal


def scored_in_a_process(*options, cache, **variables):
    command = [sys.executable, "-m", "cebra_jax_metrics", *options, "score", FAST, RECORDING]
    command += [*FEW, "--labels", "position"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **variables}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_compiled_functions_are_kept_in_the_cache_of_the_user(tmp_path):
    kept, other, broken = (tmp_path / name for name in ("kept", "other", "broken"))
    out = scored_in_a_process(cache=kept)
    stored = sorted((kept / "cebra_jax_metrics").glob("*_losses*"))
    assert stored
    before = [path.stat().st_mtime_ns for path in stored if path.name.endswith("-cache")]
    assert scored_in_a_process(cache=kept) == out
    after = sorted((kept / "cebra_jax_metrics").glob("*_losses*-cache"))
    assert [path.stat().st_mtime_ns for path in after] == before
    assert scored_in_a_process("--no-cache", cache=other) == out
    assert not other.exists()
    mine = tmp_path / "mine"
    assert scored_in_a_process(cache=other, JAX_COMPILATION_CACHE_DIR=str(mine)) == out
    assert not other.exists()
    broken.write_text("no folder")
    assert scored_in_a_process(cache=broken) == out


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "cebra_jax_metrics", "info", str(FAST)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, b"")


def test_pickled_objects_in_the_file_are_left_alone(score, save_npz):
    plain = score(FAST, save_npz(), *FEW, "--labels", "position")
    path = save_npz(notes=np.array([{"rat": "simulated"}], dtype=object))
    assert score(FAST, path, *FEW, "--labels", "position") == plain
