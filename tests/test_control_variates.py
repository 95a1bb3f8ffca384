"""Control variates: the same expectation, less variance, honest errors, for every sampler."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from cebra_jax_metrics import (
    Encoder,
    Model,
    draw,
    estimate_infonce,
    goodness_of_fit_score,
    infonce_loss,
    samplers,
)
from cebra_jax_metrics.control_variates import Compared, Marks, known, reduced
from cebra_jax_metrics.demo import load_demo
from cebra_jax_metrics.infonce import SIMILARITIES, InfoNCE
from cebra_jax_metrics.model import Criterion

KEY = jax.random.key(0)
STEPS = 300
RNG = np.random.default_rng(0)
LABELS = RNG.normal(size=(STEPS, 2)).cumsum(0).astype(np.float32) / 5
NEURONS = 6
X = np.tanh(LABELS @ RNG.normal(size=(2, NEURONS))) + RNG.normal(size=(STEPS, NEURONS)) / 3
X = X.astype(np.float32)
GROUPS = RNG.integers(0, 4, STEPS) ** 2 // 3
SOME = np.sort(RNG.integers(0, STEPS - 5, 200))
TIME_DELTA = samplers.TimeDelta(LABELS, 3)
SAMPLERS = {
    "time": samplers.Time(STEPS, 4),
    "time, some steps": samplers.Time(STEPS, 4, steps=SOME),
    "time_delta": TIME_DELTA,
    "time_delta, some steps": samplers.TimeDelta(LABELS, 3, steps=SOME),
    "delta_normal": samplers.DeltaNormal(LABELS, 0.3),
    "discrete": samplers.Discrete(GROUPS),
    "discrete, uniform": samplers.Discrete(GROUPS, "uniform"),
    "discrete, some steps": samplers.Discrete(GROUPS, "uniform", steps=SOME),
    "mixed": samplers.Mixed(GROUPS, LABELS, 3),
    "hybrid": samplers.Hybrid(TIME_DELTA, 4),
    "soft": samplers.Soft(TIME_DELTA, 0.1),
    "full": samplers.FullBatch(TIME_DELTA, STEPS, (0, 1)),
    "multisession": samplers.Multisession([LABELS, LABELS[:200]], 3),
    "discrete_multisession": samplers.DiscreteMultisession([GROUPS, GROUPS[:200]]),
}
EXACT = ("time", "time, some steps", "discrete", "discrete, uniform", "discrete, some steps")


def make_model(similarity="cosine", temperature=1.0, sessions=1, width=8):
    """Embeddings that are spread out: wide weights."""
    encoders = tuple(
        Encoder.init(jax.random.fold_in(KEY, i), "offset1-model", NEURONS, 16, width)
        for i in range(sessions)
    )
    encoders = jax.tree.map(lambda w: 3 * w, encoders)
    return Model(encoders, Criterion(similarity, temperature))


def problem(name, **options):
    sampler = SAMPLERS[name]
    if "multisession" in name:
        return make_model(**options, sessions=2), [X, X[:200]], sampler
    return make_model(**options), X, sampler


def embedded(model):
    return np.asarray(model.encoders[0].encode(jnp.asarray(X), pad=True), np.float64)


@pytest.mark.heavy
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_same_mean_as_many_plain_batches(name, similarity, temperature):
    call = (*problem(name, similarity=similarity, temperature=temperature),)
    sizes = {"batch_size": None if name == "full" else 32}
    is_slow = name in ("soft", "full")
    plain = estimate_infonce(KEY, *call, **sizes, num_batches=2000 if is_slow else 20_000)
    # The first has all pairs of steps, the second some only.
    for number in (200, 40):
        found = estimate_infonce(
            jax.random.key(1), *call, **sizes, num_batches=number, method="control_variates"
        )
        error = np.hypot(plain.stderr, found.stderr)
        assert abs(found.loss - plain.loss) < 4 * error + 1e-6 * abs(plain.loss)
        assert abs(found.loss - found.align - found.uniform) < 1e-5 * abs(plain.loss)
        assert found.per_batch.shape == (number,)
        for part in found.parts:
            error = np.hypot(plain.parts[part].stderr, found.parts[part].stderr)
            assert abs(found.parts[part].loss - plain.parts[part].loss) < 4 * error + 1e-5


@pytest.mark.parametrize(("name", "least"), [("time", 20), ("discrete", 20), ("time_delta", 5)])
def test_variance_at_equal_batches(name, least):
    model, x, sampler = problem(name)
    found = estimate_infonce(
        KEY, model, x, sampler, batch_size=512, num_batches=400, method="control_variates"
    )
    plain = estimate_infonce(KEY, model, x, sampler, batch_size=512, num_batches=400)
    assert (plain.stderr / found.stderr) ** 2 > least
    # Of as many draws of their own, so that the two need not agree exactly.
    assert 0.7 < found.gain / (plain.stderr / found.stderr) ** 2 < 1.4


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["time", "time_delta", "mixed"])
def test_interval_covers(name):
    """95 % intervals of 2000 keys: within 3 standard errors of a share, which is 1.5 %."""
    model, x, sampler = problem(name)
    sizes = {"batch_size": 16, "num_batches": 100, "method": "control_variates"}
    found = [
        estimate_infonce(jax.random.key(seed), model, x, sampler, **sizes) for seed in range(2000)
    ]
    loss, stderr = (np.array([getattr(e, n) for e in found], float) for n in ("loss", "stderr"))
    assert np.median([e.gain for e in found]) > 3
    assert 0.93 < np.mean(np.abs(loss - loss.mean()) < 1.96 * stderr) < 0.97
    assert np.mean(stderr**2) == pytest.approx(loss.var(), rel=0.2)


def simulated(number, controls_explain, more_pairs):
    """Parts of batches, of which a share of the uniform part is explained."""
    shape, rng = (3000, number), np.random.default_rng(number)
    controls, align = rng.normal(size=(*shape, 2)), rng.normal(size=shape)
    noise = np.sqrt(1 - controls_explain) * rng.normal(size=shape)
    uniform = np.sqrt(controls_explain) * controls[..., 0] + noise
    better = rng.normal(size=shape) * more_pairs**-0.5 if more_pairs else align
    ones = np.ones(shape)
    compared = Compared(better, 0.1 * rng.normal(size=shape), ones, 0 * ones, uniform, controls)
    plain = InfoNCE(align + uniform, align, uniform)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (plain, compared))


@pytest.mark.parametrize("number", [5, 16, 24, 100])
@pytest.mark.parametrize(("explained", "more_pairs"), [(0, 0), (0.3, 0), (0, 0.8), (0.99, 8)])
def test_never_worse_than_plain(number, explained, more_pairs):
    """Where it is of no use, the fit does not pass for one: at most 5 % more variance."""
    plain, compared = simulated(number, explained, more_pairs)
    found = np.asarray(jax.vmap(reduced)(plain, compared).loss)
    before, after = np.asarray(plain.loss).mean(1), found.mean(1)
    # The two are paired: the standard error of their ratio is that of the difference of squares.
    error = np.std(after**2 - 1.05 * before**2) / len(after) ** 0.5
    assert np.mean(after**2 - 1.05 * before**2) < 3 * error
    assert abs(after.mean()) < 4 * after.std() / len(after) ** 0.5
    if number < 16:
        np.testing.assert_array_equal(found, plain.loss)
    elif explained > 0.9:
        assert after.var() < before.var() / 5


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", ["time", "time_delta"])
def test_never_worse_where_sums_are_ruled_by_few(name, similarity, temperature):
    model, x, sampler = problem(name, similarity=similarity, temperature=temperature, width=3)
    call, sizes = (model, x, sampler), {"batch_size": 8, "num_batches": 300}
    ratios = []
    for seed in range(12):
        key = jax.random.key(seed)
        plain = estimate_infonce(key, *call, **sizes)
        found = estimate_infonce(key, *call, **sizes, method="control_variates")
        ratios.append((found.stderr / plain.stderr) ** 2)
    assert np.mean(ratios) - 2 * np.std(ratios) / len(ratios) ** 0.5 < 1.05


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "full"])
def test_probabilities_are_those_of_the_draws(name):
    sampler = SAMPLERS[name]
    lengths = (STEPS, 200) if "multisession" in name else (STEPS,)
    batch = draw(KEY, sampler, 1000, 100)
    for session, (length, weights) in enumerate(
        zip(lengths, sampler.probabilities(*lengths), strict=True)
    ):
        assert np.sum(weights) == pytest.approx(1, abs=1e-5)
        for drawn in (batch.reference, batch.negative):
            drawn = np.asarray(drawn)[:, session] if len(lengths) > 1 else np.asarray(drawn)
            expected = drawn.size * np.asarray(weights, float)
            counts = np.bincount(drawn.ravel(), minlength=length)
            assert not counts[expected == 0].any()
            chi = np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])
            freedom = np.sum(expected > 0) - 1
            assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
        padded = sampler.padded().probabilities(*(1024 for _ in lengths))[session]
        np.testing.assert_allclose(padded[:length], weights, rtol=1e-6)
        assert not padded[length:].any()


@pytest.mark.parametrize("name", EXACT)
def test_mean_positive_is_that_of_the_draws(name):
    sampler, values = SAMPLERS[name], RNG.normal(size=(STEPS, 1)).astype(np.float32)
    expected = np.asarray(sampler.mean_positive(jnp.asarray(values)))[:, 0]
    batch = draw(KEY, sampler, 1000, 200)
    reference, found = np.ravel(batch.reference), values[np.ravel(batch.positive), 0]
    counts = np.maximum(np.bincount(reference, minlength=STEPS), 1)
    mean = np.bincount(reference, found, STEPS) / counts
    left_over = (mean - expected)[np.unique(reference)] * np.sqrt(counts[np.unique(reference)])
    assert np.abs(left_over).max() < 5 * values.std()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("most_pairs", [10**7, 20_000])
def test_what_is_known_against_double_loops(similarity, most_pairs):
    model = make_model(similarity, 0.3)
    rows, p = embedded(model), np.linspace(0, 1, STEPS) ** 2
    p /= p.sum()
    marks = Marks.of(p, p, most_pairs)
    assert (marks.some is None) == (most_pairs == 10**7)
    rows32, p32 = jnp.asarray(rows, jnp.float32), jnp.asarray(p, jnp.float32)
    found = known(similarity, jnp.float32(0.3), (rows32, p32), (rows32, p32), marks)
    pairs = np.asarray(SIMILARITIES[similarity](rows, rows, rows)[1], float) / 0.3
    drawn = np.flatnonzero(p)
    if marks.some is None:
        level = logsumexp(pairs, b=p, axis=1)
        assert found.influence is None
    else:
        steps = marks.some[1]
        shares = p[steps] / p[steps].sum()
        level = logsumexp(pairs[:, steps], b=shares, axis=1)
        influence = np.sum(np.exp(pairs[:, steps] - level[steps]) * shares, axis=1)
        np.testing.assert_allclose(found.influence.values[drawn], influence[drawn], rtol=2e-4)
        assert found.influence.mean == pytest.approx(np.sum(p * influence), rel=1e-4)
    np.testing.assert_allclose(found.level.values[drawn], level[drawn], atol=2e-4)
    assert found.level.mean == pytest.approx(np.sum(p * level), abs=1e-4)
    near = [np.mean(pairs[t, max(t - 10, 0) : t + 11]) for t in range(STEPS)]
    np.testing.assert_allclose(-found.align.values, near, rtol=1e-3, atol=1e-3)
    assert not found.is_exact


def test_align_is_exact_where_the_sampler_says_what_to_expect():
    model = make_model("euclidean", 0.3)
    rows = embedded(model)
    p = np.asarray(SAMPLERS["discrete, uniform"].probabilities(STEPS)[0], float)
    expected = sum(
        p[t] * np.mean(np.sum((rows[t] - rows[GROUPS[t] == GROUPS]) ** 2, axis=1)) / 0.3
        for t in range(STEPS)
    )
    sampler, sizes = SAMPLERS["discrete, uniform"], {"batch_size": 32, "num_batches": 40}
    found = estimate_infonce(KEY, model, X, sampler, **sizes, method="control_variates")
    assert found.align == pytest.approx(expected, rel=1e-4)


def test_gradient_has_the_same_expectation_and_less_noise():
    sizes = {"batch_size": 32, "num_batches": 40}

    def slopes(method):
        def loss(x, key):
            call = make_model(), x, SAMPLERS["time"]
            return estimate_infonce(key, *call, **sizes, method=method).loss

        gradient = jax.jit(jax.grad(loss))
        found = [gradient(jnp.asarray(X), jax.random.key(seed)) for seed in range(40)]
        return np.array(found, float)

    plain, found = slopes("plain"), slopes("control_variates")
    error = np.sqrt((plain.var(0) + found.var(0)) / 40)
    assert np.abs(found.mean(0) - plain.mean(0)).max() < 5 * error.max()
    assert found.var(0).mean() < plain.var(0).mean() / 3


def test_under_jit_and_vmap_and_in_chunks_and_on_a_mesh():
    sampler, sizes = SAMPLERS["mixed"], {"batch_size": 32, "num_batches": 40}
    score = partial(estimate_infonce, **sizes, method="control_variates")
    model = make_model()
    expected = score(KEY, model, X, sampler)
    assert expected.gain > 3
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), model, make_model())
    mesh = jax.make_mesh((8,), ("devices",))
    others = {
        "jit": jax.jit(lambda m, x: score(KEY, m, x, sampler))(model, jnp.asarray(X)),
        "chunks": score(KEY, model, X, sampler, chunk_size=7),
        "mesh": score(KEY, model, X, sampler, mesh=mesh),
        "vmap": jax.tree.map(
            lambda x: x[0], jax.vmap(lambda m: score(KEY, m, X, sampler))(stacked)
        ),
    }
    for found in others.values():
        for field in ("loss", "align", "uniform", "per_batch"):
            value = getattr(expected, field)
            np.testing.assert_allclose(getattr(found, field), value, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(found.stderr, expected.stderr, rtol=0.01)


def test_lengths_share_compilations(monkeypatch):
    from cebra_jax_metrics import estimation, evaluation

    patched = []
    for module, name, statics in (
        (estimation, "controlled_losses", ("batch_size",)),
        (evaluation, "_known", ("mesh", "axis_name")),
        (evaluation, "_probabilities", ("sizes",)),
    ):
        function = chex.assert_max_traces(getattr(module, name).__wrapped__, n=1)
        patched.append(jax.jit(function, static_argnames=statics))
        monkeypatch.setattr(module, name, patched[-1])
    for seed, length in enumerate((STEPS, 200, 120)):
        sampler = samplers.TimeDelta(LABELS[:length], 3)
        estimate_infonce(
            jax.random.key(seed),
            make_model(),
            X[:length],
            sampler,
            batch_size=64,
            num_batches=300,
            method="control_variates",
        )
    assert all(function._cache_size() for function in patched)  # each was called


def test_target_takes_fewer_batches():
    model, x, sampler = problem("time")
    options = {"batch_size": 128, "num_batches": 20, "target_stderr_bits": 0.002}
    plain = estimate_infonce(KEY, model, x, sampler, **options)
    found = estimate_infonce(KEY, model, x, sampler, **options, method="control_variates")
    assert found.bits_stderr <= 0.002
    assert len(found.per_batch) < len(plain.per_batch) / 5
    assert abs(found.bits - plain.bits) < 4 * np.hypot(found.bits_stderr, plain.bits_stderr)


def test_functions_with_the_signatures_of_cebra():
    demo = load_demo()
    call = demo.checkpoint, demo.spikes, demo.position
    options = {"num_batches": 40, "return_estimate": True}
    plain = goodness_of_fit_score(*call, **options)
    np.testing.assert_array_equal(
        plain.per_batch, goodness_of_fit_score(*call, **options, method="plain").per_batch
    )
    assert plain.gain == 1
    found = goodness_of_fit_score(*call, **options, method="control_variates")
    assert found.gain > 3
    assert found.stderr < plain.stderr / 2
    loss = infonce_loss(*call, num_batches=40, method="control_variates")
    assert loss == pytest.approx(float(found.loss))


def test_plain_has_no_gain_and_full_batches_are_left_alone():
    model, x, sampler = problem("full")
    plain = estimate_infonce(KEY, model, x, sampler, num_batches=20)
    found = estimate_infonce(KEY, model, x, sampler, num_batches=20, method="control_variates")
    np.testing.assert_array_equal(plain.per_batch, found.per_batch)
    assert plain.gain == found.gain == 1
    one = estimate_infonce(KEY, *problem("time"), batch_size=8, num_batches=1)
    assert one.gain == 1


def test_unknown_method():
    with pytest.raises(
        ValueError, match=r"method has to be one of \('plain', 'control_variates'\)"
    ):
        estimate_infonce(KEY, *problem("time"), batch_size=8, method="antithetic")
