"""Tests of a goodness of fit against chance: their levels, their power, and what they shift."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.stats import binom

from cebra_jax_metrics import (
    Encoder,
    Model,
    draw,
    embed,
    evaluate,
    fit,
    goodness_of_fit,
    goodness_of_fit_test,
    infonce,
    samplers,
)
from cebra_jax_metrics.demo import load_demo

from .test_uncertainty import slow

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
STEPS = 300
X = RNG.normal(size=(STEPS, 3)).astype(np.float32)
LABELS = slow(RNG, STEPS, 2)
KINDS = (LABELS[:, 0] > 0.3).astype(int)
MODEL = Model((Encoder.init(KEY, "offset5-model", 3, 4, 2),))
SAMPLERS = {
    "time_delta": samplers.TimeDelta(LABELS, 2),
    "delta_normal": samplers.DeltaNormal(LABELS, 0.3),
    "discrete": samplers.Discrete(KINDS),
    "uniform": samplers.Discrete(KINDS, "uniform"),
    "mixed": samplers.Mixed(KINDS, LABELS, 2),
}
SIZES = {"batch_size": 16, "num_batches": 10}
TRAINING = {"num_steps": 5, "learning_rate": 1e-2}


@pytest.mark.parametrize("held_out", [slice(None), slice(100, 300)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_shifts_are_those_of_labels_against_the_recording(name, held_out):
    """The embedding of a time step is that of the label so many steps before, within the rows."""
    test = goodness_of_fit_test(
        KEY, MODEL, X, SAMPLERS[name], **SIZES, held_out=held_out, num_samples=12
    )
    rows = np.arange(STEPS)[held_out]
    batch = samplers_batch(name, rows)
    places = [np.searchsorted(rows, np.asarray(x)) for x in batch]
    z = embed_windows()

    each = jax.jit(jax.vmap(infonce))
    is_uniform = name in ("time_delta", "delta_normal", "discrete")

    def bits(shift):
        shifted, still = (
            each(*(z[rows[(place + s) % len(rows)]] for place in places)) for s in (shift, 0)
        )
        uniform = (still if is_uniform else shifted).uniform.mean()
        return float(goodness_of_fit(shifted.align.mean() + uniform, 16))

    assert len(np.unique(test.shifts)) == 12
    gap = 5 + (2 if name in ("time_delta", "mixed") else 0)
    assert test.shifts.min() >= gap
    assert test.shifts.max() <= len(rows) - gap
    np.testing.assert_allclose(test.observed, bits(0), atol=1e-5)
    np.testing.assert_allclose(test.null, [bits(s) for s in test.shifts], atol=1e-5)
    exceed = np.sum(test.null >= test.observed)
    assert test.p_value == pytest.approx((1 + exceed) / 13)
    assert test.effect == pytest.approx(test.observed - test.null.mean())
    assert test.method == "shift"


def samplers_batch(name, rows):
    """The draws that the test makes."""
    sampler = replace(SAMPLERS[name], steps=rows.astype(np.int32), length=None)
    return draw(jax.random.fold_in(KEY, 1), sampler, 16, 10)


def embed_windows():
    """Embeddings by time step, of the first or last whole window near the edges."""
    whole = np.asarray(embed(MODEL, X, pad=False))
    return whole[np.clip(np.arange(STEPS) - 2, 0, len(whole) - 1)]


def test_the_shifted_are_one_call_of_evaluate():
    """The observed score is that of the batches as they are."""
    test = goodness_of_fit_test(
        KEY, MODEL, X, SAMPLERS["mixed"], **SIZES, held_out=slice(None), num_samples=2
    )
    loss = evaluate(MODEL, X, samplers_batch("mixed", np.arange(STEPS))).loss.mean()
    assert test.observed == pytest.approx(float(goodness_of_fit(loss, 16)), abs=1e-5)


def test_it_says_so_when_it_cannot_know_which_rows_were_fitted():
    options = {**SIZES, "num_samples": 3}
    with pytest.warns(UserWarning, match="Which rows the encoder was fitted to is not known"):
        unknown = goodness_of_fit_test(KEY, MODEL, X, SAMPLERS["mixed"], **options)
    told = goodness_of_fit_test(KEY, MODEL, X, SAMPLERS["mixed"], **options, held_out=slice(None))
    np.testing.assert_array_equal(unknown.null, told.null)


def test_fewer_shifts_than_asked_for_are_all_taken():
    test = goodness_of_fit_test(
        KEY, MODEL, X, SAMPLERS["discrete"], **SIZES, held_out=slice(0, 40), num_samples=100
    )
    np.testing.assert_array_equal(np.sort(test.shifts), np.arange(5, 36))


@pytest.mark.parametrize("method", ["shift", "refit"])
def test_over_a_mesh(method):
    mesh = jax.make_mesh((8,), ("devices",))
    options = {**SIZES, "num_samples": 4, "method": method}
    options |= {"fit_options": TRAINING} if method == "refit" else {"held_out": slice(None)}
    expected = goodness_of_fit_test(KEY, MODEL, X, SAMPLERS["mixed"], **options)
    found = goodness_of_fit_test(KEY, MODEL, X, SAMPLERS["mixed"], **options, mesh=mesh)
    np.testing.assert_allclose(found.null, expected.null, atol=1e-5)
    assert found.p_value == expected.p_value


@pytest.mark.parametrize("surrogate", ["shift", "blocks"])
def test_refitted_models_are_those_of_fit(surrogate):
    """With labels as they are and, of the shifted ones, with the last: trained and scored alone."""
    sampler, options = SAMPLERS["time_delta"], {**SIZES, "num_samples": 3, "surrogate": surrogate}
    options |= {"block_length": 40} if surrogate == "blocks" else {}
    test = goodness_of_fit_test(
        KEY, MODEL, X, sampler, method="refit", fit_options=TRAINING, **options
    )
    assert test.null.shape == (3,)
    assert (test.shifts is None) == (surrogate == "blocks")

    def bits(labels):
        train = samplers.TimeDelta(labels, 2, steps=np.arange(225 - 7))
        held_out = samplers.TimeDelta(labels, 2, steps=np.arange(225, 300))
        sizes = {"architecture": "offset5-model", "num_hidden_units": 4, "output_dimension": 2}
        key = jax.random.fold_in(KEY, 1)
        model = fit(key, X, train, **sizes, **TRAINING, batch_size=16).model
        batch = draw(jax.random.fold_in(KEY, 2), held_out, 16, 10)
        return float(goodness_of_fit(evaluate(model, X, batch).loss.mean(), 16))

    assert test.observed == pytest.approx(bits(LABELS), abs=1e-4)
    if surrogate == "shift":
        shifted = np.roll(LABELS, test.shifts[-1], axis=0)
        assert test.null[-1] == pytest.approx(bits(shifted), abs=1e-4)


def test_held_out_rows_at_the_beginning():
    options = {**SIZES, "num_samples": 2, "method": "refit", "fit_options": TRAINING}
    test = goodness_of_fit_test(
        KEY, MODEL, X, SAMPLERS["time_delta"], **options, held_out=slice(0, 80)
    )
    assert np.isfinite(test.null).all()


def recordings(number, per_recording, steps, drives):
    """Neurons that follow a slow series; labels that are it, or have nothing to do with it."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        drive = slow(rng, steps, 2)
        rates = np.exp(0.7 * drive @ rng.normal(size=(2, 10)) - 0.5)
        unrelated = [slow(rng, steps, 1) for _ in range(per_recording)]
        labels = [drive[:, :1]] * per_recording if drives else unrelated
        yield rng.poisson(rates).astype(np.float32), labels


SMALL = {"architecture": "offset1-model", "num_hidden_units": 8, "output_dimension": 3}


@pytest.mark.heavy
def test_level_of_the_shift_test():
    """400 encoders trained on labels that have nothing to do with the recording."""
    p_values = []
    for number, (recording, labels) in enumerate(recordings(400, 1, 2000, drives=False)):
        train = [samplers.TimeDelta(y, 1, steps=np.arange(990)) for y in labels]
        keys = jax.random.split(jax.random.key(number), 1)
        options = {**SMALL, "batch_size": 64, "num_steps": 60, "learning_rate": 1e-2}
        stack = fit(keys, recording, train, **options).model
        for i, y in enumerate(labels):
            test = goodness_of_fit_test(
                keys[i],
                jax.tree.map(lambda x, i=i: x[i], stack),
                recording,
                samplers.TimeDelta(y, 1),
                held_out=slice(1000, None),
                batch_size=64,
                num_batches=30,
                num_samples=99,
            )
            p_values.append(test.p_value)
    low, high = binom.interval(0.99, 400, 0.05)
    assert low <= np.sum(np.array(p_values) <= 0.05) <= high


def refit_p_values(number, drives):
    model = Model((Encoder.init(KEY, "offset1-model", 10, 8, 3),))
    options = {"num_steps": 40, "learning_rate": 1e-2}
    for seed, (recording, (label,)) in enumerate(recordings(number, 1, 800, drives)):
        yield goodness_of_fit_test(
            jax.random.key(seed),
            model,
            recording,
            samplers.TimeDelta(label, 1),
            method="refit",
            batch_size=32,
            num_batches=30,
            num_samples=19,
            fit_options=options,
        ).p_value


@pytest.mark.heavy
def test_level_of_the_refit_test():
    p_values = np.array(list(refit_p_values(60, drives=False)))
    low, high = binom.interval(0.99, 60, 0.05)
    assert low <= np.sum(p_values <= 0.05 + 1e-9) <= high
    low, high = binom.interval(0.99, 60, 0.5)
    assert low <= np.sum(p_values <= 0.5 + 1e-9) <= high


@pytest.mark.heavy
def test_power_of_the_refit_test():
    p_values = np.array(list(refit_p_values(20, drives=True)))
    assert np.mean(p_values <= 0.05 + 1e-9) >= 0.8


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["shift", "refit"])
def test_both_find_the_demo(method):
    demo = load_demo()
    options = {"shift": {"held_out": slice(None)}, "refit": {"num_samples": 19}}[method]
    if method == "refit":
        options["fit_options"] = {"num_steps": 60, "learning_rate": 3e-3}
    test = goodness_of_fit_test(
        KEY,
        demo.checkpoint,
        demo.spikes,
        samplers.TimeDelta(demo.position, 10),
        method=method,
        batch_size=64,
        **options,
    )
    assert test.p_value == pytest.approx(1 / (1 + len(test.null)))
    assert test.effect > 0.5


def of(**options):
    options = {"held_out": slice(None), **SIZES, **options}
    sampler = options.pop("sampler", SAMPLERS["time_delta"])
    return goodness_of_fit_test(options.pop("key", KEY), MODEL, X, sampler, **options)


def refit(**options):
    options = {"method": "refit", "held_out": None, "fit_options": TRAINING, **options}
    return of(**options)


CONSTANT = samplers.TimeDelta(np.ones((STEPS, 2)), 1)
LATE = samplers.Discrete(np.maximum(np.arange(STEPS) - 250, 0) // 10)
SOME = samplers.TimeDelta(LABELS, 1, steps=np.arange(50))
BAD = {
    "time": (lambda: of(sampler=samplers.Time(STEPS)), TypeError, "no|labels to shift.*got Time"),
    "constant": (lambda: of(sampler=CONSTANT), ValueError, "The labels never change"),
    "constant there": (
        lambda: of(sampler=LATE, held_out=slice(0, 200)),
        ValueError,
        "never change over the 200 rows from 0 on",
    ),
    "session": (lambda: refit(session_id=0), ValueError, "leave session_id out"),
    "mesh twice": (
        lambda: refit(fit_options={**TRAINING, "mesh": None}),
        ValueError,
        r"Pass \['mesh'\] as arguments",
    ),
    "blocks min_shift": (
        lambda: refit(surrogate="blocks", min_shift=5),
        ValueError,
        "min_shift belongs to shifts",
    ),
    "one class": (
        lambda: of(sampler=samplers.Discrete(np.ones(STEPS, int))),
        ValueError,
        "labels never change",
    ),
    "steps": (lambda: of(sampler=SOME), ValueError, "held_out= for some of them"),
    "batches": (lambda: of(num_batches=1), ValueError, "num_batches has to be at least 2"),
    "samples": (lambda: of(num_samples=0), ValueError, "num_samples has to be at least 1"),
    "key": (lambda: of(key=0), TypeError, "key has to be a JAX PRNG key"),
    "method": (lambda: of(method="permute"), ValueError, "'shift' or 'refit', got 'permute'"),
    "rows": (lambda: of(held_out=[1, 2]), TypeError, "held_out has to be a slice"),
    "strided": (lambda: of(held_out=slice(0, 100, 2)), TypeError, "without a step"),
    "none": (lambda: of(held_out=slice(10, 10)), ValueError, "0 rows are too short for shifts"),
    "short": (lambda: of(held_out=slice(0, 10)), ValueError, "10 rows are too short for shifts"),
    "min_shift": (lambda: of(min_shift=200), ValueError, "300 rows are too short for shifts"),
    "options": (lambda: of(fit_options=TRAINING), ValueError, "belong to method='refit'"),
    "steps missing": (lambda: refit(fit_options=None), ValueError, "fit_options={'num_steps'"),
    "middle": (lambda: refit(held_out=slice(50, 100)), ValueError, "one end of the 300 rows"),
    "all": (lambda: refit(held_out=slice(None)), ValueError, "one end of the 300 rows"),
    "none left": (lambda: refit(held_out=slice(3, None)), ValueError, "leave none of 300"),
    "surrogate": (lambda: refit(surrogate="noise"), ValueError, "'shift' or 'blocks', got 'noise'"),
    "short blocks": (
        lambda: refit(surrogate="blocks", block_length=19),
        ValueError,
        "at least 20 steps, 10 times the time offset",
    ),
    "few blocks": (
        lambda: refit(surrogate="blocks", block_length=150),
        ValueError,
        "300 rows make 2 blocks of 150",
    ),
    "length": (lambda: refit(block_length=5), ValueError, "belongs to surrogate='blocks'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
