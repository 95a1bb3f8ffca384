"""The command line: what it prints, and one line for every mistake."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import cebra_jax_metrics as cjm
from cebra_jax_metrics.cli.parser import make_parser

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
    "model",
    "data",
    "method",
    "gain",
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
        "gain": 1,
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
    assert score(FAST, cut, *FEW, "--labels", "place") == {**result, "data": str(cut)}
    assert result["num_steps"] == len(recording["X"][kept])


@pytest.mark.parametrize(
    ("name", "rows", "place"),
    [
        ("X", "20:", "row 30, column 2"),
        ("X", "-100:", "row 30, column 2"),
        ("place", ":", "row 30"),
    ],
)
def test_values_that_are_not_finite_are_named_by_the_rows_of_the_file(
    run, save_npz, recording, name, rows, place
):
    arrays = {"X": recording["X"].copy(), "place": recording["position"].copy()}
    arrays[name][30, 2 if name == "X" else ...] = np.nan
    command = "score", FAST, save_npz(**arrays), *FEW, "--labels", "place"
    code, out, err = run(*command, f"--rows={rows}")
    assert (code, out) == (2, "")
    assert re.search(f"NaN, first at {place}", err)
    assert run(*command, "--rows=31:")[0] == 0


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
    assert "plain batches" not in out
    command = "score", TIME, RECORDING, "--num-batches", 40, "--method", "control_variates"
    gain = json.loads(run(*command, "--json")[1])["gain"]
    assert gain > 2
    assert run(*command)[1].endswith(f"as precise as    {40 * gain:.0f} plain batches\n")


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
    expected = {**score(FAST, RECORDING, *FEW), "data": str(twice)}
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
    before, after = (run("score", model, RECORDING, *FEW) for model in (source, target))
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
    (folder / "text.npy").write_text("text")
    (folder / "text.csv").write_text("1,2,3,4,5,6,7\n1,2,3,4,5,6,much\n")
    (folder / "ragged.csv").write_text("1,2\n1\n")
    (folder / "twice.csv").write_text("a,a\n1,2\n")
    (folder / "empty.csv").touch()
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
    "data is one array": ("score SINGLE array.npy", "--labels; the file has array float32"),
    "text for an array": ("score SINGLE text.npy --labels", "text.npy.*numpy.save"),
    "text in a table": ("score SINGLE text.csv --labels", "'much'.*column 7"),
    "lines of different lengths": ("score SINGLE ragged.csv --labels", "equally many"),
    "a table twice the same name": ("score SINGLE twice.csv --labels", "names that differ"),
    "an empty table": ("score SINGLE empty.csv --labels", "empty.csv"),
    "no recordings": ("score SINGLE SINGLE SINGLE", "MODEL.*DATA"),
    "no models": ("score RECORDING RECORDING RECORDING", "MODEL.*DATA"),
    "recordings first": ("score RECORDING SINGLE SINGLE", "MODEL.*DATA"),
    "one file": ("score SINGLE", "MODEL.*DATA"),
    "one of several does not fit": (
        "score SINGLE FAST RECORDING array.npy --num-batches 3 --labels position",
        "on array.npy: .*position",
    ),
    "unknown method": ("score SINGLE RECORDING --method x", "--method.*'x'"),
    "plot into a missing folder": ("score SINGLE RECORDING --plot no/out.png", "folder 'no'"),
    "test on fitted rows": ("test SINGLE RECORDING", "--held-out"),
    "test of a recording": ("test RECORDING RECORDING --held-out :", "recording.npz"),
    "test without labels": ("test TIME RECORDING --held-out :", "no labels to shift|Time"),
    "refit for how long": ("test SINGLE RECORDING --method refit", "--num-steps"),
    "shift with steps": ("test SINGLE RECORDING --held-out : --num-steps 3", "--num-steps"),
    "fit on nothing": ("fit absent.npz out", "absent.npz"),
    "fit on several arrays": ("fit RECORDING out", "more than one.*--data"),
    "fit of an unknown kind": (
        "fit RECORDING out --data X --architecture x --num-steps 3 --batch-size 8",
        "'x'",
    ),
    "fit without delta": (
        "fit RECORDING out --data X --labels position --conditional delta_normal --num-steps 3",
        "delta",
    ),
    "fit into a missing folder": ("fit RECORDING no/out --data X", "folder 'no'"),
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
    known = {"RECORDING": RECORDING, "SINGLE": SINGLE, "MULTI": MULTI, "FAST": FAST, "TIME": TIME}
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


# Several models and recordings, other kinds of files


def test_several_models_and_recordings(run, score, save_npz, recording):
    other = save_npz(X=recording["X"][:100], position=recording["position"][:100])
    command = "score", FAST, SINGLE, RECORDING, other, *FEW, "--labels", "position"
    code, out, err = run(*command, "--json")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    result = json.loads(out)
    assert result.keys() == {"schema_version", "scores"}
    pairs = [(model, data) for data in (RECORDING, other) for model in (FAST, SINGLE)]
    assert [(r["model"], r["data"]) for r in result["scores"]] == [
        (str(model), str(data)) for model, data in pairs
    ]
    alone = [score(*pair, *FEW, "--labels", "position") for pair in pairs]
    assert result["scores"] == alone
    head, *lines = run(*command)[1].splitlines()
    assert head.split() == ["model", "recording", "bits", "±", "nats", "steps"]
    assert len({len(line) for line in [head, *lines]}) == 1
    assert [line.split()[2] for line in lines] == [
        f"{r['goodness_of_fit_bits']:.4f}" for r in alone
    ]


def test_arrays_of_one_file_each_and_tables(score, tmp_path, recording):
    expected = score(FAST, RECORDING, *FEW, "--labels", "position")
    X, position = recording["X"], recording["position"]
    np.save(tmp_path / "spikes.npy", X)
    np.save(tmp_path / "place.npy", position)
    table = np.concatenate([position, X], axis=1)
    names = ",".join(["x", "y", *(f"cell {i}" for i in range(X.shape[1]))])
    for name, header in (("bare", ""), ("named", names)):
        np.savetxt(tmp_path / f"{name}.csv", table, delimiter=",", header=header, comments="")
    np.savetxt(tmp_path / "only.csv", X, delimiter=",", fmt="%.9g")
    np.savetxt(tmp_path / "place.csv", position, delimiter=",", fmt="%.9g")
    for data, labels in (
        ("spikes.npy", tmp_path / "place.npy"),
        ("spikes.npy", tmp_path / "place.csv"),
        ("only.csv", tmp_path / "place.npy"),
        ("named.csv", "x,y"),
    ):
        found = score(FAST, tmp_path / data, *FEW, "--labels", labels)
        assert found.pop("data") == str(tmp_path / data)
        for key, value in found.items():
            assert value == pytest.approx(expected[key], abs=1e-5)


def test_discrete_labels_of_a_table(score, tmp_path, recording):
    X, direction = recording["X"], recording["direction"]
    lines = [",".join(["direction", *(f"c{i}" for i in range(X.shape[1]))])]
    lines += [f"{d},{','.join(map(str, x))}" for d, x in zip(direction, X, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    model = GOLDEN / "discrete.pt"
    found = score(model, tmp_path / "table.csv", *FEW, "--labels", "direction")
    expected = score(model, RECORDING, *FEW)
    assert found["infonce_nats"] == pytest.approx(expected["infonce_nats"], abs=1e-5)


# test, fit, plots, and the program


def test_null(run, tmp_path):
    command = "test", SINGLE, RECORDING, "--held-out", ":", "--num-batches", 3, "--num-samples", 19
    code, out, err = run(*command, "--json", "--plot", tmp_path / "null.png")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["num_samples"] == 19
    assert 0.05 <= result["p_value"] <= 1
    effect = result["goodness_of_fit_bits"] - result["null_mean_bits"]
    assert result["effect_bits"] == pytest.approx(effect)
    assert (tmp_path / "null.png").read_bytes().startswith(b"\x89PNG")
    text = run(*command)[1].splitlines()
    assert text[0] == f"goodness of fit  {result['goodness_of_fit_bits']:.4f} bits"
    assert text[-1] == f"p                {result['p_value']:.4g}"


def test_null_of_refits(run):
    options = "--method", "refit", "--num-steps", 2, "--num-samples", 3, "--num-batches", 2
    code, out, err = run("test", FAST, RECORDING, *options, "--labels", "position", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["method"], result["num_samples"]) == ("refit", 3)


@pytest.mark.parametrize("labels", [[], ["--labels", "position"]])
def test_fit(run, tmp_path, labels):
    target, plot = tmp_path / "model.safetensors", tmp_path / "history.png"
    options = "--architecture", "offset1-model", "--batch-size", 16, "--num-steps", 5
    command = "fit", RECORDING, target, "--data", "X", *labels, *options, "--plot", plot
    code, out, err = run(*command, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    checkpoint = cjm.load(target)
    assert checkpoint.history["total"].shape == (5,)
    bits = cjm.goodness_of_fit_history(checkpoint)
    assert result["last_goodness_of_fit_bits"] == pytest.approx(bits[-1], abs=1e-5)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run("score", target, RECORDING, *FEW, "--data", "X", "--labels", *labels[1:])[0] == 0
    assert str(target) in run(*command)[1]


def test_plots_of_scores_and_histories(run, tmp_path):
    for command in (
        ("score", FAST, RECORDING, "--num-batches", 20, "--labels", "position"),
        ("score", FAST, SINGLE, RECORDING, "--num-batches", 20, "--labels", "position"),
        ("info", SINGLE),
    ):
        plot = tmp_path / f"{len(command)}.png"
        code, _, err = run(*command, "--plot", plot)
        assert (code, err) == (0, "")
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib_fail_before_the_work(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("score", FAST, RECORDING, "--plot", "x.png")
    assert (code, out) == (2, "")
    assert "cebra-jax-metrics[plot]" in err


def test_documented_fields(run, tmp_path):
    """The page names what is printed, and nothing else."""
    page = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()

    def documented(name):
        table = page.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
        cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
        return set(re.findall(r"`(\w+)`", " ".join(cells[1:])))

    assert documented("score") == KEYS | {"parts"}
    command = "test", SINGLE, RECORDING, "--held-out", ":", "--num-batches", 2, "--num-samples", 3
    assert documented("test") == json.loads(run(*command, "--json")[1]).keys()
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(50, 2)))
    command = "consistency", tmp_path / "a.npy", tmp_path / "a.npy", "--between", "runs", "--test"
    result = json.loads(run(*command, "--json")[1])
    assert documented("consistency") == result.keys() | result["test"].keys() | {
        field for part in result["test"].values() for field in part
    }
    command = "fit", RECORDING, tmp_path / "out", "--data", "X", "--num-steps", 2
    options = "--architecture", "offset1-model", "--batch-size", 8, "--json"
    assert documented("fit") == json.loads(run(*command, *options)[1]).keys()


def test_version(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"cebra-jax-metrics \S+ \(jax \S+, numpy \S+\)\n", out)


COMMANDS = ("score", "test", "consistency", "fit", "info", "convert", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert "exit codes: 0; 2" in out
    examples = [line for line in out.splitlines() if line.startswith("  cebra-jax-metrics ")]
    assert examples or command == "demo"
    for example in examples:  # they parse
        words = example.replace("*", "1").split()[1:]
        assert make_parser().parse_args(words).run.__name__ == command


def test_warnings_are_one_line_each(run, monkeypatch):
    def warns(arguments):
        warnings.warn("first line\nsecond", stacklevel=1)
        return "done"

    monkeypatch.setattr("cebra_jax_metrics.cli.commands.demo", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("demo")
    assert result == (0, "done\n", "cebra-jax-metrics: warning: first line second\n")


def test_interrupted(run, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("cebra_jax_metrics.cli.commands.demo", interrupt)
    assert run("demo") == (130, "", "")


def test_interrupted_as_a_program():
    """Ctrl-C while it works: no traceback, and the exit code of shells."""
    command = [sys.executable, "-m", "cebra_jax_metrics", "score", FAST, RECORDING]
    command += ["--labels", "position", "--num-batches", "100000000"]
    # Where these tests run in the background, Ctrl-C is ignored, by what they start as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    try:
        time.sleep(8)  # it would work for hours
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")
