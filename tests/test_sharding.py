"""Work over 8 simulated devices gives what one device gives; two processes give what one gives."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cebra_jax_metrics import (
    Checkpoint,
    Criterion,
    Encoder,
    Model,
    consistency_matrix,
    consistency_score,
    consistency_test,
    draw,
    estimate_infonce,
    evaluate,
    goodness_of_fit_score,
    infonce_loss,
    multisession_infonce_loss,
    samplers,
    sharding,
    spread,
)

from .conftest import GOLDEN

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
STEPS = 5003
X = RNG.normal(size=(STEPS, 6)).astype(np.float32)
LABELS = RNG.normal(size=(STEPS, 2)).cumsum(0).astype(np.float32)
TIMES = samplers.Time(STEPS, 3)
BY_POSITION = samplers.TimeDelta(LABELS, 3)
KINDS = (LABELS[:, 0] > 0).astype(int)
ENCODER = Encoder.init(KEY, "offset5-model", 6, 8, 3)
MODEL = Model((ENCODER,), Criterion(temperature=0.7))
SAMPLERS = {
    "time": TIMES,
    "time_delta": BY_POSITION,
    "delta_normal": samplers.DeltaNormal(LABELS, 0.5),
    "discrete": samplers.Discrete(KINDS),
    "mixed": samplers.Mixed(KINDS, LABELS),
    "hybrid": samplers.Hybrid(BY_POSITION),
    "full": samplers.FullBatch(samplers.Time(600), 600, ENCODER.offset),
}
RUNS = [RNG.normal(size=(1003, width)) for width in (3, 4, 2)]
RUNS = [x + RUNS[0][:, :1] for x in RUNS]
PLACES = [np.linspace(0, 1, len(x)) ** power for power, x in enumerate(RUNS, start=1)]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("devices",))


def close(found, expected):
    """Within 1e-6 of the largest."""

    def compare(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1, np.abs(y).max()))

    jax.tree.map(compare, found, expected)


def is_spread(x, number):
    """Whether every device holds its share, and no more."""
    shards = [shard.data.shape[0] for shard in x.addressable_shards]
    return shards == [number // 8] * 8


@pytest.mark.parametrize("num_batches", [16, 13])
@pytest.mark.parametrize("name", SAMPLERS)
def test_estimates(mesh, name, num_batches):
    sampler = SAMPLERS[name]
    recording = X[:600] if name == "full" else X
    size = None if name == "full" else 32
    options = dict(batch_size=size, num_batches=num_batches)
    expected = estimate_infonce(KEY, MODEL, recording, sampler, **options)
    found = estimate_infonce(KEY, MODEL, recording, sampler, mesh=mesh, **options)
    close(found, expected)
    drawn = draw(KEY, sampler, size, num_batches, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, drawn, draw(KEY, sampler, size, num_batches))
    each = evaluate(MODEL, recording, drawn, mesh=mesh)
    close(each, evaluate(MODEL, recording, drawn))
    if num_batches == 16:
        assert is_spread(found.per_batch, 16)
        assert all(is_spread(x, 16) for x in (*drawn, *each))


@pytest.mark.parametrize(("num_batches", "chunk_size"), [(3, None), (21, 1), (21, 9)])
def test_chunks_on_a_mesh(mesh, num_batches, chunk_size):
    options = dict(batch_size=16, num_batches=num_batches)
    expected = estimate_infonce(KEY, MODEL, X, BY_POSITION, **options)
    found = estimate_infonce(
        KEY, MODEL, X, BY_POSITION, mesh=mesh, chunk_size=chunk_size, **options
    )
    close(found, expected)


@pytest.mark.parametrize("length", [6, 4099, 40_000])
def test_recordings_of_any_length(mesh, length):
    recording = RNG.normal(size=(length, 6)).astype(np.float32)
    sampler = samplers.Time(length)
    options = dict(batch_size=16, num_batches=8)
    expected = estimate_infonce(KEY, MODEL, recording, sampler, **options)
    for some in (mesh, Mesh(mesh.devices[:3], mesh.axis_names)):
        found = estimate_infonce(KEY, MODEL, recording, sampler, mesh=some, **options)
        close(found, expected)


def test_one_axis_of_several():
    axes = (AxisType.Explicit, AxisType.Auto)
    square = jax.make_mesh((4, 2), ("a", "b"), axis_types=axes)
    expected = estimate_infonce(KEY, MODEL, X, TIMES, batch_size=16, num_batches=8)
    for axis in ("a", "b"):
        found = estimate_infonce(
            KEY, MODEL, X, TIMES, batch_size=16, num_batches=8, mesh=square, axis_name=axis
        )
        close(found, expected)
    with pytest.raises(ValueError, match=r"axes \('a', 'b'\): pass the one"):
        estimate_infonce(KEY, MODEL, X, TIMES, batch_size=16, num_batches=8, mesh=square)


def test_a_recording_whose_rows_are_on_several_devices(mesh):
    """As ``jax.make_array_from_process_local_data`` makes it of the rows of each process."""
    rows = jax.device_put(X[:5000], NamedSharding(mesh, PartitionSpec("devices")))
    sampler = samplers.Time(5000)
    options = dict(batch_size=16, num_batches=8)
    expected = estimate_infonce(KEY, MODEL, X[:5000], sampler, **options)
    close(estimate_infonce(KEY, MODEL, rows, sampler, **options), expected)
    close(estimate_infonce(KEY, MODEL, rows, sampler, mesh=mesh, **options), expected)


def test_reads_rows_once(mesh):
    """Of a recording on disk, but for those that two chunks share."""
    reads = np.zeros(STEPS, int)

    class OnDisk:
        shape, dtype = X.shape, X.dtype

        def __getitem__(self, item):
            reads[item] += 1
            return X[item]

    options = dict(batch_size=16, num_batches=8, mesh=mesh)
    close(
        estimate_infonce(KEY, MODEL, OnDisk(), TIMES, **options),
        estimate_infonce(KEY, MODEL, X, TIMES, **options),
    )
    assert (reads == 1).all()


@pytest.mark.heavy
def test_gradients(mesh):
    options = dict(batch_size=16, num_batches=11)

    def loss(one, recording, mesh):
        return estimate_infonce(KEY, one, recording, BY_POSITION, mesh=mesh, **options).loss

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = gradient(MODEL, jnp.asarray(X), None)
    close(gradient(MODEL, jnp.asarray(X), mesh), expected)
    close(jax.jit(gradient, static_argnums=2)(MODEL, jnp.asarray(X), mesh), expected)
    runs = [jnp.asarray(x, jnp.float32) for x in RUNS]
    gradient = jax.grad(lambda runs, mesh: consistency_matrix(runs, mesh=mesh).sum())
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
        gradient(runs, mesh),
        gradient(runs, None),
    )


SETTINGS = dict(batch_size=32, time_offsets=3, conditional="time_delta")


def test_functions_with_the_signatures_of_cebra(mesh):
    checkpoint = Checkpoint(MODEL, SETTINGS)
    for function in (infonce_loss, goodness_of_fit_score):
        for options in ({}, {"feature_range": [slice(0, 1), slice(None)]}):
            expected = function(checkpoint, X, LABELS, num_batches=13, **options)
            found = function(checkpoint, X, LABELS, num_batches=13, mesh=mesh, **options)
            assert found == pytest.approx(expected, abs=1e-6 * np.log(32))
    joint = Checkpoint(Model((ENCODER, ENCODER)), SETTINGS | {"num_sessions": 2})
    both = joint, [X, X[:900]], [LABELS, LABELS[:900]]
    close(
        multisession_infonce_loss(*both, num_batches=13, mesh=mesh),
        multisession_infonce_loss(*both, num_batches=13),
    )


@pytest.mark.parametrize("rows", [1003, 12])
@pytest.mark.parametrize("cv", [None, 5])
def test_consistency(mesh, rows, cv):
    runs = [x[:rows] for x in RUNS]
    expected = consistency_score(runs, "runs", cv=cv).scores
    np.testing.assert_allclose(
        consistency_score(runs, "runs", cv=cv, mesh=mesh).scores, expected, atol=1e-9
    )
    if rows > 100:
        options = dict(between="datasets", labels=[y[:rows] for y in PLACES], cv=cv)
        options["num_discretization_bins"] = 20
        np.testing.assert_allclose(
            consistency_score(runs, mesh=mesh, **options).scores,
            consistency_score(runs, **options).scores,
            atol=1e-9,
        )


@pytest.mark.parametrize("scale", [1e-15, 1, 1e15])
def test_consistency_of_hard_cases(mesh, scale):
    """Constant columns, few digits, any scale."""
    left = RNG.normal(size=(501, 3)) @ np.diag([1, 1e-3, 1e-5]) * scale
    constant = np.concatenate([left[:, :1], np.full((501, 1), 0.1)], axis=1)
    np.testing.assert_allclose(
        consistency_score([left, constant], "runs", mesh=mesh).scores,
        consistency_score([left, constant], "runs").scores,
        atol=1e-9,
    )


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"min_shift": 20}])
def test_consistency_tests(mesh, options):
    close(
        consistency_test(KEY, RUNS, "runs", mesh=mesh, **options)[2:],
        consistency_test(KEY, RUNS, "runs", **options)[2:],
    )
    options |= dict(num_samples=11, num_discretization_bins=20)
    close(
        consistency_test(KEY, RUNS, "datasets", PLACES, mesh=mesh, **options)[2:],
        consistency_test(KEY, RUNS, "datasets", PLACES, **options)[2:],
    )


@pytest.mark.heavy
@pytest.mark.parametrize("number", [8, 5])
def test_stacked_models_are_spread(mesh, number):
    keys = jax.random.split(KEY, number)
    models = jax.vmap(lambda key: Model((Encoder.init(key, "offset5-model", 6, 8, 3),)))(keys)

    def score(one):
        return estimate_infonce(KEY, one, X, BY_POSITION, batch_size=16, num_batches=4)

    found = spread(jax.vmap(score), (), models, mesh=mesh)
    close(found, jax.vmap(score)(models))
    if number == 8:
        assert is_spread(found.per_batch, 8)


def test_seeds_are_spread_and_compiled_once(mesh):
    @partial(chex.assert_max_traces, n=1)
    def draws(scale, keys, shape):
        return scale * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 11)
        found = spread(draws, (jnp.float32(2),), keys, mesh=mesh, shape=(3,))
        expected = 2 * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        np.testing.assert_array_equal(found, expected)


def test_reductions_know_what_is_real(mesh):
    def total(items, axis_name, number):
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(items)
        own = jnp.sum(jnp.where(first + jnp.arange(len(items)) < number, items, 0))
        return own if axis_name is None else jax.lax.psum(own, axis_name)

    for devices in (None, mesh):
        assert spread(total, (), jnp.arange(1, 12), mesh=devices, reduces=True) == 66


def test_committed_arrays_are_moved(mesh):
    """Also those on another device than the first of the mesh."""
    last = jax.devices()[-1]
    model, recording = jax.device_put((MODEL, X), last)
    options = dict(batch_size=16, num_batches=8)
    expected = estimate_infonce(KEY, MODEL, X, TIMES, **options)
    close(estimate_infonce(KEY, model, recording, TIMES, mesh=mesh, **options), expected)


def score(**options):
    sizes = dict(batch_size=16, num_batches=8)
    return estimate_infonce(KEY, MODEL, X, TIMES, **{**sizes, **options})


BAD = {
    "axis": (lambda mesh: score(mesh=mesh, axis_name="rows"), ValueError, "no axis 'rows'"),
    "no mesh": (lambda mesh: score(mesh=jax.devices()), TypeError, "jax.make_mesh"),
    "no items": (lambda mesh: spread(jnp.sin, (), jnp.zeros(0), mesh=mesh), ValueError, "empty"),
    "lengths": (
        lambda mesh: spread(jnp.sin, (), (jnp.zeros(2), jnp.zeros(3)), mesh=mesh),
        ValueError,
        "leading axis",
    ),
    "consistency": (
        lambda mesh: consistency_score(RUNS, "runs", mesh=mesh, axis_name="rows"),
        ValueError,
        "no axis 'rows'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(mesh, name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make(mesh)


class StandIn(Mesh):
    """A mesh of devices that are not there."""

    def __new__(cls, devices):
        return object.__new__(cls)

    def __init__(self, devices):
        self.__dict__["devices"] = np.array(devices)

    axis_names = ("devices",)
    __hash__ = object.__hash__


def test_devices_of_several_kinds():
    kinds = [SimpleNamespace(platform="cuda", device_kind=kind) for kind in ("H100", "A100")]
    with pytest.raises(ValueError, match=r"one kind, got cuda \(A100\) and cuda \(H100\)"):
        sharding.checked_mesh(StandIn(kinds), None)


def test_more_processes_than_work():
    devices = [SimpleNamespace(process_index=index) for index in (0, 0, 1, 2)]
    assert sharding.check_enough("batches", 3, StandIn(devices)) == 3
    with pytest.raises(ValueError, match="3 processes, but only 2 batches"):
        sharding.check_enough("batches", 2, StandIn(devices))


# Two real processes.

EXAMPLE = Path(__file__).parent.parent / "examples" / "many_hosts.py"
MODELS = [str(GOLDEN / f"{name}.pt") for name in ("offset10-model", "offset1-model", "time")]


@pytest.fixture(scope="module")
def files(tmp_path_factory, recording):
    folder = tmp_path_factory.mktemp("many_hosts")
    np.save(folder / "X.npy", recording["X"])
    np.save(folder / "labels.npy", recording["position"])
    return str(folder / "X.npy"), str(folder / "labels.npy")


def start(number, *arguments):
    """So many processes of the example."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    together = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(number)]
    command = [sys.executable, str(EXAMPLE), *arguments, *together, "--process-id"]
    return [
        subprocess.Popen(
            [*command, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(number)
    ]


def finish(processes):
    """What they print, but for what gloo says."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [re.sub(r"\[Gloo\].*\n", "", output) for output, _ in outputs]


@pytest.mark.heavy
@pytest.mark.parametrize("split", ["rows", "models"])
def test_two_processes_give_what_one_gives(files, split, recording):
    arguments = *files, *MODELS[:2], "--split", split, "--num-batches", "11"
    (alone,) = finish(start(1, *arguments))
    first, second = finish(start(2, *arguments))
    assert first == alone
    assert second == ""
    for path, line in zip(MODELS, first.splitlines(), strict=False):
        estimate = goodness_of_fit_score(
            path, recording["X"], recording["position"], num_batches=11, return_estimate=True
        )
        name, bits, stderr = line.split("\t")
        assert name == path
        np.testing.assert_allclose(float(bits), estimate.bits, atol=2e-6)
        np.testing.assert_allclose(float(stderr), estimate.bits_stderr, atol=2e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("victim", [0, 1])
def test_others_end_with_an_error_when_one_dies(files, victim):
    """And do not wait for ever."""
    processes = start(2, *files, MODELS[0], "--num-batches", "100000000")
    try:
        time.sleep(12)  # they have met, and are at work
        assert [process.poll() for process in processes] == [None, None]
        processes[victim].kill()
        assert processes[1 - victim].wait(timeout=60) != 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.heavy
def test_fewer_models_than_processes(files):
    processes = start(2, *files, MODELS[0], "--split", "models")
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert any("2 processes, but only 1 models" in error for error in errors)
