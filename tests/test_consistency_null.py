"""The null distributions of the consistency: against loops over shifts, and what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import binom

from cebra_jax_metrics import (
    align_embeddings,
    consistency_matrix,
    consistency_score,
    consistency_test,
    shifted_consistency,
)
from cebra_jax_metrics.consistency import against_null

KEY = jax.random.key(0)


def autoregressive(rng, rows, width, coefficient=0.95):
    """Stationary AR(1) series of variance 1."""
    noise = rng.normal(size=(rows + 200, width)) * np.sqrt(1 - coefficient**2)
    return lfilter([1], [1, -coefficient], noise, axis=0)[200:]


def related(seed, rows, *widths, noise=3.0):
    """Slow series that share three dimensions."""
    rng = np.random.default_rng(seed)
    shared = autoregressive(rng, rows, 3)
    return [
        shared @ rng.normal(size=(3, width)) + noise * autoregressive(rng, rows, width)
        for width in widths
    ]


def loop(source, target):
    """R² at every shift, one regression after another."""
    return np.array(
        [
            consistency_score([source, np.roll(target, s, axis=0)], "runs").scores[0]
            for s in range(len(source))
        ]
    )


@pytest.mark.parametrize("rows", [16, 45, 101])
@pytest.mark.parametrize("widths", [(3, 3), (1, 4), (5, 2)])
def test_all_shifts_equal_the_loop(rows, widths):
    source, target = related(0, rows, *widths)
    with jax.enable_x64(True):
        found = shifted_consistency(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(found, loop(source, target), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "columns", [[0, 0, 1], [0, 1, 2, 2]], ids=["two equal", "two equal of four"]
)
def test_shifts_of_rank_deficient_embeddings(columns):
    source, target = related(1, 60, 3, 3)
    target[:, 1] = 0.5
    source, target = source[:, columns], target[:, columns]
    with jax.enable_x64(True):
        found = shifted_consistency(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(found, loop(source, target), rtol=0, atol=1e-8)


def test_shifts_in_float32():
    source, target = (x.astype(np.float32) for x in related(2, 100, 3, 4))
    found = shifted_consistency(jnp.asarray(source), jnp.asarray(target))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, loop(source, target), rtol=0, atol=1e-5)


@pytest.mark.parametrize("min_shift", [1, 7, 20])
def test_between_runs_equals_the_loop(min_shift):
    embeddings = related(3, 40, 2, 3, 1)
    test = consistency_test(KEY, embeddings, "runs", min_shift=min_shift, quantiles=[0.1, 0.5])
    scores = consistency_score(embeddings, "runs")
    shifts = np.arange(min_shift, 41 - min_shift)
    np.testing.assert_array_equal(test.pairs, scores.pairs)
    np.testing.assert_array_equal(test.ids, scores.ids)
    for number, (i, j) in enumerate(test.pairs):
        null = loop(embeddings[i], embeddings[j])[shifts]
        each = [x[..., number] for x in test.pairwise]
        check(each, scores.scores[number], null)
    null = []
    for s in shifts:  # embedding m is shifted by m s
        shifted = [np.roll(x, m * s, axis=0) for m, x in enumerate(embeddings)]
        null.append(consistency_score(shifted, "runs").scores.mean())
    check(test.overall, scores.scores.mean(), np.array(null))


def check(found, observed, null):
    """Every field of a test, from the observed score and the samples of its null."""
    for value, expected in zip(
        found,
        (
            observed,
            null.mean(),
            np.quantile(null, [0.1, 0.5]),
            observed - null.mean(),
            (1 + (null >= observed - 1e-9).sum()) / (1 + len(null)),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-9)


def test_equal_scores_count_against_the_observed():
    """A period of 20, so that every 10th shift is as good as none but for rounding."""
    wave = np.sin(2 * np.pi * np.arange(200)[:, None] / 20)
    test = consistency_test(KEY, [wave, wave + 1], "runs")
    np.testing.assert_allclose(test.pairwise.p_value, 20 / 200, atol=1e-12)


def following(rng, steps, width, strength):
    """An embedding and a slow label that it follows more or less."""
    walk = rng.normal(0.02, 0.05, size=steps).cumsum() + rng.uniform(0, 2)
    label = np.abs(walk % 2 - 1)
    curve = np.stack([np.sin((k + 1) * 2 * label) for k in range(width)], axis=1)
    return strength * curve + autoregressive(rng, steps, width, 0.9), label


def recordings(seed, *strengths, steps=1500):
    rng = np.random.default_rng(seed)
    pairs = [following(rng, steps - 100 * i, 3, s) for i, s in enumerate(strengths)]
    return [x for x, _ in pairs], [y for _, y in pairs]


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("null", ["shift", "permutation"])
def test_between_datasets_equals_the_loop(null, integers):
    embeddings, labels = recordings(4, 1, 0.5, 0, steps=500)
    embeddings[0][7] = np.nan
    if integers:
        labels = [np.round(8 * y).astype(int) for y in labels]
    ids, bins = ["a", "b", "a"], 12
    options = {"null": null, "min_shift": 5, "num_samples": 8, "quantiles": [0.1, 0.5]}
    test = consistency_test(KEY, embeddings, "datasets", labels, ids, bins, **options)
    kept = [~np.isnan(x).any(axis=1) for x in embeddings]
    embeddings = [x[k] for x, k in zip(embeddings, kept, strict=True)]
    labels = [y[k] for y, k in zip(labels, kept, strict=True)]

    def wrong(key, label):
        if null == "permutation":
            return np.asarray(label)[jax.random.permutation(key, len(label))]
        shift = jax.random.randint(key, (), 5, len(label) - 4, dtype=jnp.int32)
        return np.roll(label, shift)

    def scores(sources, targets):
        """Of ("a", "b") and ("b", "a"), averaged over the two datasets called a."""
        rows = [
            align_embeddings(embeddings, list(chosen), n_bins=bins) for chosen in (sources, targets)
        ]
        with jax.enable_x64(True):
            r2 = np.asarray(consistency_matrix([*rows[0], *rows[1]]))[:3, 3:]
        return np.array([(r2[0, 1] + r2[2, 1]) / 2, (r2[1, 0] + r2[1, 2]) / 2])

    nulls = {"target": [], "source": [], "both": []}
    for key in jax.random.split(KEY, 8):
        shifted = [wrong(jax.random.fold_in(key, m), y) for m, y in enumerate(labels)]
        nulls["target"].append(scores(labels, shifted))
        nulls["source"].append(scores(shifted, labels))
        nulls["both"].append(scores(shifted, shifted).mean())
    observed = scores(labels, labels)
    assert test.pairs.tolist() == [["a", "b"], ["b", "a"]]
    for number in range(2):
        sides = [np.array(nulls[side])[:, number] for side in ("target", "source")]
        weaker = max(sides, key=lambda null, n=number: (null >= observed[n]).sum())
        check([x[..., number] for x in test.pairwise], observed[number], weaker)
    check(test.overall, observed.mean(), np.array(nulls["both"]))


def test_the_same_key_gives_the_same_result():
    embeddings, labels = recordings(5, 1, 1, steps=400)
    question = (embeddings, "datasets", labels, None, 20)
    first, again, old, other = (
        consistency_test(key, *question, num_samples=50)
        for key in (KEY, KEY, jax.random.PRNGKey(0), jax.random.key(1))
    )
    for result in (again, old):
        jax.tree.map(np.testing.assert_array_equal, first, result)
    assert first.pairwise.null_mean[0] != other.pairwise.null_mean[0]


def test_jax_arrays_stay_in_their_dtype():
    embeddings, labels = recordings(6, 1, 1, steps=400)
    wide = consistency_test(KEY, embeddings, "datasets", labels, None, 20, num_samples=20)
    as_jax = [jnp.asarray(x) for x in embeddings]
    narrow = consistency_test(KEY, as_jax, "datasets", labels, None, 20, num_samples=20)
    assert wide.pairwise.observed.dtype == np.float64
    assert narrow.pairwise.observed.dtype == np.float32
    for a, b in zip(wide.pairwise, narrow.pairwise, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    runs = consistency_test(KEY, [x[:300] for x in as_jax], "runs")
    assert runs.overall.p_value.dtype == np.float32


def interval(number, level, coverage=0.99):
    """Binomial interval of the share of rejections at a level."""
    return np.array(binom.interval(coverage, number, level)) / number


@pytest.mark.heavy
def test_calibrated_between_runs():
    p_values, overall = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        test = consistency_test(KEY, [autoregressive(rng, 5000, 3) for _ in range(2)], "runs")
        p_values.append(test.pairwise.p_value)
        overall.append(test.overall.p_value)
    for values in (*np.transpose(p_values), overall):
        low, high = interval(400, 0.05)
        assert low <= np.mean(np.array(values) <= 0.05) <= high


@pytest.mark.heavy
def test_calibrated_for_the_mean_of_many():
    overall = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        runs = [autoregressive(rng, 1000, 2, 0.9) for _ in range(5)]
        overall.append(consistency_test(KEY, runs, "runs").overall.p_value)
    low, high = interval(400, 0.05)
    assert low <= np.mean(np.array(overall) <= 0.05) <= high


@pytest.mark.heavy
def test_finds_what_is_there():
    """Each target column is one of the source's plus noise, so that the true R² is 0.3."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        source, noise = (autoregressive(rng, 5000, 3) for _ in range(2))
        target = np.sqrt(0.3) * source + np.sqrt(0.7) * noise
        found.append(consistency_test(KEY, [source, target], "runs").pairwise.p_value[0] <= 0.05)
    assert np.mean(found) > 0.95


@pytest.mark.heavy
@pytest.mark.parametrize("strengths", [(1, 0), (0, 0)])
def test_valid_between_datasets(strengths):
    """A pair of which only one follows its label is not found more often than the level says."""
    p_values = []
    for seed in range(200):
        embeddings, labels = recordings(seed, *strengths)
        question = (embeddings, "datasets", labels, None, 20)
        test = consistency_test(jax.random.key(seed), *question, num_samples=200)
        p_values.append(test.pairwise.p_value)
    _, high = interval(200, 0.05)
    assert (np.mean(np.array(p_values) <= 0.05, axis=0) <= high).all()


@pytest.mark.heavy
def test_finds_related_datasets():
    found = []
    for seed in range(40):
        embeddings, labels = recordings(seed, 2, 2, steps=4000)
        test = consistency_test(KEY, embeddings, "datasets", labels, None, 20, num_samples=200)
        found.append(max(test.pairwise.p_value.max(), test.overall.p_value) <= 0.05)
    assert np.mean(found) > 0.9


def test_null_scores_that_are_undefined_count_against_the_observed():
    null = np.array([np.nan] * 90 + [0.1] * 9)
    assert float(against_null(0.5, null, [0.5]).p_value) == pytest.approx(91 / 100)


ROWS = np.random.default_rng(0).normal(size=(30, 2))
LABEL = np.linspace(0, 1, 30)
BAD = {
    "key": (lambda: consistency_test(0, [ROWS] * 2, "runs"), TypeError, "PRNG key"),
    "one": (lambda: consistency_test(KEY, [ROWS], "runs"), ValueError, "at least 2"),
    "nan": (lambda: consistency_test(KEY, [ROWS, ROWS * np.nan], "runs"), ValueError, "NaN"),
    "permuted": (
        lambda: consistency_test(KEY, [ROWS] * 2, "runs", null="permutation"),
        ValueError,
        "null='shift'",
    ),
    "null": (lambda: consistency_test(KEY, [ROWS] * 2, "runs", null="x"), ValueError, "null has"),
    "far": (
        lambda: consistency_test(KEY, [ROWS] * 2, "runs", min_shift=16),
        ValueError,
        "min_shift=16 leaves no shift of 30",
    ),
    "near": (lambda: consistency_test(KEY, [ROWS] * 2, "runs", min_shift=0), ValueError, "least 1"),
    "level": (
        lambda: consistency_test(KEY, [ROWS] * 2, "runs", quantiles=[50]),
        ValueError,
        "from 0 to 1",
    ),
    "samples": (
        lambda: consistency_test(KEY, [ROWS] * 2, "datasets", [LABEL] * 2, num_samples=0),
        ValueError,
        "num_samples",
    ),
    "far_labels": (
        lambda: consistency_test(KEY, [ROWS] * 2, "datasets", [LABEL] * 2, None, 5, min_shift=16),
        ValueError,
        "min_shift",
    ),
    "shapes": (lambda: shifted_consistency(ROWS, ROWS[1:]), ValueError, r"\(30, 2\) and \(29, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
