"""Distributions of draws against what they should be, and the contracts of samplers."""

import json
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cebra_jax_metrics import draw
from cebra_jax_metrics.samplers import (
    Batch,
    DeltaNormal,
    Discrete,
    Hybrid,
    Mixed,
    Time,
    TimeDelta,
)

from .conftest import GOLDEN

N = 40
RNG = np.random.default_rng(0)
CONTINUOUS = RNG.normal(size=(N, 2)).cumsum(0).astype(np.float32)
CONTINUOUS[25] = CONTINUOUS[3]  # a duplicate: step 25 is never a nearest label
ONE_D = np.round(RNG.normal(size=N), 1).astype(np.float32)  # many duplicates
DISCRETE = RNG.choice([-3, 0, 7, 7, 7, 900], N)

SAMPLERS = {
    "time": Time(N, 3),
    "time_delta": TimeDelta(CONTINUOUS, 3),
    "time_delta_1d": TimeDelta(ONE_D, 2),
    "delta_normal": DeltaNormal(CONTINUOUS, 0.5),
    "delta_normal_1d": DeltaNormal(ONE_D, 0.5),
    "discrete": Discrete(DISCRETE),
    "discrete_uniform": Discrete(DISCRETE, prior="uniform"),
    "mixed": Mixed(DISCRETE, CONTINUOUS, 3),
}
each = pytest.mark.parametrize("name", SAMPLERS)
SIZES = 32, 3  # of and number of batches; the same ones share compilations


def many(name, seed=0, size=100_000):
    batch = draw(jax.random.key(seed), SAMPLERS[name], size // 20, 20)
    return tuple(np.asarray(x).ravel() for x in batch)


def assert_distributed(sample, probabilities):
    """Chi-square of drawn steps against their probabilities."""
    counts = np.bincount(sample, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    expected = probabilities[possible] / probabilities[possible].sum() * len(sample)
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-4


def prior(name):
    if name == "time":
        return (np.arange(N) < N - 3).astype(float)
    if name in ("discrete_uniform", "mixed"):
        values, index, counts = np.unique(DISCRETE, return_inverse=True, return_counts=True)
        return 1 / (len(values) * counts[index])
    return np.ones(N) / N


def nearest(labels, queries, allowed=None):
    distance = ((labels[:, None].astype(np.float64) - queries[None]) ** 2).sum(-1)
    if allowed is not None:
        distance[~allowed] = np.inf
    return distance.argmin(0)


def conditional(name, reference):
    """Probabilities of the positive of one reference, by enumeration or by integration."""
    labels = CONTINUOUS if name in ("time_delta", "delta_normal", "mixed") else ONE_D[:, None]
    if name == "time":
        return np.bincount([reference + 3], minlength=N).astype(float)
    if name.startswith("discrete"):
        return (DISCRETE[reference] == DISCRETE).astype(float)
    if name.startswith("delta_normal"):
        noise = 0.5 * np.random.default_rng(1).normal(size=(200_000, labels.shape[1]))
        found = nearest(labels, labels[reference] + noise)
    else:
        offset = 2 if name == "time_delta_1d" else 3
        change = np.zeros_like(labels)
        change[offset:] = labels[offset:] - labels[:-offset]
        same = DISCRETE[reference] == DISCRETE if name == "mixed" else None
        found = nearest(labels, labels[reference] + change, same)
    return np.bincount(found, minlength=N).astype(float)


@pytest.mark.heavy
@each
def test_references_and_negatives_follow_the_prior(name):
    reference, _, negative = many(name)
    assert_distributed(reference, prior(name))
    assert_distributed(negative, prior(name))


@pytest.mark.heavy
@each
def test_references_and_negatives_are_independent(name):
    reference, _, negative = many(name, seed=1)
    table = np.histogram2d(reference, negative, bins=[8, 8])[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.heavy
@each
def test_positives_follow_the_conditional(name):
    reference, positive, _ = many(name, seed=2)
    for step in (0, 3, 17):
        sample = positive[reference == step]
        assert len(sample) > 300
        probabilities = conditional(name, step)
        if name.startswith("delta_normal"):  # its probabilities are themselves sampled
            table = np.stack([np.bincount(sample, minlength=N), probabilities])
            table = np.where(table.sum(0) < 10, 0, table)
            assert stats.chi2_contingency(table[:, table.any(0)]).pvalue > 1e-4
        else:
            assert_distributed(sample, probabilities)


def test_normal_noise_is_normal():
    sampler = DeltaNormal(np.zeros((1, 2)), 0.3)
    query = sampler.propose(jax.random.key(0), 20_000).query
    assert query.dtype == jnp.float32
    assert stats.kstest(np.ravel(query) / 0.3, "norm").pvalue > 1e-3


@each
def test_draws_are_int32_and_within_the_recording(name):
    batch = draw(jax.random.key(0), SAMPLERS[name], *SIZES)
    for steps in batch:
        assert steps.dtype == jnp.int32
        assert steps.shape == SIZES[::-1]
        assert 0 <= steps.min() <= steps.max() < N


@each
def test_batch_i_depends_on_the_key_and_i_only(name):
    sampler, key = SAMPLERS[name], jax.random.key(3)
    size, number = SIZES
    whole = draw(key, sampler, size, 2 * number)
    halves = [draw(key, sampler, *SIZES, start=start) for start in (0, number)]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *x: jnp.concatenate(x), *halves))
    alone = sampler.sample(jax.random.fold_in(key, 4), size)
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda x: x[4], whole))
    assert not np.array_equal(whole.reference[0], whole.reference[1])


@each
def test_the_same_draws_on_every_version_of_jax(name):
    """Written by jax 0.10.2; a change of JAX's generators would show here."""
    expected = json.loads((GOLDEN / "draws.json").read_text())[name]
    batch = draw(jax.random.key(0), SAMPLERS[name], 5, 2)
    for field in Batch._fields:
        np.testing.assert_array_equal(getattr(batch, field), expected[field])


@pytest.mark.parametrize("name", ["time_delta", "time_delta_1d", "delta_normal", "mixed"])
def test_every_positive_is_a_nearest_label(name):
    sampler, key = SAMPLERS[name], jax.random.key(10)
    query = sampler.propose(key, 500).query
    allowed = None
    labels = np.asarray(sampler.continuous if name == "mixed" else sampler.labels)
    if name == "mixed":
        query, groups = query
        allowed = np.asarray(sampler.discrete)[:, None] == np.asarray(groups)[None]
    expected = nearest(labels, np.asarray(query, np.float64), allowed)
    np.testing.assert_array_equal(sampler.sample(key, 500).positive, expected)


def test_samplers_made_under_jit_keep_their_dtypes_in_x64():
    wide = np.where(np.arange(N) % 2, 2**32, 0)
    with jax.enable_x64(True):
        key = jax.random.key(0)
        offsets = jnp.asarray([1, 2])
        positive = jax.vmap(lambda t: Time(N, t).sample(key, 8).positive)(offsets)
        deltas = jnp.asarray([0.1, 0.2])
        query = jax.vmap(lambda d: DeltaNormal(CONTINUOUS, d).propose(key, 8).query)(deltas)
        batch = jax.jit(lambda labels: draw(key, Discrete(labels), 64, 2))(jnp.asarray(wide))
    assert positive.dtype == jnp.int32
    assert query.dtype == jnp.float32
    assert batch.positive.dtype == jnp.int32
    np.testing.assert_array_equal(wide[batch.reference], wide[batch.positive])


@each
def test_old_keys_draw_the_same(name):
    old = draw(jax.random.PRNGKey(5), SAMPLERS[name], *SIZES)
    chex.assert_trees_all_equal(old, draw(jax.random.key(5), SAMPLERS[name], *SIZES))


@pytest.mark.heavy
@each
def test_same_draws_in_x64(name):
    expected = jax.tree.map(np.asarray, draw(jax.random.key(0), SAMPLERS[name], *SIZES))
    with jax.enable_x64(True):
        found = draw(jax.random.key(0), SAMPLERS[name], *SIZES)
        traced = jax.jit(draw, static_argnums=(2, 3))(jax.random.key(0), SAMPLERS[name], *SIZES)
    for steps in (*found, *traced):
        assert steps.dtype == jnp.int32
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, found), expected)


@each
def test_draw_under_jit_is_draw(name):
    sampler, key = SAMPLERS[name], jax.random.key(4)
    jitted = jax.jit(draw, static_argnums=(2, 3))(key, sampler, *SIZES)
    chex.assert_trees_all_equal(jitted, draw(key, sampler, *SIZES))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "time"])
def test_padding_changes_no_draw(name):
    sampler, key = SAMPLERS[name], jax.random.key(6)

    def pad(x):
        return jnp.pad(x, ((0, 9),) + ((0, 0),) * (x.ndim - 1)) if x.ndim else x

    padded = jax.tree.map(pad, sampler)
    expected = draw(key, sampler, *SIZES)
    chex.assert_trees_all_equal(draw(key, padded, *SIZES), expected)
    jitted = jax.jit(draw, static_argnums=(2, 3))(key, padded, *SIZES)
    chex.assert_trees_all_equal(jitted, expected)


def test_stacked_samplers_are_drawn_from_by_vmap():
    shifted = [TimeDelta(np.roll(CONTINUOUS, s, 0), 3) for s in (0, 5, 11)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *shifted)
    key = jax.random.key(7)
    found = jax.vmap(lambda s: draw(key, s, 16, 2))(stacked)
    for i, sampler in enumerate(shifted):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, i=i: x[i], found), draw(key, sampler, 16, 2)
        )


def test_relabelling_discrete_values_changes_nothing_but_the_order():
    batch = draw(jax.random.key(8), Discrete(DISCRETE), 64, 4)
    np.testing.assert_array_equal(DISCRETE[batch.reference], DISCRETE[batch.positive])
    same_order = np.unique(DISCRETE, return_inverse=True)[1] * 10 - 5
    chex.assert_trees_all_equal(draw(jax.random.key(8), Discrete(same_order), 64, 4), batch)


def test_offset_longer_than_the_recording_means_no_change():
    batch = draw(jax.random.key(9), TimeDelta(CONTINUOUS, N + 5), 64, 2)
    found = CONTINUOUS[np.asarray(batch.positive)]
    np.testing.assert_array_equal(found, CONTINUOUS[np.asarray(batch.reference)])


def test_batch_larger_than_the_recording():
    assert draw(jax.random.key(0), Time(3), 1000, 1).reference.shape == (1, 1000)


NAN = CONTINUOUS.copy()
NAN[4, 1] = np.nan
STEPS = np.sort(RNG.choice(N - 3, 25, replace=True))[::-1]  # some twice, some not at all
FROM_STEPS = {
    name: replace(sampler, steps=STEPS, length=sampler.length if name == "time" else None)
    for name, sampler in SAMPLERS.items()
}
each_from_steps = pytest.mark.parametrize("name", FROM_STEPS)


@pytest.mark.heavy
@each_from_steps
def test_from_steps_references_are_drawn_as_often_as_they_are_named(name):
    batch = draw(jax.random.key(1), FROM_STEPS[name], 5000, 20)
    expected = np.bincount(STEPS, minlength=N).astype(float)
    if name in ("discrete_uniform", "mixed"):
        _, index, counts = np.unique(DISCRETE[STEPS], return_inverse=True, return_counts=True)
        expected = np.bincount(STEPS, 1 / counts[index], minlength=N)
    for steps in (batch.reference, batch.negative):
        assert_distributed(np.asarray(steps).ravel(), expected)
    positive = np.asarray(batch.positive).ravel()
    if name == "time":
        np.testing.assert_array_equal(positive, np.asarray(batch.reference).ravel() + 3)
    else:
        assert np.isin(positive, STEPS).all()


@each_from_steps
def test_all_steps_are_the_whole_recording(name):
    sampler = SAMPLERS[name]
    every = np.arange(N - 3 if name == "time" else N)
    some = replace(sampler, steps=every)
    chex.assert_trees_all_equal(
        draw(jax.random.key(2), some, *SIZES), draw(jax.random.key(2), sampler, *SIZES)
    )


@pytest.mark.parametrize("name", ["time_delta", "time_delta_1d", "delta_normal", "mixed"])
def test_from_steps_every_positive_is_the_nearest_of_them(name):
    sampler, key = FROM_STEPS[name], jax.random.key(10)
    query = sampler.propose(key, 500).query
    labels = np.asarray(sampler.continuous if name == "mixed" else sampler.labels)[STEPS]
    allowed = None
    if name == "mixed":
        query, groups = query
        allowed = np.asarray(sampler.discrete)[STEPS][:, None] == np.asarray(groups)[None]
    expected = STEPS[nearest(labels, np.asarray(query, np.float64), allowed)]
    np.testing.assert_array_equal(sampler.sample(key, 500).positive, expected)


def test_steps_may_be_a_slice():
    """Of the whole recording; those without room for a positive are left out."""
    for steps in (slice(30, N), slice(-10, None), np.arange(30, N)):
        np.testing.assert_array_equal(Time(N, 3, steps).steps, np.arange(30, N - 3))
        np.testing.assert_array_equal(Discrete(DISCRETE, steps=steps).steps, np.arange(30, N))


def test_from_steps_labels_change_as_they_did_in_the_recording():
    """Not from one of the steps to the next: here all changes are 3, whatever the steps."""
    sampler = TimeDelta(np.arange(float(N)), 3, steps=np.arange(3, N - 10, 7))
    proposal = sampler.propose(jax.random.key(0), 200)
    change = np.asarray(proposal.query[:, 0]) - np.asarray(proposal.reference)
    np.testing.assert_array_equal(change, 3)


@each_from_steps
def test_from_steps_under_jit_and_in_chunks(name):
    sampler, key = FROM_STEPS[name], jax.random.key(4)
    expected = draw(key, sampler, *SIZES)
    jitted = jax.jit(draw, static_argnums=(2, 3))(key, sampler, *SIZES)
    chex.assert_trees_all_equal(jitted, expected)
    last = draw(key, sampler, 32, 1, start=2)
    chex.assert_trees_all_equal(last, jax.tree.map(lambda x: x[2:], expected))


BAD = {
    "short": (lambda: Time(3, 3), ValueError, "exceed the time offset"),
    "negative": (lambda: Time(5, -1), ValueError, "time_offset has to be at least 0"),
    "fraction": (lambda: Time(5, 0.5), TypeError, "time_offset has to be an integer"),
    "nan": (lambda: TimeDelta(NAN), ValueError, "NaN"),
    "infinite": (lambda: TimeDelta(CONTINUOUS.astype(float) * 1e300), ValueError, "infinity"),
    "3d": (lambda: TimeDelta(np.zeros((4, 2, 2))), ValueError, r"\(4, 2, 2\)"),
    "empty": (lambda: TimeDelta(np.zeros((0, 2))), ValueError, "not empty"),
    "text": (lambda: TimeDelta(np.array(["a", "b"])), TypeError, "numbers"),
    "zero": (lambda: TimeDelta(CONTINUOUS, 0), ValueError, "at least 1"),
    "length": (lambda: TimeDelta(CONTINUOUS, 1, N + 1), ValueError, "length is 41"),
    "delta": (lambda: DeltaNormal(CONTINUOUS, -1.0), ValueError, "delta"),
    "delta_nan": (lambda: DeltaNormal(CONTINUOUS, np.nan), ValueError, "delta"),
    "float": (lambda: Discrete(ONE_D), TypeError, "integers"),
    "2d": (lambda: Discrete(np.zeros((4, 2), int)), ValueError, r"\(4, 2\)"),
    "prior": (lambda: Discrete(DISCRETE, "flat"), ValueError, "'flat'"),
    "lengths": (lambda: Mixed(DISCRETE, CONTINUOUS[1:]), ValueError, "39 samples"),
    "swapped": (lambda: Mixed(CONTINUOUS, DISCRETE), ValueError, r"\(time,\)"),
    "steps": (lambda: TimeDelta(CONTINUOUS, 1, steps=[0, N]), ValueError, r"within \[0, 40\)"),
    "steps_time": (lambda: Time(N, 3, [N - 3]), ValueError, "room .* the last that does is 36"),
    "steps_traced": (
        lambda: jax.jit(lambda n: Time(n, 3, slice(0, 5)).steps)(N),
        TypeError,
        "pass integers under jit",
    ),
    "steps_float": (
        lambda: Discrete(DISCRETE, steps=[0.5]),
        TypeError,
        "steps have to be integers",
    ),
    "steps_empty": (lambda: Time(N, 3, np.zeros(0, int)), ValueError, "steps have to be of shape"),
    "steps_hybrid": (
        lambda: Hybrid(TimeDelta(CONTINUOUS, 1, steps=[1])),
        ValueError,
        "without steps",
    ),
    "steps_length": (
        lambda: TimeDelta(CONTINUOUS, 1, length=3, steps=[1, 2]),
        ValueError,
        "length is 3, but there are only 2 steps",
    ),
    "key": (lambda: draw(0, Time(5), 4, 1), TypeError, r"jax.random.key\(0\)"),
    "batch_size": (lambda: draw(jax.random.key(0), Time(5), 0, 1), ValueError, "batch_size"),
    "num_batches": (lambda: draw(jax.random.key(0), Time(5), 4, 0), ValueError, "num_batches"),
    "size": (lambda: draw(jax.random.key(0), Time(5), 4.0, 1), TypeError, "batch_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
