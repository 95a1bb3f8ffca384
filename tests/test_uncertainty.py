"""Error bars: do intervals cover, do splits keep their distance, do paired draws pay?"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter

from cebra_jax_metrics import (
    Encoder,
    Model,
    bootstrap_consistency,
    bootstrap_goodness_of_fit,
    compare_goodness_of_fit,
    consistency_score,
    estimate_infonce,
    fit,
    goodness_of_fit_score,
    optimal_block_length,
    required_gap,
    samplers,
    time_folds,
    time_split,
)
from cebra_jax_metrics.demo import load_demo
from cebra_jax_metrics.uncertainty import Bootstrap, resampled_places

KEY = jax.random.key(0)
TUNING = np.linspace(-2.5, 2.5, 20)
PHI = 0.9
SIZES = {"batch_size": 128}


def slow(rng, *shape, phi=PHI):
    """AR(1) series of variance 1 along the first axis."""
    noise = rng.normal(size=(shape[0] + 200, *shape[1:])) * math.sqrt(1 - phi**2)
    return lfilter([1], [1, -phi], noise, axis=0)[200:].astype(np.float32)


def simulate(seed, steps):
    """Neurons tuned to a slow label."""
    rng = np.random.default_rng(seed)
    label = slow(rng, steps, 1)
    rates = 3 * np.exp(-((label - TUNING) ** 2) / 0.18) + 0.05
    return rng.poisson(rates).astype(np.float32), label


@pytest.fixture(scope="module")
def model():
    X, label = simulate(1, 5000)
    sizes = {"architecture": "offset1-model", "num_hidden_units": 16, "output_dimension": 3}
    options = {**sizes, "num_steps": 200, "learning_rate": 3e-3, "batch_size": 256}
    return fit(KEY, X, samplers.TimeDelta(label, 1), **options).model


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    X, label = rng.normal(size=(400, 3)).astype(np.float32), slow(rng, 400, 2)
    return Model((Encoder.init(KEY, "offset5-model", 3, 4, 2),)), X, label


# Monte-Carlo error


def test_target_is_met_with_the_draws_of_as_many_batches(model):
    X, label = simulate(2, 1000)
    sampler = samplers.TimeDelta(label, 1)
    found = estimate_infonce(
        KEY, model, X, sampler, **SIZES, num_batches=20, target_stderr_bits=0.005
    )
    number = found.per_batch.size
    assert 20 < number < 1000
    assert found.bits_stderr <= 0.005
    whole = estimate_infonce(KEY, model, X, sampler, **SIZES, num_batches=number)
    np.testing.assert_array_equal(found.per_batch, whole.per_batch)
    np.testing.assert_array_equal(found.loss, whole.loss)
    fewer = estimate_infonce(KEY, model, X, sampler, **SIZES, num_batches=number // 2)
    assert fewer.bits_stderr > 0.005


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_target_that_is_met_at_once_or_never(model, chunk_size):
    X, label = simulate(2, 1000)
    sampler, options = samplers.TimeDelta(label, 1), {**SIZES, "chunk_size": chunk_size}
    at_once = estimate_infonce(
        KEY, model, X, sampler, **options, num_batches=10, target_stderr_bits=1.0
    )
    assert at_once.per_batch.size == 10
    with pytest.warns(UserWarning, match="max_batches=30 batches the standard error is"):
        never = estimate_infonce(
            KEY,
            model,
            X,
            sampler,
            **options,
            num_batches=10,
            target_stderr_bits=1e-300,
            max_batches=30,
        )
    assert never.per_batch.size == 30


def test_target_of_the_functions_with_the_signatures_of_cebra():
    demo = load_demo()
    estimate = goodness_of_fit_score(
        demo.checkpoint,
        demo.spikes,
        demo.position,
        num_batches=10,
        target_stderr_bits=0.003,
        return_estimate=True,
    )
    assert estimate.bits_stderr <= 0.003
    assert estimate.per_batch.size > 10


@pytest.mark.heavy
def test_monte_carlo_intervals_cover(model):
    """The 95 % interval of 2000 keys covers the long-run value in 93 to 97 %."""
    X, label = simulate(3, 1000)
    sampler, sizes = samplers.TimeDelta(label, 1), {"batch_size": 64, "num_batches": 100}
    long = estimate_infonce(KEY, model, X, sampler, batch_size=64, num_batches=200_000)
    keys = jax.random.split(jax.random.key(1), 2000)
    each = [estimate_infonce(key, model, X, sampler, **sizes) for key in keys]
    loss, stderr = (
        np.array([float(getattr(x, name)) for x in each]) for name in ("loss", "stderr")
    )
    covered = np.abs(loss - float(long.loss)) <= 1.96 * stderr
    assert 0.93 <= covered.mean() <= 0.97


# Another recording


@pytest.mark.heavy
def test_bootstrap_intervals_cover(model):
    """For 88 to 99 % of 200 recordings of 150 autocorrelation times they hold the truth."""
    steps = 150 * round((1 + PHI) / (1 - PHI))
    long, label = simulate(4, 10**6)
    sampler = samplers.TimeDelta(label, 1)
    truth = float(estimate_infonce(KEY, model, long, sampler, **SIZES, num_batches=4000).bits)
    covered, observed, stderr = [], [], []
    for seed in range(200):
        X, label = simulate(1000 + seed, steps)
        sampler = samplers.TimeDelta(label, 1)
        result = bootstrap_goodness_of_fit(
            jax.random.key(seed), model, X, sampler, **SIZES, num_resamples=100
        )
        low, high = result.interval()
        covered.append(low <= truth <= high)
        observed.append(result.observed)
        stderr.append(result.stderr)
    assert 0.88 <= np.mean(covered) <= 0.99
    # The standard error is the spread over recordings, known from 200 of them.
    np.testing.assert_allclose(np.mean(stderr), np.std(observed, ddof=1), rtol=3 / math.sqrt(400))


KINDS = {
    "time": lambda label: samplers.Time(len(label), 2),
    "time_delta": lambda label: samplers.TimeDelta(label, 2),
    "delta_normal": lambda label: samplers.DeltaNormal(label, 0.3),
    "discrete": lambda label: samplers.Discrete((label[:, 0] > 0).astype(int)),
    "uniform": lambda label: samplers.Discrete((label[:, 0] > 0).astype(int), "uniform"),
    "mixed": lambda label: samplers.Mixed((label[:, 0] > 0).astype(int), label, 2),
    "some": lambda label: samplers.TimeDelta(label, 2, steps=np.arange(50, 350)),
}


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:Resampled recordings differ no more")  # few batches, no fit
@pytest.mark.parametrize("kind", KINDS)
def test_bootstrap_of_every_sampler(small, kind):
    model, X, label = small
    sampler = KINDS[kind](label)
    options = {"batch_size": 16, "num_batches": 4, "num_resamples": 10, "block_length": 30}
    result = bootstrap_goodness_of_fit(KEY, model, X, sampler, **options)
    assert result.samples.shape == (10,)
    assert np.isfinite(result.samples).all()
    again = bootstrap_goodness_of_fit(KEY, model, X, sampler, **options)
    np.testing.assert_array_equal(result.samples, again.samples)
    exact = estimate_infonce(KEY, model, X, sampler, batch_size=16, num_batches=500)
    spread = 4 * math.hypot(float(exact.bits_stderr), math.sqrt(result.noise / 20))
    assert abs(float(result.observed) - float(exact.bits)) < spread


@pytest.mark.filterwarnings("ignore:Resampled recordings differ no more")
def test_bootstrap_over_a_mesh(small):
    model, X, label = small
    options = {"batch_size": 16, "num_batches": 4, "num_resamples": 5, "block_length": 30}
    sampler = samplers.TimeDelta(label, 2)
    expected = bootstrap_goodness_of_fit(KEY, model, X, sampler, **options)
    mesh = jax.make_mesh((8,), ("devices",))
    found = bootstrap_goodness_of_fit(KEY, model, X, sampler, **options, mesh=mesh)
    np.testing.assert_allclose(found.samples, expected.samples, atol=1e-6)


def test_resampled_places_are_blocks_all_equally_often():
    places = resampled_places(KEY, 40, 7, 3000)
    assert places.shape == (3000, 40)
    steps = np.diff(places, axis=1) % 40
    assert (np.delete(steps, np.arange(6, 39, 7), axis=1) == 1).all()
    counts = np.bincount(places.ravel(), minlength=40)
    # A block is drawn at once, so that the count of a step is 5.7 draws of 1 in 40 for a resample.
    assert np.abs(counts - 3000).max() < 5 * math.sqrt(3000)


def test_no_more_spread_than_noise_is_said(small):
    model, X, label = small
    sampler = samplers.TimeDelta(label, 2)
    options = {"batch_size": 2, "num_batches": 2, "num_resamples": 2, "block_length": 1}
    keys = jax.random.split(KEY, 20)
    with pytest.warns(UserWarning, match="the standard error comes out as 0"):
        results = [bootstrap_goodness_of_fit(k, model, X, sampler, **options) for k in keys]
    assert min(result.stderr for result in results) == 0


def test_intervals():
    samples = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    result = Bootstrap(np.float64(2.0), samples, 1)
    assert result.bias == pytest.approx(1.2)
    low, high = result.interval(0.5, "basic")
    assert (low, high) == pytest.approx((4 - 3, 4 - 1))  # quantiles 1 and 3, reflected
    assert result.interval(0.5, "percentile") == pytest.approx((1, 3))
    low, high = result.interval()
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(1.959964 * samples.std(ddof=1))
    quiet = Bootstrap(np.float64(2.0), samples, 1, noise=1e9)
    assert quiet.stderr == 0
    assert quiet.interval(0.5) == pytest.approx((2.0, 2.0))
    assert quiet.interval(0.5, "basic") == pytest.approx((0.8, 0.8))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8, 0.95])
def test_block_length_of_an_autoregressive_series(phi):
    """On average over seeds within four standard errors of what the theory says."""
    number = 20_000
    # With R(k) = φ^|k|: G = 2φ/(1-φ)², g(0) = (1+φ)/(1-φ), and b = (3/2 G²/g² n)^(1/3).
    expected = (1.5 * (2 * phi / (1 - phi) ** 2) ** 2 / ((1 + phi) / (1 - phi)) ** 2 * number) ** (
        1 / 3
    )
    found = [
        optimal_block_length(slow(np.random.default_rng(seed), number, 1, phi=phi))
        for seed in range(30)
    ]
    if phi == 0:  # where the estimate can only be too long
        assert np.median(found) <= 3
    else:
        stderr = np.std(found, ddof=1) / math.sqrt(30)
        assert abs(np.mean(found) - 0.5 - expected) < 4 * stderr + 0.03 * expected


def test_block_length_is_that_of_the_slowest():
    rng = np.random.default_rng(0)
    fast, slower = slow(rng, 3000, 1, phi=0.3), slow(rng, 3000, 1, phi=0.9)
    rounded = np.full_like(fast, 0.1).astype(np.float64)  # whose mean is not 0.1
    assert optimal_block_length(np.concatenate([fast, rounded], axis=1)) == optimal_block_length(
        fast
    )
    together = optimal_block_length(np.concatenate([fast, slower, np.ones_like(fast)], axis=1))
    assert together == optimal_block_length(slower) > optimal_block_length(fast)


# Consistency


def test_bootstrap_of_consistency_between_runs():
    """Against the spread over recordings, of which the theory of R² is known."""
    rng = np.random.default_rng(0)

    def runs():
        first = rng.normal(size=(400, 1))
        return [first, first + rng.normal(size=(400, 1))]

    scores = [consistency_score(runs(), "runs").scores for _ in range(300)]
    results = [bootstrap_consistency(KEY, runs(), "runs", block_length=1) for _ in range(20)]
    found = np.mean([result.stderr for result in results], axis=0)
    expected = np.std(scores, axis=0, ddof=1)
    np.testing.assert_allclose(found, expected, rtol=5 / math.sqrt(2 * 300))
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_consistency(KEY, runs(), "runs", num_resamples=1)


@pytest.mark.heavy
@pytest.mark.parametrize("discrete", [False, True])
def test_bootstrap_of_consistency_between_datasets(discrete):
    rng = np.random.default_rng(0)
    places = [np.sort(rng.uniform(size=n)) for n in (900, 700, 800)]
    embeddings = [
        np.stack([np.cos(3 * y), np.sin(3 * y)], 1) + rng.normal(0, 0.2, (len(y), 2))
        for y in places
    ]
    labels = [np.floor(12 * y).astype(int) for y in places] if discrete else places
    arguments = "datasets", labels, ["a", "b", "a"], 15
    result = bootstrap_consistency(KEY, embeddings, *arguments, num_resamples=30, block_length=5)
    expected = consistency_score(embeddings, *arguments)
    np.testing.assert_array_equal(result.observed, expected.scores)
    assert result.samples.shape == (30, 2)
    assert (result.stderr > 0).all()
    assert (np.abs(result.samples - expected.scores) < 0.3).all()
    mesh = jax.make_mesh((8,), ("devices",))
    options = {"num_resamples": 30, "block_length": 5, "mesh": mesh}
    spread = bootstrap_consistency(KEY, embeddings, *arguments, **options)
    np.testing.assert_allclose(spread.samples, result.samples, atol=1e-9)


@pytest.mark.heavy
@pytest.mark.parametrize("missing", [False, True])
def test_embeddings_of_one_dataset_are_resampled_together(missing):
    """A run that is there twice adds nothing, also if one lacks a row."""
    rng = np.random.default_rng(0)
    places = [np.sort(rng.uniform(size=n)) for n in (900, 700)]
    first, second = (np.stack([np.cos(3 * y), np.sin(3 * y)], 1) for y in places)
    first, second = (x + rng.normal(0, 0.2, x.shape) for x in (first, second))
    options = {"num_discretization_bins": 15, "num_resamples": 20, "block_length": 5}
    lacking = first.copy()
    lacking[5] = np.nan if missing else first[5]
    once = bootstrap_consistency(KEY, [lacking, second], "datasets", places, **options)
    twice = bootstrap_consistency(
        KEY, [lacking, first, second], "datasets", [places[0], *places], ["a", "a", "b"], **options
    )
    np.testing.assert_allclose(twice.samples, once.samples, atol=1e-9)


def test_resampled_recordings_that_lack_a_label():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(2, 40, 2)), [np.arange(40) // 2, np.arange(40) // 2]
    with pytest.raises(ValueError, match="of 30 resampled recordings a label or bin has no"):
        bootstrap_consistency(KEY, embeddings, "datasets", labels, num_resamples=30, block_length=4)


# Comparison


@pytest.mark.heavy
def test_common_draws_need_fewer_than_half_of_the_batches(model):
    """0.02 bits between two models, so many standard errors away from 0."""
    X, label = simulate(5, 3000)
    rng = np.random.default_rng(0)
    params = model.encoders[0].params
    noisy = {name: x + 0.09 * x.std() * rng.normal(size=x.shape) for name, x in params.items()}
    noisy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), noisy)
    other = Model((type(model.encoders[0])(**{**vars(model.encoders[0]), "params": noisy}),))
    sampler = samplers.TimeDelta(label, 1)
    result = compare_goodness_of_fit(KEY, model, other, X, sampler, **SIZES, num_batches=400)
    assert 0.01 < abs(result.difference) < 0.04
    # The number of batches that a standard error takes grows with its square.
    assert result.stderr**2 <= 0.5 * result.independent_stderr**2
    alone = [
        estimate_infonce(KEY, x, X, sampler, **SIZES, num_batches=400).bits for x in (model, other)
    ]
    assert result.difference == pytest.approx(float(alone[0] - alone[1]), abs=1e-5)


def test_comparison_of_two_samplers(small):
    model, X, label = small
    pair = samplers.TimeDelta(label, 1), samplers.TimeDelta(label, 8)
    result = compare_goodness_of_fit(KEY, model, model, X, pair, batch_size=16, num_batches=50)
    assert 0 < result.stderr < result.independent_stderr
    same = compare_goodness_of_fit(KEY, model, model, X, pair[0], batch_size=16, num_batches=5)
    assert (same.difference, same.stderr) == (0, 0)


# Held-out rows


@pytest.mark.parametrize("gap", [0, 7])
def test_split_keeps_its_distance(gap):
    train, test = time_split(103, gap=gap, test_size=0.3)
    every = np.arange(103)
    assert every[test][0] - every[train][-1] == gap + 1
    assert every[train][0] == 0
    assert every[test][-1] == 102
    assert len(every[test]) == 31


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_folds_score_every_row_once_and_keep_their_distance(num_folds):
    folds, every = time_folds(103, num_folds, gap=4), np.arange(103)
    np.testing.assert_array_equal(np.concatenate([every[test] for _, test in folds]), every)
    for train, test in folds:
        away = np.abs(train[:, None] - every[test]).min(1)
        np.testing.assert_array_equal(
            train, np.setdiff1d(every, every[max(0, test.start - 4) : test.stop + 4])
        )
        assert away.min() == 5


def test_gap_is_receptive_field_plus_time_offset(small):
    model, _, label = small
    hard = samplers.TimeDelta(label, 8)
    for sampler in (hard, samplers.Soft(hard, 1.0), samplers.Hybrid(hard, 8), samplers.Time(99, 8)):
        assert required_gap(model, sampler) == 5 + 8
    assert required_gap(model, samplers.DeltaNormal(label, 1.0)) == 5
    assert required_gap(model, samplers.Hybrid(samplers.DeltaNormal(label, 1.0), 8)) == 5 + 8
    assert required_gap(model, samplers.FullBatch(samplers.Time(99, 7), 99, (0, 1))) == 5 + 7


def test_folds_are_fitted_and_scored_by_the_steps_of_a_sampler(small):
    _, X, label = small
    (train, test), *_ = time_folds(400, 4, gap=10)
    sampler = samplers.TimeDelta(label, 3, steps=train)
    options = {"num_steps": 2, "batch_size": 16, "output_dimension": 2}
    fitted = fit(KEY, X, sampler, architecture="offset5-model", **options)
    scored = samplers.TimeDelta(label, 3, steps=np.arange(400)[test])
    assert np.isfinite(estimate_infonce(KEY, fitted, X, scored, batch_size=16, num_batches=3).loss)


RESULT = Bootstrap(np.zeros(()), np.arange(3.0), 1)
BAD = {
    "one batch": (lambda s: boot(s, num_batches=1), ValueError, "num_batches has to be at least 2"),
    "one sample": (lambda s: boot(s, num_resamples=1), ValueError, "num_resamples has to be at"),
    "blocks": (lambda s: boot(s, block_length=201), ValueError, "two blocks at least.*400 steps"),
    "no block": (
        lambda s: boot(s, block_length=0),
        ValueError,
        "block_length has to be at least 1",
    ),
    "soft": (
        lambda s: boot(s, sampler=samplers.Soft(samplers.TimeDelta(s[2]), 1.0)),
        TypeError,
        "Time, TimeDelta, DeltaNormal, Discrete and Mixed, got Soft",
    ),
    "level": (
        lambda s: Bootstrap(np.zeros(()), np.arange(3.0), 1).interval(1.0),
        ValueError,
        "level",
    ),
    "kind": (
        lambda s: RESULT.interval(kind="bca"),
        ValueError,
        "'basic', 'percentile' or 'standard', got 'bca'",
    ),
    "constant": (lambda s: optimal_block_length(np.ones(50)), ValueError, "never changes"),
    "short": (lambda s: optimal_block_length(np.arange(5.0)), ValueError, "at least 10 steps"),
    "nan": (lambda s: optimal_block_length(np.full(50, np.nan)), ValueError, "NaN"),
    "target": (
        lambda s: scored(s, target_stderr_bits=0.0),
        ValueError,
        "has to be a number above 0",
    ),
    "target nan": (lambda s: scored(s, target_stderr_bits=np.nan), ValueError, "number above 0"),
    "target start": (
        lambda s: scored(s, num_batches=1, target_stderr_bits=0.1),
        ValueError,
        "from 2 to max_batches",
    ),
    "target most": (
        lambda s: scored(s, num_batches=9, target_stderr_bits=0.1, max_batches=5),
        ValueError,
        "max_batches=5 batches to start with, got num_batches=9",
    ),
    "target traced": (
        lambda s: jax.grad(lambda X: scored((s[0], X, s[2]), target_stderr_bits=0.1).loss)(s[1]),
        ValueError,
        "leave it out under jit, grad and vmap",
    ),
    "compare": (
        lambda s: compare_goodness_of_fit(
            KEY, s[0], s[0], s[1], samplers.Time(400), batch_size=4, num_batches=1
        ),
        ValueError,
        "num_batches has to be at least 2",
    ),
    "three": (
        lambda s: compare_goodness_of_fit(
            KEY, s[0], s[0], s[1], (samplers.Time(400),) * 3, batch_size=4
        ),
        ValueError,
        "one sampler or two, got 3",
    ),
    "compare target": (
        lambda s: compare_goodness_of_fit(
            KEY, s[0], s[0], s[1], samplers.Time(400), batch_size=4, target_stderr_bits=0.1
        ),
        ValueError,
        "not for a target",
    ),
    "split": (lambda s: time_split(20, gap=15), ValueError, "20 steps are too short to be split"),
    "share": (lambda s: time_split(20, gap=1, test_size=1.0), ValueError, "test_size"),
    "folds": (lambda s: time_folds(20, 2, gap=10), ValueError, "too short for 2 folds"),
    "one fold": (lambda s: time_folds(20, 1, gap=0), ValueError, "num_folds has to be at least 2"),
    "many folds": (lambda s: time_folds(3, 5, gap=0), ValueError, "too short for 5 folds"),
}


def boot(small, **options):
    model, X, label = small
    sampler = options.pop("sampler", samplers.TimeDelta(label, 2))
    return bootstrap_goodness_of_fit(KEY, model, X, sampler, **{"batch_size": 8, **options})


def scored(small, **options):
    model, X, label = small
    options = {"batch_size": 8, "num_batches": 3, **options}
    return estimate_infonce(KEY, model, X, samplers.TimeDelta(label, 2), **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(small, name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make(small)
