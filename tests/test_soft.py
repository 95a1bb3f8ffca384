"""Soft positives: the hard ones in the limit, differentiable before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from cebra_jax_metrics import (
    Criterion,
    Encoder,
    Model,
    draw,
    estimate_infonce,
    evaluate,
    fit,
    samplers,
)
from cebra_jax_metrics.smoothing import kernel_mean

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
STEPS = 150
X = RNG.normal(size=(STEPS, 4)).astype(np.float32)
LABELS = (RNG.normal(size=(STEPS, 3)).cumsum(0) / 5).astype(np.float32)
LABELS[40] = LABELS[20]  # identical labels
CRITERIA = {
    "cosine": Criterion("cosine", np.float32(0.6)),
    "euclidean": Criterion("euclidean", np.float32(0.6)),
}
MODELS = {
    name: Model((Encoder.init(KEY, "offset5-model", 4, 5, 3),), criterion)
    for name, criterion in CRITERIA.items()
}
SIZES = {"batch_size": 16, "num_batches": 5}
HARD = {
    "time_delta": samplers.TimeDelta(np.delete(LABELS, 40, 0), 3),
    "delta_normal": samplers.DeltaNormal(np.delete(LABELS, 40, 0), 0.4),
}


def expected_mean(labels, values, query, bandwidth, weights):
    distance = (weights * (query[:, None] - labels[None]) ** 2).sum(-1)
    share = np.exp(-(distance - distance.min(1, keepdims=True)) / bandwidth)
    return share @ values / share.sum(1, keepdims=True)


@pytest.mark.parametrize("features", [1, 20])
@pytest.mark.parametrize("block_size", [1, 7, 1024])
@pytest.mark.parametrize("bandwidth", [1e-6, 0.3, 100.0])
def test_kernel_mean_in_blocks(features, block_size, bandwidth):
    rng = np.random.default_rng(features)
    labels, values = rng.normal(size=(90, features)), rng.normal(size=(90, 4))
    query, weights = 2 * rng.normal(size=(33, features)), rng.uniform(0, 2, features)
    expected = expected_mean(labels[:80], values[:80], query, bandwidth, weights)
    options = {"bandwidth": bandwidth, "weights": weights, "length": 80, "block_size": block_size}
    with jax.enable_x64(True):
        found = kernel_mean(*map(jnp.asarray, (labels, values, query)), **options)
        np.testing.assert_allclose(found, expected, atol=1e-10)


def test_kernel_mean_far_from_all_labels():
    """No share underflows to 0 for all labels."""
    labels, values = jnp.asarray([[0.0], [1.0]]), jnp.asarray([[1.0], [2.0]])
    query = jnp.asarray([[1e15], [-1e15]])
    found = kernel_mean(labels, values, query, bandwidth=1e-3, weights=jnp.ones(1))
    np.testing.assert_allclose(found[1], [1.5])  # equally far in float32
    near = kernel_mean(labels, values, query / 1e12, bandwidth=1e-3, weights=jnp.ones(1))
    np.testing.assert_array_equal(near, [[2.0], [1.0]])


@pytest.mark.parametrize("features", [1, 8, 20])
@pytest.mark.parametrize("bandwidth", [1e-12, 1e-9])
def test_kernel_mean_near_the_first_label_in_float32(features, bandwidth):
    """The nearest distance rounds alike wherever it is computed, so that no share is lost."""
    rng = np.random.default_rng(features)
    labels, values = rng.normal(size=(50, features)), rng.normal(size=(50, 2))
    query = labels[:1] + 1e-2 * rng.normal(size=(400, features))
    arrays = (jnp.asarray(x, jnp.float32) for x in (labels, values, query))
    options = {"bandwidth": bandwidth, "weights": jnp.ones(features)}
    found = jax.jit(kernel_mean)(*arrays, **options)
    nearest = ((query[:, None] - labels[None]) ** 2).sum(2).argmin(1)
    np.testing.assert_allclose(found, values[nearest], rtol=1e-5)


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("similarity", MODELS)
def test_the_limit_is_the_hard_sampler(hard, similarity):
    model, recording = MODELS[similarity], np.delete(X, 40, 0)
    expected = estimate_infonce(KEY, model, recording, HARD[hard], **SIZES)
    losses = [
        estimate_infonce(KEY, model, recording, samplers.Soft(HARD[hard], h), **SIZES).loss
        for h in (10.0, 0.1, 1e-12)
    ]
    gaps = np.abs(np.asarray(losses) - expected.loss)
    assert gaps[0] > 1e-2
    assert gaps[0] > gaps[1] > 1e-4
    assert gaps[2] < 1e-6


def test_the_limit_with_weights_is_the_hard_sampler_of_scaled_labels():
    """Weights of powers of 4 scale the labels by powers of 2, without rounding."""
    weights = np.asarray([4.0, 0.25, 1.0])
    scaled = samplers.TimeDelta(LABELS * np.sqrt(weights).astype(np.float32), 3)
    soft = samplers.Soft(samplers.TimeDelta(LABELS, 3), 1e-12, weights)
    model, twice = MODELS["cosine"], X.copy()
    twice[38:43] = X[18:23]  # the window of step 40 is that of step 20, as are their labels
    expected = estimate_infonce(KEY, model, twice, scaled, **SIZES).loss
    found = estimate_infonce(KEY, model, twice, soft, **SIZES).loss
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_positives_of_identical_labels_are_their_mean():
    soft = samplers.Soft(samplers.TimeDelta(LABELS, 3), 1e-9)
    rows = jnp.asarray(RNG.normal(size=(STEPS, 2)), jnp.float32)
    found = soft.positive(rows, jnp.asarray(LABELS[[20, 30]]))
    np.testing.assert_allclose(found, [(rows[20] + rows[40]) / 2, rows[30]], rtol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("similarity", MODELS)
@pytest.mark.parametrize("kind", HARD)
def test_gradients_against_finite_differences(similarity, kind):
    """In weights, bandwidth, delta, model and recording, of first and (in some) second order."""
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), MODELS[similarity])

        def bits(weights, bandwidth, delta, model, X):
            normal = samplers.DeltaNormal(LABELS, delta)
            hard = normal if kind == "delta_normal" else samplers.TimeDelta(LABELS, 3)
            sampler = samplers.Soft(hard, bandwidth, weights)
            return estimate_infonce(KEY, model, X, sampler, **SIZES).bits

        point = jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray(0.2), jnp.asarray(0.4)
        rest = model, jnp.asarray(X, jnp.float64)
        check_grads(bits, (*point, *rest), order=1, atol=1e-5, rtol=1e-5, eps=1e-6)
        each = jax.jit(jax.grad(bits, argnums=(0, 1, 2)))(*point, *rest)
        assert (each[2] != 0) == (kind == "delta_normal")
        assert (each[0] != 0).all()
        value = jax.jit(bits)
        for number, step in ((1, 1e-5), (2, 1e-5)):
            ends = []
            for sign in (1, -1):
                moved = list(point)
                moved[number] = moved[number] + sign * step
                ends.append(value(*moved, *rest))
            np.testing.assert_allclose(each[number], (ends[0] - ends[1]) / (2 * step), atol=1e-5)


def test_draw_then_evaluate_is_the_estimate():
    soft = samplers.Soft(samplers.TimeDelta(LABELS, 3), 0.1)
    model, batch = MODELS["cosine"], draw(KEY, soft, 16, 5)
    hard = draw(KEY, soft.sampler, 16, 5)
    np.testing.assert_array_equal(batch.reference, hard.reference)
    np.testing.assert_array_equal(batch.negative, hard.negative)
    losses = evaluate(model, X, batch).loss
    found = estimate_infonce(KEY, model, X, soft, **SIZES)
    np.testing.assert_array_equal(found.per_batch, losses)
    alone = soft.sample(jax.random.fold_in(KEY, 3), 16)
    stacked = jax.tree.map(lambda x: x[None], (alone.reference, alone.query, alone.negative))
    one = evaluate(model, X, samplers.SoftBatch(*stacked, alone.sampler)).loss
    np.testing.assert_allclose(one[0], losses[3], rtol=1e-6)


def test_the_same_under_jit_vmap_and_mesh():
    model, mesh = MODELS["cosine"], jax.make_mesh((8,), ("devices",))

    def loss(bandwidth):
        soft = samplers.Soft(samplers.TimeDelta(LABELS, 3), bandwidth)
        return estimate_infonce(KEY, model, X, soft, **SIZES).loss

    widths = jnp.asarray([0.1, 1.0])
    expected = [float(loss(w)) for w in widths]
    np.testing.assert_allclose(jax.jit(loss)(widths[1]), expected[1], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(widths), expected, rtol=1e-6)
    soft = samplers.Soft(samplers.TimeDelta(LABELS, 3), 0.1)
    found = estimate_infonce(KEY, model, X, soft, **SIZES, mesh=mesh).loss
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_the_weights_find_the_label_that_drives_the_neurons(seed):
    """Of two labels, one of which nothing depends on: by ascent on held-out rows."""
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(4000, 2)).cumsum(0)
    labels = (labels - labels.mean(0)) / labels.std(0)
    rates = np.exp(np.cos(labels[:, :1] * 2 + rng.uniform(0, 6, 20)) - 0.5)
    spikes = rng.poisson(rates).astype(np.float32)
    train, test = slice(0, 2000), slice(2000, None)
    options = {"architecture": "offset1-model", "output_dimension": 3, "batch_size": 256}
    sampler = samplers.TimeDelta(labels[train], 10)
    model = fit(KEY, spikes[train], sampler, **options, num_steps=300, learning_rate=3e-3).model
    hard = samplers.TimeDelta(labels[test], 10)

    def bits(logits, key):
        soft = samplers.Soft(hard, 0.3, jax.nn.softmax(logits))
        return estimate_infonce(key, model, spikes[test], soft, batch_size=128, num_batches=2).bits

    ascent, logits = optax.adam(0.1), jnp.zeros(2)
    state = ascent.init(logits)
    gradient = jax.jit(jax.value_and_grad(bits))
    values = []
    for step in range(60):
        value, direction = gradient(logits, jax.random.fold_in(KEY, step))
        with jax.numpy_dtype_promotion("standard"):  # which optax counts on
            change, state = ascent.update(-direction, state)
        logits, values = logits + change, [*values, float(value)]
    assert jax.nn.softmax(logits)[0] >= 0.9
    assert np.mean(values[-10:]) > np.mean(values[:5])


BAD = {
    "kind": (lambda: samplers.Soft(samplers.Time(5), 1.0), TypeError, "TimeDelta and DeltaNormal"),
    "zero": (lambda: soft(0.0), ValueError, "bandwidth has to be finite and above 0"),
    "negative": (lambda: soft(-1.0), ValueError, "bandwidth has to be finite and above 0"),
    "nan": (lambda: soft(np.nan), ValueError, "bandwidth has to be finite and above 0"),
    "tiny": (lambda: soft(1e-60), ValueError, "bandwidth has to be finite and above 0"),
    "subnormal": (lambda: soft(1e-39), ValueError, "at least 1.17"),
    "overflow": (lambda: soft(1.0, np.full(3, 1e38)), ValueError, "exceed the range of float32"),
    "several": (lambda: soft(np.ones(2)), ValueError, r"one number, got the shape \(2,\)"),
    "text": (lambda: soft("wide"), TypeError, "bandwidth has to be made of real numbers"),
    "width": (lambda: soft(1.0, np.ones(2)), ValueError, r"3 features of the labels.*\(2,\)"),
    "below": (lambda: soft(1.0, -np.ones(3)), ValueError, "at least 0"),
    "weights": (lambda: soft(1.0, ["a", "b", "c"]), TypeError, "weights has to be made of real"),
    "fit": (
        lambda: fit(KEY, X, soft(1.0), num_steps=1, batch_size=8),
        TypeError,
        "positives that are time steps",
    ),
    "longer": (
        lambda: estimate_infonce(KEY, MODELS["cosine"], X[:100], soft(1.0), **SIZES),
        ValueError,
        "150 time steps, but the recording has 100",
    ),
}


def soft(bandwidth, weights=None):
    return samplers.Soft(samplers.TimeDelta(LABELS, 3), bandwidth, weights)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
