"""Estimates: draw, evaluate, average; under JAX's transformations; traces, dtypes, lowering."""

import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cebra_jax_metrics import (
    Checkpoint,
    Criterion,
    Encoder,
    Model,
    draw,
    embed,
    estimate_infonce,
    estimation,
    evaluate,
    goodness_of_fit,
    infonce,
    model,
)
from cebra_jax_metrics.samplers import Batch, DeltaNormal, Time, TimeDelta, drawing

from .conftest import GOLDEN

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6)).astype(np.float32)
LABELS = RNG.normal(size=(120, 2)).cumsum(0).astype(np.float32)
SAMPLER = TimeDelta(LABELS, 3)
SIZES = dict(batch_size=16, num_batches=10)


def make_model(seed=0, name="offset5-model", **criterion):
    encoder = Encoder.init(jax.random.key(seed), name, 6, 8, 3)
    return Model((encoder,), Criterion(**criterion))


MODEL = make_model()


def test_estimate_is_draw_then_evaluate_then_mean():
    estimate = estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES)
    batch = draw(KEY, SAMPLER, 16, 10)
    each = evaluate(MODEL, X, batch)
    np.testing.assert_array_equal(estimate.per_batch, each.loss)
    np.testing.assert_allclose(estimate.loss, np.mean(each.loss), rtol=1e-6)
    np.testing.assert_allclose(estimate.align, np.mean(each.align), rtol=1e-6)
    np.testing.assert_allclose(estimate.uniform, np.mean(each.uniform), rtol=1e-6)
    stderr = np.std(each.loss, ddof=1) / np.sqrt(10)
    np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-5)
    np.testing.assert_allclose(estimate.bits, goodness_of_fit(estimate.loss, 16), rtol=1e-6)
    np.testing.assert_allclose(estimate.bits_stderr, stderr / np.log(2), rtol=1e-5)
    assert estimate.num_negatives == 16
    assert "bits" in repr(estimate)


def test_evaluate_is_infonce_of_clamped_windows():
    batch = draw(KEY, Time(120, 1), 16, 2)
    edges = jnp.asarray([[0, 1, 118, 119] * 4] * 2, jnp.int32)
    batch = Batch(edges, batch.positive, edges[:, ::-1])
    z = embed(MODEL, X, pad=False)
    rows = [np.clip(steps, 2, 120 - 3) - 2 for steps in batch]
    expected = [infonce(*(z[r[i]] for r in rows)) for i in range(2)]
    found = evaluate(MODEL, X, batch)
    np.testing.assert_allclose(found.loss, [e.loss for e in expected], rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 10, 100])
def test_chunks_change_nothing(chunk_size):
    expected = estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES)
    found = estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES, chunk_size=chunk_size)
    np.testing.assert_array_equal(found.per_batch, expected.per_batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_one_batch_has_no_standard_error():
    estimate = estimate_infonce(KEY, MODEL, X, SAMPLER, batch_size=16, num_batches=1)
    assert np.isfinite(estimate.loss)
    assert np.isnan(estimate.stderr)


def test_under_jit_with_everything_an_argument():
    jitted = jax.jit(lambda *arguments: estimate_infonce(*arguments, **SIZES))
    found = jitted(KEY, MODEL, X, SAMPLER)
    chex.assert_trees_all_close(found, estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES), rtol=1e-5)


def test_gradient_with_respect_to_model_and_recording():
    model = make_model(name="offset1-model-mse", similarity="euclidean", temperature=0.7)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model)
        recording = jnp.asarray(X, jnp.float64)

        def bits(model, recording):
            return estimate_infonce(KEY, model, recording, SAMPLER, **SIZES).bits

        gradient = jax.grad(bits, argnums=(0, 1))(wide, recording)
        direction = jax.tree.map(
            lambda x: jnp.asarray(np.random.default_rng(1).normal(size=np.shape(x))),
            (wide, recording),
        )
        step = 1e-5
        ahead, behind = (
            bits(*jax.tree.map(lambda x, d, s=s: x + s * d, (wide, recording), direction))
            for s in (step, -step)
        )
        slope = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


def test_stacked_models():
    models = [make_model(seed, temperature=jnp.asarray(0.5 + seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    found = jax.vmap(lambda m: estimate_infonce(KEY, m, X, SAMPLER, **SIZES).bits)(stacked)
    expected = [estimate_infonce(KEY, m, X, SAMPLER, **SIZES).bits for m in models]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    each = jax.vmap(lambda m: evaluate(m, X, draw(KEY, SAMPLER, 16, 4)).loss)(stacked)
    assert each.shape == (3, 4)


def test_learned_temperature_is_clamped():
    low = make_model(temperature=0.01, learned=True, min_temperature=0.2)
    at_limit = make_model(temperature=0.2)
    batch = draw(KEY, SAMPLER, 16, 2)
    chex.assert_trees_all_close(evaluate(low, X, batch), evaluate(at_limit, X, batch), rtol=1e-6)
    gradient = jax.grad(lambda m: evaluate(m, X, batch).loss.sum())
    assert gradient(low).criterion.temperature == 0
    fixed_low = make_model(temperature=0.01, min_temperature=0.2)
    assert gradient(fixed_low).criterion.temperature != 0


def test_one_trace_per_size_class(monkeypatch):
    """Other keys, values, models and lengths of the same class compile nothing anew."""
    patched = []
    for module, name in (
        (drawing, "_propose"),
        (estimation, "plain_losses"),
        (estimation, "_summarise"),
        (estimation, "_combined"),
        (model, "_encode_chunk"),
    ):
        jitted = getattr(module, name)
        statics = {
            "_propose": ("batch_size",),
            "_summarise": ("num_batches",),
            "_combined": ("num_negatives", "is_joint"),
        }.get(name, ())
        function = chex.assert_max_traces(jitted.__wrapped__, n=1)
        patched.append(jax.jit(function, static_argnames=statics))
        monkeypatch.setattr(module, name, patched[-1])
    for seed, length in enumerate((120, 119, 4000, 77)):
        labels, recording = RNG.normal(size=(length, 2)), RNG.normal(size=(length, 6))
        sampler = TimeDelta(labels, 3 + seed)
        estimate_infonce(jax.random.key(seed), make_model(seed), recording, sampler, **SIZES)
    assert all(function._cache_size() for function in patched)  # each was called


class OnDisk:
    """What h5py and zarr have in common; counts how often each row is read."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype = rows, rows.shape, rows.dtype
        self.reads = np.zeros(len(rows), int)
        self.last = 0

    def __getitem__(self, item):
        assert item.start >= self.last, "rows have to be read in order"
        self.last = item.stop
        self.reads[item] += 1
        return self.rows[item]


@pytest.mark.parametrize("length", [5, 4096, 4097, 9000])
@pytest.mark.parametrize("pad", [False, True])
def test_chunks_are_the_whole(length, pad):
    """Also from arrays that are read by slices: every row once, in order."""
    recording = RNG.normal(size=(length, 6)).astype(np.float32)
    encoder = MODEL.encoders[0]
    expected = jax.jit(partial(encoder.encode, pad=pad))(recording)
    on_disk = OnDisk(recording)
    for X in (recording, jnp.asarray(recording), on_disk):
        found = embed(MODEL, X, pad=pad)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (on_disk.reads == 1).all()


@pytest.mark.parametrize("length", [5, 4097])
@pytest.mark.parametrize("pad", [False, True])
def test_on_an_accelerator_the_recording_is_embedded_at_once(length, pad, monkeypatch):
    """There is none here: the way that is taken there, on the CPU."""
    recording = RNG.normal(size=(length, 6)).astype(np.float32)
    expected = embed(MODEL, recording, pad=pad)
    monkeypatch.setattr(model, "on_cpu", lambda *arrays: False)
    for X in (recording, jnp.asarray(recording), OnDisk(recording)):
        np.testing.assert_allclose(embed(MODEL, X, pad=pad), expected, atol=1e-6)


def test_memory_maps_and_recordings_on_disk(tmp_path):
    np.save(tmp_path / "X.npy", X)
    expected = estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES)
    for recording in (np.load(tmp_path / "X.npy", mmap_mode="r"), OnDisk(X)):
        found = estimate_infonce(KEY, MODEL, recording, SAMPLER, **SIZES)
        chex.assert_trees_all_equal(found, expected)
    counts = np.round(3 * X).astype(int)
    found = estimate_infonce(KEY, MODEL, OnDisk(counts), SAMPLER, **SIZES)
    chex.assert_trees_all_equal(
        found, estimate_infonce(KEY, MODEL, counts.astype(np.float32), SAMPLER, **SIZES)
    )
    broken = OnDisk(np.where(X > 2, np.nan, X))
    with pytest.raises(ValueError, match="NaN"):
        estimate_infonce(KEY, MODEL, broken, SAMPLER, **SIZES)


def test_dtypes_in_and_out():
    assert estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES).loss.dtype == jnp.float32
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), MODEL)
    estimate = estimate_infonce(KEY, half, X, SAMPLER, **SIZES)
    assert estimate.loss.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), MODEL)
        estimate = estimate_infonce(KEY, wide, X.astype(np.float64), SAMPLER, **SIZES)
        assert estimate.loss.dtype == jnp.float64
        narrow = estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES)
        assert narrow.loss.dtype == jnp.float32
    np.testing.assert_allclose(estimate.loss, narrow.loss, rtol=1e-5)


def test_stacked_models_however_they_are_mapped():
    """Draws that do not depend on the model are made once, on the host."""
    models = [make_model(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def losses(one):
        return estimate_infonce(KEY, one, X, SAMPLER, **SIZES).per_batch

    expected = jnp.stack([losses(one) for one in models])
    for mapped in (jax.vmap(losses)(stacked), jax.lax.map(losses, stacked)):
        np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    text = str(jax.make_jaxpr(lambda stacked: jax.lax.map(losses, stacked))(stacked))
    assert "random_bits" not in text
    on_disk = OnDisk(X)
    mapped = jax.vmap(lambda one: estimate_infonce(KEY, one, on_disk, SAMPLER, **SIZES).loss)
    np.testing.assert_allclose(mapped(stacked), expected.mean(1), rtol=1e-6)


def test_known_arrays_inside_jit():
    """Arrays that a jitted function closes over are checked while it is traced."""
    recording, batch = jnp.asarray(X), draw(KEY, SAMPLER, 16, 2)
    loss = jax.jit(lambda m: evaluate(m, recording, batch).loss)(MODEL)
    np.testing.assert_allclose(loss, evaluate(MODEL, X, batch).loss, rtol=1e-6)
    broken = recording * jnp.nan
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda m: embed(m, broken))(MODEL)
    query = jax.jit(lambda key: DeltaNormal(LABELS, 0.1).propose(key, 4).query)(KEY)
    assert query.shape == (4, 2)


def test_learned_temperature_that_is_nan_stays_nan():
    broken = Criterion(temperature=jnp.nan, learned=True, min_temperature=0.1)
    assert np.isnan(broken.effective_temperature)


def test_number_of_negatives_is_that_of_the_batch():
    class Many(Time):
        def propose(self, key, batch_size):
            proposal = super().propose(key, batch_size)
            return proposal._replace(negative=jnp.tile(proposal.negative, 3))

    pytree = jax.tree_util.register_pytree_node
    pytree(Many, lambda s: ((s.length, s.time_offset), None), lambda _, leaves: Many(120, 1))
    estimate = estimate_infonce(KEY, MODEL, X, Many(120, 1), **SIZES)
    assert estimate.num_negatives == 48


def test_checkpoint_in_place_of_a_model():
    found = estimate_infonce(KEY, Checkpoint(MODEL), X, SAMPLER, **SIZES)
    chex.assert_trees_all_equal(found, estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES))


def test_the_same_loss_on_every_version_of_jax():
    """Written by jax 0.10.2."""
    expected = json.loads((GOLDEN / "draws.json").read_text())
    estimate = estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES)
    np.testing.assert_allclose(float(estimate.loss), expected["loss"], rtol=1e-6)


BAD = {
    "key": (lambda: estimate_infonce(0, MODEL, X, SAMPLER, **SIZES), TypeError, "key"),
    "model": (lambda: evaluate("model.pt", X, None), TypeError, "Model or a Checkpoint"),
    "neurons": (lambda: embed(MODEL, X[:, 1:]), ValueError, r"\(n_samples, 6\).*5\)"),
    "short": (lambda: embed(MODEL, X[:4]), ValueError, "minimum of 5 is required"),
    "one_d": (lambda: embed(MODEL, X[:, 0]), ValueError, "2D"),
    "nan": (lambda: embed(MODEL, np.where(X > 2, np.nan, X)), ValueError, "NaN"),
    "text": (lambda: embed(MODEL, X.astype(str)), ValueError, "Expected numbers"),
    "complex": (lambda: embed(MODEL, X * 1j), ValueError, "Complex data"),
    "session": (lambda: embed(MODEL, X, 1), RuntimeError, "Invalid session_id 1"),
    "negative": (lambda: embed(MODEL, X, -1), ValueError, "session_id should be"),
    "session_kind": (lambda: embed(MODEL, X, "0"), TypeError, "session_id"),
    "chunk": (
        lambda: estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES, chunk_size=0),
        ValueError,
        "chunk_size",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_sessions_are_chosen():
    encoders = tuple(Encoder.init(jax.random.key(n), "offset1-model", n, 4, 3) for n in (5, 6))
    model = Model(encoders)
    assert embed(model, X, 1).shape == (120, 3)
    with pytest.raises(RuntimeError, match="No session_id provided"):
        embed(model, X)
    with pytest.raises(RuntimeError, match="Invalid session_id 2"):
        embed(model, X, 2)
    with pytest.raises(ValueError, match="model for session 0"):
        embed(model, X, 0)


@pytest.mark.parametrize("encoders", [MODEL.encoders[0], (), (1,), None])
def test_models_without_encoders(encoders):
    """Refused on use, since a Model is also what axes and gradients of models are given as."""
    broken = Model(encoders)
    for use in (embed, partial(estimate_infonce, KEY, sampler=SAMPLER, **SIZES)):
        with pytest.raises(TypeError, match=r"Model\(\(encoder,\)\).*got Model\("):
            use(broken, X)
