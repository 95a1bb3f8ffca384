"""What extreme input gives: each answer against float64, within what rounding allows, or an error.

``EPS`` is the spacing of float32 at 1. A sum of k products is off by at most ``k EPS`` times the
sum of their magnitudes (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1).
"""

import dataclasses
import itertools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import chisquare
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

import cebra_jax_metrics as cjm
from cebra_jax_metrics import samplers
from cebra_jax_metrics.control_variates import Compared, reduced
from cebra_jax_metrics.infonce import InfoNCE

pytestmark = pytest.mark.heavy
EPS = float(np.finfo(np.float32).eps)
LARGEST = float(np.finfo(np.float32).max)
SIGMAS = 5
KEY = jax.random.key(0)
TIME, FEATURES = 40, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(TIME, 4)).astype(np.float32)
DISCRETE = np.arange(TIME) % 3
LABELS = {
    "walk": RNG.normal(size=(TIME, 2)).cumsum(0),
    "one-hot": np.eye(3)[DISCRETE],
    "constant": np.full((TIME, 2), 0.1),
    "1e-20": 1e-20 * RNG.normal(size=(TIME, 2)),
    "1e20": 1e20 * RNG.normal(size=(TIME, 2)),
}
TEMPERATURES = (1e-3, 1e-1, 1.0, 1e3)
METHODS = ("plain", "control_variates")


def encoder(architecture="offset1-model", *, weights=1.0, biases=1.0):
    """An encoder whose weights and biases are scaled."""
    made = cjm.Encoder.init(jax.random.key(1), architecture, 4, 8, FEATURES)
    scales = {name: weights if name.endswith("weight") else biases for name in made.params}
    params = {name: value * scales[name] for name, value in made.params.items()}
    return dataclasses.replace(made, params=params)


def model(*encoders, similarity="cosine", temperature=1.0):
    criterion = cjm.Criterion(similarity, jnp.float32(temperature))
    return cjm.Model(encoders or (encoder(),), criterion)


COLLAPSED = encoder(weights=0.0)
ZERO = encoder("offset1-model", weights=0.0, biases=0.0)  # of norm 0, which is normalised

# --- InfoNCE of arrays


def units(scale=1.0):
    rows = (RNG_BATCH.normal(size=(n, FEATURES)) for n in (16, 16, 24))
    return [np.float32(scale * x / np.linalg.norm(x, axis=1, keepdims=True)) for x in rows]


RNG_BATCH = np.random.default_rng(2)
UNITS = units()


def oracle(reference, positive, negative, similarity, temperature):
    """Loss, its parts and its gradients in float64, after the definition."""
    ref, pos, neg = (np.asarray(x, np.float64) for x in (reference, positive, negative))
    number = len(ref)
    temperature = np.float64(np.float32(temperature))
    if similarity == "cosine":
        paired, crossed = np.sum(ref * pos, axis=1), ref @ neg.T
    else:
        paired = -np.sum((ref - pos) ** 2, axis=1)
        crossed = -np.sum((ref[:, None] - neg[None]) ** 2, axis=2)
    align = -np.mean(paired / temperature)
    uniform = np.mean(logsumexp(crossed / temperature, axis=1))
    share = softmax(crossed / temperature, axis=1)
    if similarity == "cosine":
        slopes = share @ neg - pos, -ref, share.T @ ref
    else:
        total = share.sum(axis=0)[:, None]
        slopes = 2 * (share @ neg - pos), 2 * (pos - ref), 2 * (share.T @ ref - total * neg)
    slopes = [slope / (temperature * number) for slope in slopes]
    cooling = (np.mean(paired) - np.mean(np.sum(share * crossed, axis=1))) / temperature**2
    return InfoNCE(align + uniform, align, uniform), slopes, cooling


def largest_similarity(batch, similarity):
    longest = max(np.linalg.norm(np.asarray(x, np.float64), axis=1).max() for x in batch)
    return longest**2 * (1 if similarity == "cosine" else 4)


def rounding(largest, batch_size=16, negatives=24):
    """What a loss can be off by, with similarities over the temperature of at most ``largest``."""
    return EPS * ((FEATURES + batch_size + 8) * largest + negatives + np.log(negatives) + 2)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_loss_over_all_scales_and_temperatures(similarity):
    compiled = jax.jit(partial(cjm.infonce, similarity=similarity))
    for exponent, temperature in itertools.product(range(-20, 21, 2), TEMPERATURES):
        batch = [np.float32(x * 10.0**exponent) for x in UNITS]
        found = compiled(*batch, temperature=temperature)
        largest = largest_similarity(batch, similarity)
        if max(largest, largest / temperature) > LARGEST:
            assert not np.isfinite(found.loss)
            continue
        expected, *_ = oracle(*batch, similarity, temperature)
        for ours, right in zip(found, expected, strict=True):
            assert abs(float(ours) - right) <= rounding(largest / temperature)


@partial(jax.jit, static_argnames="similarity")
@partial(jax.grad, argnums=(0, 1))
def gradients(batch, temperature, *, similarity):
    return cjm.infonce(*batch, similarity=similarity, temperature=temperature).loss


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0])
def test_gradients_over_all_temperatures(similarity, temperature, scale):
    batch = [np.float32(scale) * x for x in UNITS]
    slopes, cooling = gradients(batch, jnp.float32(temperature), similarity=similarity)
    _, right_slopes, right_cooling = oracle(*batch, similarity, temperature)
    largest = largest_similarity(batch, similarity)
    # Shares are off by the exponents' error, relatively; they are summed over all pairs.
    relative = 2 * rounding(largest / temperature) + 16 * 24 * EPS
    tiny = float(np.finfo(np.float32).tiny)  # smaller similarities are 0
    for ours, right in zip(slopes, right_slopes, strict=True):
        assert np.abs(ours - right).max() <= 4 * relative * scale / temperature + tiny
    assert abs(cooling - right_cooling) <= (4 * relative * largest + tiny) / temperature**2


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1e5, 1e10, 1e15])
def test_gradients_of_large_embeddings_are_finite(similarity, temperature, scale):
    batch = [np.float32(scale) * x for x in UNITS]
    found = gradients(batch, jnp.float32(temperature), similarity=similarity)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


# --- estimates


def made(name, labels):
    return {
        "TimeDelta": lambda y: samplers.TimeDelta(y, 3),
        "DeltaNormal": lambda y: samplers.DeltaNormal(y, 0.1),
        "Mixed": lambda y: samplers.Mixed(DISCRETE, y, 3),
        "Mixed, one value": lambda y: samplers.Mixed(0 * DISCRETE, y, 3),
        "Soft": lambda y: samplers.Soft(samplers.TimeDelta(y, 3), 0.1),
        "Soft normal": lambda y: samplers.Soft(samplers.DeltaNormal(y, 0.1), 0.1),
        "Hybrid": lambda y: samplers.Hybrid(samplers.TimeDelta(y, 3), 3),
        "FullBatch": lambda y: samplers.FullBatch(samplers.TimeDelta(y, 3), TIME, (0, 1)),
        "Time": lambda _: samplers.Time(TIME, 3),
        "Discrete": lambda _: samplers.Discrete(DISCRETE),
        "Discrete, one value": lambda _: samplers.Discrete(0 * DISCRETE + 7),
        "Discrete, uniform, one value": lambda _: samplers.Discrete(0 * DISCRETE, "uniform"),
        "Multisession": lambda y: samplers.Multisession([y, y], 3),
        "DiscreteMultisession": lambda _: samplers.DiscreteMultisession([DISCRETE, DISCRETE[::-1]]),
    }[name](labels)


OF_LABELS = ("TimeDelta", "DeltaNormal", "Mixed", "Mixed, one value", "Soft", "Soft normal",
             "Hybrid", "FullBatch")  # fmt: skip
OTHERS = ("Time", "Discrete", "Discrete, one value", "Discrete, uniform, one value",
          "Multisession", "DiscreteMultisession")  # fmt: skip


def estimated(network, sampler, recording=X, batch_size=8, num_batches=40, **options):
    """The estimate, and the plain one of the same key."""
    is_joint = isinstance(sampler, samplers.Multisession | samplers.DiscreteMultisession)
    if is_joint:
        network = dataclasses.replace(network, encoders=network.encoders * 2)
    batch_size = None if isinstance(sampler, samplers.FullBatch) else batch_size
    sizes = {"batch_size": batch_size, "num_batches": num_batches, **options}
    recording = [recording, recording] if is_joint else recording
    return cjm.estimate_infonce(KEY, network, recording, sampler, **sizes)


@pytest.mark.parametrize("name", [*OF_LABELS, *OTHERS])
@pytest.mark.parametrize("method", METHODS)
def test_collapsed_embeddings_have_0_bits(name, method):
    sampler = made(name, LABELS["walk"])
    for temperature in (0.01, 1.0):
        found = estimated(model(COLLAPSED, temperature=temperature), sampler, method=method)
        negatives = int(found.num_negatives)
        # Kernel weights sum to 1 but for rounding.
        limit = rounding((3 if "Soft" in name else 1) / temperature, 8, negatives) / np.log(2)
        assert abs(float(found.bits)) <= found.num_objectives * limit
        assert float(found.bits_stderr) <= found.num_objectives * limit


@pytest.mark.parametrize("name", OF_LABELS)
@pytest.mark.parametrize("labels", [name for name in LABELS if name != "walk"])
def test_extreme_labels(name, labels):
    if "Soft" in name and labels == "1e20":
        with pytest.raises(ValueError, match="exceed the range of float32"):
            made(name, LABELS[labels])
        return
    sampler = made(name, LABELS[labels])
    plain, controlled = (estimated(model(), sampler, method=method) for method in METHODS)
    assert_agree(plain, controlled)


def assert_agree(plain, controlled):
    assert np.isfinite(plain.per_batch).all()
    assert np.isfinite(controlled.per_batch).all()
    spread = np.hypot(float(plain.stderr), float(controlled.stderr))
    error = EPS * 100 * (abs(float(plain.align)) + abs(float(plain.uniform)) + 1)
    assert abs(float(plain.loss) - float(controlled.loss)) <= SIGMAS * spread + error


def nearest(labels, query, groups=None, query_groups=None):
    """The earliest of the nearest labels, by all distances in float64."""
    labels, query = (np.asarray(x, np.float64) for x in (labels, query))
    distances = np.sum((query[:, None] - labels[None]) ** 2, axis=2)
    if groups is not None:
        distances[np.asarray(query_groups)[:, None] != groups[None]] = np.inf
    return np.argmin(distances, axis=1)


@pytest.mark.parametrize("labels", ["one-hot", "constant", "1e-20", "1e20"])
def test_positives_of_extreme_labels_are_the_nearest(labels):
    values = np.float32(LABELS[labels])
    delta = 0.1 * float(labels) if labels.startswith("1e") else 0.1
    for sampler in (samplers.TimeDelta(values, 3), samplers.DeltaNormal(values, delta)):
        query = sampler.propose(KEY, 200).query
        assert sampler.sample(KEY, 200).positive.tolist() == nearest(values, query).tolist()
    mixed = samplers.Mixed(DISCRETE, values, 3)
    query, group = mixed.propose(KEY, 200).query
    expected = nearest(values, query, DISCRETE, group)
    assert mixed.sample(KEY, 200).positive.tolist() == expected.tolist()


def test_constant_labels_take_the_first_step_and_soft_ones_the_mean():
    values = LABELS["constant"]
    assert not samplers.TimeDelta(values).sample(KEY, 50).positive.any()
    assert not samplers.DeltaNormal(values, 1.0).sample(KEY, 50).positive.any()
    mixed = samplers.Mixed(DISCRETE, values).sample(KEY, 50)
    assert mixed.positive.tolist() == DISCRETE[mixed.reference].tolist()  # steps 0, 1 and 2
    soft = samplers.Soft(samplers.TimeDelta(values), 0.1)
    found = np.asarray(soft.positive(jnp.asarray(X), soft.propose(KEY, 5).query))
    limit = EPS * (TIME + 8) * np.abs(X).mean(axis=0)
    assert (np.abs(found - X.astype(float).mean(axis=0)) <= limit).all()


@pytest.mark.parametrize("prior", ["empirical", "uniform"])
def test_equal_discrete_labels_are_uniform(prior):
    found = samplers.Discrete(np.full(TIME, 7), prior).sample(KEY, 8000)
    for steps in found:
        assert chisquare(np.bincount(steps, minlength=TIME)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["TimeDelta", "Mixed", "Discrete", "Time"])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_batches_of_one(name, similarity):
    sampler, network = made(name, LABELS["walk"]), model(similarity=similarity, temperature=0.1)
    found = estimated(network, sampler, batch_size=1)
    z = np.asarray(cjm.embed(network, X))
    batches = cjm.draw(KEY, sampler, 1, 40)
    expected = [
        oracle(*(z[steps] for steps in one), similarity, 0.1)[0].loss
        for one in zip(*batches, strict=True)
    ]
    limit = rounding(largest_similarity([z], similarity) / 0.1, 1, 1)
    np.testing.assert_allclose(found.per_batch, expected, rtol=0, atol=limit)
    assert_agree(found, estimated(network, sampler, batch_size=1, method="control_variates"))
    for method in METHODS:
        alone = estimated(network, sampler, batch_size=1, num_batches=1, method=method)
        assert np.isfinite(alone.loss)
        assert np.isnan(alone.stderr)


@pytest.mark.parametrize(
    ("name", "batch_size", "similarity"), [("TimeDelta", 8, "euclidean"), ("Discrete", 1, "cosine")]
)
@pytest.mark.parametrize("architecture", ["offset1-model", "offset1-model-mse"])
def test_control_variates_are_finite_where_plain_losses_are(
    name, batch_size, similarity, architecture
):
    sampler = made(name, LABELS["walk"])

    @partial(jax.jit, static_argnames="method")
    @partial(jax.value_and_grad, has_aux=True)
    def loss(network, recording, *, method):
        found = estimated(network, sampler, recording, batch_size, method=method)
        return found.loss, found

    for temperature, scale, weights in itertools.product(TEMPERATURES, (1, 1e5), (0, 1)):
        one = encoder(architecture, weights=weights)
        network = model(one, similarity=similarity, temperature=temperature)
        (_, plain), gradient = loss(network, X * np.float32(scale), method="plain")
        (_, found), other = loss(network, X * np.float32(scale), method="control_variates")
        assert np.isfinite(plain.per_batch).all()
        assert np.isfinite(found.per_batch).all()
        if scale == 1:
            assert_agree(plain, found)
        if all(np.isfinite(x).all() for x in jax.tree.leaves(gradient)):
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(other))


def test_control_variates_of_similarities_without_digits():
    """Rounding of the exponents exceeds 1: the sums of a batch are not about those of all steps."""
    sampler = made("TimeDelta", LABELS["walk"])
    network = model(encoder("offset1-model-mse"), temperature=1e3)
    loss = jax.jit(partial(estimated, sampler=sampler), static_argnames="method")
    plain, controlled = (
        loss(network, recording=X * np.float32(1e10), method=method) for method in METHODS
    )
    assert EPS * abs(float(plain.uniform)) > 1
    assert np.isfinite(controlled.stderr)  # or any two would agree
    assert_agree(plain, controlled)


def test_gradient_of_control_variates_outside_jit():
    """Windows are summed about each step: what JAX does not see as a sum has no derivative."""

    def loss(network):
        sampler = made("TimeDelta", LABELS["walk"])
        return estimated(network, sampler, method="control_variates").loss

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(loss)(model())))


@pytest.mark.parametrize("value", [7.0, 1e30, np.inf, np.nan])
def test_controls_that_one_half_of_the_batches_does_not_have(value):
    number = 32
    uniform = RNG.normal(size=number).astype(np.float32)
    controls = np.zeros((number, 2), np.float32)
    controls[: number // 2, 0] = uniform[: number // 2]  # of use in the first half
    controls[number // 2 :, 1] = value  # never seen in the first half
    controls[number // 2 :, 0] = uniform[number // 2 :]
    nothing = np.zeros(number, np.float32)
    plain = InfoNCE(uniform, nothing, uniform)
    ones = np.ones(number, np.float32)

    def loss(uniform):
        compared = Compared(nothing, nothing, ones, nothing, uniform, controls)
        return jnp.sum(reduced(plain, compared).loss)

    value, gradient = jax.value_and_grad(loss)(uniform)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("architecture", ["offset1-model", "offset10-model"])
def test_recordings_of_just_enough_steps(architecture):
    network = model(encoder(architecture))
    field = network.encoders[0].receptive_field
    for steps in (field, field + 1) if architecture == "offset10-model" else (field,):
        labels = LABELS["walk"][:steps]
        options = {"recording": X[:steps], "num_batches": 20}
        for sampler in (
            samplers.TimeDelta(labels, steps + 3),  # labels never change over so many steps
            samplers.DeltaNormal(labels, 0.1),
            samplers.Discrete(DISCRETE[:steps]),
            samplers.Mixed(DISCRETE[:steps], labels),
            samplers.Soft(samplers.TimeDelta(labels), 0.1),
            samplers.Time(steps, steps - 1),  # the time offset + 1
        ):
            plain, controlled = (
                estimated(network, sampler, method=method, **options) for method in METHODS
            )
            assert_agree(plain, controlled)
            if steps == field:  # one window only
                assert abs(float(plain.bits)) <= rounding(1, 8, 8) / np.log(2)
        fitted = cjm.fit(
            KEY,
            X[:steps],
            samplers.TimeDelta(labels),
            architecture=architecture,
            num_steps=2,
            batch_size=1,
        )
        assert np.isfinite(fitted.history["total"]).all()
    with pytest.raises(ValueError, match="receptive field"):
        estimated(network, samplers.Discrete([0] * 9), X[: field - 1])
    with pytest.raises(ValueError, match="exceed the time offset"):
        samplers.Time(5, 5)
    with pytest.raises(ValueError, match="at least 17 time steps"):
        samplers.FullBatch(samplers.Time(16), 16, (5, 5))
    least = samplers.FullBatch(samplers.Time(17), 17, (5, 5))
    assert least.batch_size == 1


# --- recordings that are scaled


@pytest.mark.parametrize("architecture", ["offset1-model", "offset10-model"])
def test_scaled_recordings(architecture):
    """Tiny ones leave the biases; of large ones only the direction counts, biases being lost."""
    network, sampler = model(encoder(architecture)), made("TimeDelta", LABELS["walk"])
    tiny, zero = (cjm.embed(network, X * np.float32(scale)) for scale in (1e-20, 0))
    np.testing.assert_array_equal(tiny, zero)
    assert abs(float(estimated(network, sampler, X * 1e-20).bits)) <= rounding(1, 8, 8) / np.log(2)
    large, larger = (cjm.embed(network, X * np.float32(scale)) for scale in (2.0**50, 2.0**60))
    np.testing.assert_allclose(larger, large, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(np.linalg.norm(large, axis=1), 1, rtol=8 * EPS)


def test_recordings_whose_squared_embeddings_overflow():
    network = model(encoder("offset10-model"))
    large, larger = (cjm.embed(network, X * np.float32(scale)) for scale in (2.0**50, 2.0**70))
    np.testing.assert_allclose(larger, large, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("exponent", [-120, -70, 0, 60])
def test_features_are_renormalised_at_all_scales(exponent):
    batch = cjm.draw(KEY, samplers.Time(TIME), 8, 3)
    score = partial(cjm.evaluate, batch=batch, feature_range=slice(0, 2), renormalize=True)
    # Without biases, and with tanh' = 1 or no activation at all, an embedding scales as X does.
    network = model(encoder("offset1-model-mse", biases=0.0))
    z = np.asarray(cjm.embed(network, X * np.float32(2.0**exponent)), np.float64)[:, :2]
    if not (np.abs(z).max(axis=1) > 0).all():
        assert np.isnan(score(network, X * np.float32(2.0**exponent)).loss).any()
        return
    z = np.float32(z / np.linalg.norm(z, axis=1, keepdims=True))
    found = score(network, X * np.float32(2.0**exponent)).loss
    expected = [
        oracle(*(z[steps] for steps in one), "cosine", 1.0)[0].loss
        for one in zip(*batch, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * rounding(1, 8, 8))


def test_an_embedding_of_norm_0_is_an_error_of_whatever_returns_numbers():
    sampler = samplers.TimeDelta(LABELS["walk"])
    assert np.isnan(estimated(model(ZERO), sampler).loss)  # as data: it may run under jit
    sizes = {"batch_size": 4, "num_batches": 2}
    call = partial(pytest.raises, ValueError, match="norm 0")
    with call():
        checkpoint = cjm.Checkpoint(model(ZERO), {"batch_size": 8})
        cjm.goodness_of_fit_score(checkpoint, X, LABELS["walk"], num_batches=2)
    with call():
        cjm.goodness_of_fit_test(KEY, model(ZERO), X, sampler, held_out=slice(None), **sizes)
    with call():
        cjm.bootstrap_goodness_of_fit(KEY, model(ZERO), X, sampler, block_length=5, **sizes)
    with call():
        cjm.compare_goodness_of_fit(KEY, model(), model(ZERO), X, sampler, **sizes)
    with pytest.raises(cjm.TrainingError, match="step 0 the loss or its gradient is not finite"):
        cjm.fit(KEY, X, sampler, model=model(ZERO), num_steps=2, batch_size=4)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_training_at_extreme_temperatures(temperature):
    found = cjm.fit(
        KEY,
        X,
        made("TimeDelta", LABELS["walk"]),
        architecture="offset1-model",
        num_steps=20,
        batch_size=8,
        temperature=temperature,
        learn_temperature=True,
    )
    assert np.isfinite(found.history["total"]).all()
    np.testing.assert_allclose(found.history["temperature"], temperature, rtol=0.01)


# --- uncertainty and tests


@pytest.mark.parametrize("name", ["TimeDelta", "Discrete", "Mixed"])
def test_uncertainty_of_batches_of_one(name):
    sampler, sizes = made(name, LABELS["walk"]), {"batch_size": 1, "num_batches": 4}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Resampled recordings differ no more")
        boot = cjm.bootstrap_goodness_of_fit(KEY, model(), X, sampler, num_resamples=4, **sizes)
    assert np.isfinite(boot.samples).all()
    test = partial(cjm.goodness_of_fit_test, KEY, X=X, sampler=sampler, **sizes)
    found = test(model=model(), num_samples=9, held_out=slice(None))
    assert np.isfinite([found.observed, *found.null]).all()
    refitted = test(model=model(), num_samples=3, method="refit", fit_options={"num_steps": 2})
    assert np.isfinite([refitted.observed, *refitted.null]).all()


def test_uncertainty_of_collapsed_embeddings():
    sampler, sizes = made("TimeDelta", LABELS["walk"]), {"batch_size": 4, "num_batches": 4}
    limit = rounding(1, 4, 4) / np.log(2)
    found = cjm.goodness_of_fit_test(
        KEY, model(COLLAPSED), X, sampler, num_samples=9, held_out=slice(None), **sizes
    )
    assert abs(found.observed) <= limit
    assert found.p_value == 1
    with pytest.raises(ValueError, match=r"never changes.*block_length"):
        cjm.bootstrap_goodness_of_fit(KEY, model(COLLAPSED), X, sampler, **sizes)
    with pytest.warns(UserWarning, match="comes out as 0"):
        boot = cjm.bootstrap_goodness_of_fit(
            KEY, model(COLLAPSED), X, sampler, block_length=5, num_resamples=3, **sizes
        )
    assert abs(boot.observed) <= limit
    assert boot.stderr == 0
    for name in ("constant", "1e20"):
        labels = samplers.TimeDelta(LABELS[name])
        test = partial(cjm.goodness_of_fit_test, KEY, model(), X, labels, held_out=slice(None))
        if name == "constant":
            with pytest.raises(ValueError, match="labels never change"):
                test(**sizes)
        else:
            assert 0 < test(num_samples=9, **sizes).p_value <= 1


@pytest.mark.parametrize("exponent", [-900, -300, 300, 900])
def test_block_lengths_do_not_depend_on_the_scale(exponent):
    walk = LABELS["walk"]
    expected = cjm.optimal_block_length(walk)
    assert expected > 1
    assert cjm.optimal_block_length(walk * 2.0**exponent) == expected


# --- consistency

FIRST = RNG.normal(size=(50, 3))
SECOND = FIRST @ RNG.normal(size=(3, 2)) + RNG.normal(size=(50, 2))
SCALES = (1e-20, 1e-10, 1.0, 1e10, 1e20)


def regression(source, target):
    source, target = (np.asarray(x, np.float64) for x in (source, target))
    return r2_score(target, LinearRegression().fit(source, target).predict(source))


def both_ways(first, second, **options):
    return cjm.consistency_score([first, second], "runs", **options).scores


@pytest.mark.parametrize("scale", SCALES)
def test_consistency_does_not_depend_on_the_scale(scale):
    expected = regression(FIRST, SECOND), regression(SECOND, FIRST)
    np.testing.assert_allclose(both_ways(FIRST * scale, SECOND), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(both_ways(FIRST, SECOND * scale), expected, rtol=0, atol=1e-9)
    held_out = both_ways(FIRST, SECOND, cv=5)
    np.testing.assert_allclose(both_ways(FIRST * scale, SECOND, cv=5), held_out, rtol=1e-9)
    narrow = [jnp.asarray(x, jnp.float32) for x in (FIRST * scale, SECOND)]
    moments = FIRST - FIRST.mean(axis=0)
    limit = EPS * len(FIRST) * np.linalg.cond(moments) ** 2
    found = cjm.consistency_matrix(narrow)
    np.testing.assert_allclose([found[0, 1], found[1, 0]], expected, rtol=0, atol=limit)
    at_shifts = cjm.shifted_consistency(*narrow)
    np.testing.assert_allclose(at_shifts[0], expected[0], rtol=0, atol=limit)
    test, unscaled = (
        cjm.consistency_test(KEY, [x, SECOND], "runs") for x in (FIRST * scale, FIRST)
    )
    assert test.pairwise.p_value.tolist() == unscaled.pairwise.p_value.tolist()


@pytest.mark.parametrize("scale", [1e-300, 1e-200, *SCALES, 1e200, 1e300])
def test_alignment_does_not_depend_on_the_scale(scale):
    labels = [np.arange(50) % 7] * 2
    expected, _ = cjm.align_embeddings([FIRST, SECOND], labels)
    found, _ = cjm.align_embeddings([FIRST * scale, SECOND], labels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    if scale in SCALES:
        narrow, _ = cjm.align_embeddings([np.float32(FIRST * scale), np.float32(SECOND)], labels)
        shortest = np.linalg.norm(cjm.align_embeddings([FIRST], labels[:1], False)[0], axis=1).min()
        limit = EPS * 50 * np.abs(FIRST).max() / shortest  # a mean is off by as much as its terms
        np.testing.assert_allclose(narrow, expected, rtol=0, atol=limit)


def test_a_mean_of_0_cannot_be_normalised():
    labels = [np.arange(50) % 7] * 2
    with pytest.raises(ValueError, match=r"embedding 0 in bin 0 .*normalize=False"):
        cjm.consistency_score([0 * FIRST, SECOND], "datasets", labels)
    zero, _ = cjm.align_embeddings([0 * FIRST, SECOND], labels, normalize=False)
    assert not zero.any()


def test_constant_embeddings():
    """Predicting a constant is perfect; a constant predicts nothing. As scikit-learn has it."""
    constant = np.ones((50, 3))
    expected = [regression(constant, FIRST), regression(FIRST, constant)]
    assert both_ways(constant, FIRST).tolist() == expected == [0, 1]
    assert both_ways(constant, constant).tolist() == [1, 1]
    rounded = 0.1 * constant  # whose mean is another number
    assert both_ways(FIRST, rounded).tolist()[0] == regression(FIRST, rounded) == 0
    found = cjm.consistency_matrix([np.float32(constant), np.float32(FIRST)])
    assert (found[0, 1], found[1, 0]) == (0, 1)
    test = cjm.consistency_test(KEY, [constant, FIRST], "runs")
    assert test.pairwise.p_value.tolist() == [1, 1]
    with pytest.raises(ValueError, match="never changes"):
        cjm.bootstrap_consistency(KEY, [constant, FIRST], "runs")


@pytest.mark.parametrize(
    "wide",
    [
        np.column_stack([FIRST, FIRST[:, 0]]),
        np.column_stack([FIRST, 2 * FIRST[:, 0] - FIRST[:, 1]]),
        np.column_stack([FIRST, np.ones(50)]),
        FIRST * [1e-20, 1, 1e20],
    ],
    ids=["repeated", "collinear", "constant", "scales"],
)
def test_columns_that_do_not_count(wide):
    expected = regression(wide, SECOND), regression(SECOND, wide)
    np.testing.assert_allclose(both_ways(wide, SECOND), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_as_few_rows_as_columns(rows):
    first, second = RNG.normal(size=(rows, 4)), RNG.normal(size=(rows, 3))
    np.testing.assert_allclose(both_ways(first, second), 1, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="at least two rows"):
        both_ways(first[:1], second[:1])
