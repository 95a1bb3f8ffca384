"""Scores of hybrid, full-batch and multi-session models, and of changed settings."""

import dataclasses
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cebra_jax_metrics as cjm
from cebra_jax_metrics import samplers

from .conftest import GOLDEN

KEY = jax.random.key(0)
QUICK = {"num_batches": 4, "return_estimate": True}
RNG = np.random.default_rng(0)


def load(name):
    return cjm.load(GOLDEN / f"{name}.pt")


def collapsed(checkpoint):
    """The same checkpoint with encoders that map everything to one point."""

    def collapse(encoder):
        names = list(encoder.params)
        params = {name: jnp.zeros_like(value) for name, value in encoder.params.items()}
        params[names[-1]] = jnp.ones_like(params[names[-1]])  # the last bias
        return dataclasses.replace(encoder, params=params)

    encoders = tuple(map(collapse, checkpoint.model.encoders))
    return dataclasses.replace(
        checkpoint, model=dataclasses.replace(checkpoint.model, encoders=encoders)
    )


@pytest.fixture
def sessions(recording):
    Xs = [recording["X"], recording["X_1"]]
    return Xs, [recording["position"], recording["position_1"]]


KINDS = {
    "time": [],
    "offset10-model": ["position"],
    "delta_normal": ["position"],
    "discrete": ["direction"],
    "mixed": ["position", "direction"],
    "hybrid": ["position"],
    "full_batch": ["position"],
    "criterion_euclidean_auto": ["position"],
}


@pytest.mark.parametrize("name", KINDS)
def test_collapsed_models_are_at_chance(name, recording):
    settings = {}
    checkpoint = load("offset10-model" if name == "delta_normal" else name)
    if name == "delta_normal":
        settings = {"conditional": "delta_normal", "delta": 0.2}
    labels = [recording[label] for label in KINDS[name]]
    estimate = cjm.goodness_of_fit_score(
        collapsed(checkpoint), recording["X"], *labels, **settings, **QUICK
    )
    assert abs(estimate.bits) < 1e-5
    for part in estimate.parts.values():
        assert abs(part.bits) < 1e-5


def test_collapsed_sessions_are_at_chance(sessions):
    Xs, ys = sessions
    checkpoint = collapsed(load("multisession"))
    joint = cjm.multisession_infonce_loss(checkpoint, Xs, ys, num_batches=4)
    assert abs(joint.bits) < 1e-5
    for i, part in enumerate(joint.parts.values()):
        assert abs(part.bits) < 1e-5
        assert abs(cjm.goodness_of_fit_score(checkpoint, Xs[i], ys[i], session_id=i)) < 1e-5


def test_hybrid_is_the_sum_of_two(recording):
    X, y = recording["X"], recording["position"]
    checkpoint = load("hybrid")
    estimate = cjm.infonce_loss(checkpoint, X, y, **QUICK)
    behavior, time = estimate.parts["behavior"], estimate.parts["time"]
    np.testing.assert_allclose(estimate.loss, behavior.loss + time.loss, rtol=1e-6)
    np.testing.assert_allclose(estimate.bits, behavior.bits + time.bits, atol=1e-5)
    np.testing.assert_allclose(estimate.per_batch, behavior.per_batch + time.per_batch, rtol=1e-6)
    stderr = np.std(estimate.per_batch, ddof=1) / 2
    np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-4)
    assert float(estimate) == cjm.infonce_loss(checkpoint, X, y, num_batches=4)
    whole = cjm.infonce_loss(
        checkpoint, X, y, feature_range=[slice(0, 3), slice(0, 3)], renormalize=True, **QUICK
    )
    assert set(whole.parts) == {"behavior", "time"}
    bits = cjm.goodness_of_fit_history(checkpoint)
    loss = checkpoint.history["total"]
    batch_size = checkpoint.settings["batch_size"]
    np.testing.assert_allclose(bits, (2 * np.log(batch_size) - loss) / np.log(2))


def test_full_batches(recording):
    """Only positives differ; estimating and evaluating agree, in chunks or not."""
    X, y = recording["X"], recording["position"]
    model = load("full_batch").model
    encoder = model.encoders[0]
    sampler = samplers.FullBatch(samplers.TimeDelta(y, 2), len(X), encoder.offset)
    batch = cjm.draw(KEY, sampler, None, 5)
    left, right = encoder.offset
    expected = np.arange(left, len(X) - left - right - 1)
    np.testing.assert_array_equal(batch.reference, np.tile(expected, (5, 1)))
    np.testing.assert_array_equal(batch.negative, batch.reference)
    assert batch.positive.min() >= left
    assert batch.positive.max() <= len(X) - right
    whole = cjm.evaluate(model, X, batch)
    for chunk_size in (None, 1, 2):
        estimate = cjm.estimate_infonce(
            KEY, model, X, sampler, num_batches=5, chunk_size=chunk_size
        )
        np.testing.assert_allclose(estimate.per_batch, whole.loss, rtol=1e-5)
        np.testing.assert_allclose(estimate.uniform, whole.uniform[0], rtol=1e-5)
    assert estimate.num_negatives == len(expected)
    fixed = samplers.FullBatch(samplers.Time(len(X), 4), len(X), encoder.offset)
    alike = cjm.estimate_infonce(KEY, model, X, fixed, num_batches=3)
    np.testing.assert_allclose(alike.stderr, 0, atol=1e-6)


def test_full_batches_in_blocks(recording, monkeypatch):
    X, y = recording["X"], recording["position"]
    expected = cjm.infonce_loss(load("full_batch"), X, y, num_batches=2)
    module = importlib.import_module("cebra_jax_metrics.infonce")
    monkeypatch.setattr(
        module.infonce, "__kwdefaults__", {**module.infonce.__kwdefaults__, "block_size": 64}
    )
    jax.clear_caches()
    found = cjm.infonce_loss(load("full_batch"), X, y, num_batches=2)
    jax.clear_caches()
    assert found == pytest.approx(expected, rel=1e-5)


def test_settings_per_call(recording):
    X, y, direction = (recording[name] for name in ("X", "position", "direction"))
    checkpoint = load("offset10-model")
    model = checkpoint.model
    cold = dataclasses.replace(
        model, criterion=dataclasses.replace(model.criterion, temperature=jnp.float32(0.3))
    )
    z_only = {"feature_range": slice(0, 2), "renormalize": True}
    cases = [
        ({"batch_size": 40}, model, samplers.TimeDelta(y, 1), {"batch_size": 40}),
        ({"time_offset": 7}, model, samplers.TimeDelta(y, 7), {"batch_size": 16}),
        ({"conditional": "time"}, model, samplers.Time(len(X), 1), {"batch_size": 16}),
        (
            {"conditional": "delta_normal", "delta": 0.3},
            model,
            samplers.DeltaNormal(y, 0.3),
            {"batch_size": 16},
        ),
        ({"temperature": 0.3}, cold, samplers.TimeDelta(y, 1), {"batch_size": 16}),
        (z_only, model, samplers.TimeDelta(y, 1), {"batch_size": 16, **z_only}),
        (
            {"batch_size": None},
            model,
            samplers.FullBatch(samplers.TimeDelta(y, 1), len(X), (5, 5)),
            {},
        ),
    ]
    for settings, changed, sampler, options in cases:
        loss = cjm.infonce_loss(checkpoint, X, y, num_batches=4, **settings)
        expected = cjm.estimate_infonce(KEY, changed, X, sampler, num_batches=4, **options)
        assert loss == float(expected), settings
        bits = cjm.goodness_of_fit_score(checkpoint, X, y, num_batches=4, **settings)
        assert bits == float(expected.bits), settings
    loss = cjm.infonce_loss(load("discrete"), X, direction, num_batches=4, prior="uniform")
    expected = cjm.estimate_infonce(
        KEY,
        load("discrete"),
        X,
        samplers.Discrete(direction, prior="uniform"),
        batch_size=16,
        num_batches=4,
    )
    assert loss == float(expected)


def test_several_feature_ranges_are_added(recording):
    X, y = recording["X"], recording["position"]
    ranges = [slice(0, 2), slice(1, None)]
    checkpoint = load("offset10-model")
    both = cjm.infonce_loss(checkpoint, X, y, feature_range=ranges, **QUICK)
    each = [cjm.infonce_loss(checkpoint, X, y, feature_range=r, **QUICK) for r in ranges]
    assert list(both.parts) == ["0:2", "1:"]
    np.testing.assert_allclose(both.loss, sum(e.loss for e in each), rtol=1e-6)
    np.testing.assert_allclose(both.bits, sum(e.bits for e in each), atol=1e-5)


def labels_of_sessions(kind):
    rng = np.random.default_rng(1)
    lengths = (80, 100, 60)
    if kind == "discrete":
        return [np.array([-3, 5, 2**40])[rng.integers(0, 3, n)] for n in lengths]
    return [rng.normal(size=(n, 2)).cumsum(0).astype(np.float32) for n in lengths]


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_positives_across_sessions(kind):
    labels = labels_of_sessions(kind)
    make = samplers.DiscreteMultisession if kind == "discrete" else samplers.Multisession
    batch = cjm.draw(KEY, make(labels), 32, 10)
    chex.assert_shape([batch.reference, batch.positive, batch.negative], (10, 3, 32))
    chex.assert_shape(batch.order, (10, 96))
    for one in zip(*batch, strict=True):
        reference, positive, _, order = (np.asarray(x) for x in one)
        np.testing.assert_array_equal(np.sort(order), np.arange(96))
        for session in range(3):
            assert reference[session].max() < len(labels[session])
            assert positive[session].max() < len(labels[session])
        if kind == "discrete":
            wanted = np.concatenate([y[i] for y, i in zip(labels, reference, strict=True)])
            found = np.concatenate([y[i] for y, i in zip(labels, positive, strict=True)])
            np.testing.assert_array_equal(found[order], wanted)


def test_changes_come_from_all_sessions():
    """Labels that move on by a step of their own in each session, far apart from each other."""
    steps = {1: 50, 10: 80, 100: 30}
    labels = [np.arange(n, dtype=np.float32) * speed for speed, n in steps.items()]
    sampler = samplers.Multisession(labels, 3)
    proposal = sampler.propose(KEY, 64)
    query, order = proposal.query
    here = np.concatenate([y[i] for y, i in zip(labels, proposal.reference, strict=True)])
    change = (np.asarray(query).reshape(-1)[order] - here).reshape(3, 64)
    assert set(np.unique(change)) == {3, 30, 300}
    for own in change:  # whatever session the reference is of
        found = [np.mean(own == 3 * speed) for speed in steps]
        share = np.array([n - 3 for n in steps.values()]) / (sum(steps.values()) - 9)
        assert (np.abs(found - share) < 4 * np.sqrt(share * (1 - share) / 64)).all()
    dealt = np.asarray(order) // 64
    counts = np.array(
        [[np.sum(dealt[s * 64 : s * 64 + 64] == t) for t in range(3)] for s in range(3)]
    )
    assert (counts.sum(0) == 64).all()
    assert (counts > 8).all()


def test_joint_loss_of_the_golden_model(sessions):
    Xs, ys = sessions
    checkpoint = load("multisession")
    estimate = cjm.multisession_infonce_loss(checkpoint, Xs, ys, num_batches=5)
    sampler = samplers.Multisession(ys, 1)
    again = cjm.estimate_infonce(KEY, checkpoint, Xs, sampler, batch_size=16, num_batches=5)
    assert float(estimate) == float(again)
    batch = cjm.draw(KEY, sampler, 16, 5)
    np.testing.assert_allclose(
        cjm.evaluate(checkpoint, Xs, batch).loss, estimate.per_batch, rtol=1e-6
    )
    gradient = jax.grad(lambda m: cjm.evaluate(m, Xs, batch).loss.mean())(checkpoint.model)
    assert all(np.abs(x).max() > 0 for e in gradient.encoders for x in e.params.values())
    halves = [part.loss for part in estimate.parts.values()]
    np.testing.assert_allclose(estimate.loss, np.mean(halves), rtol=1e-6)
    chance = np.log(2 * 16)
    np.testing.assert_allclose(estimate.bits, (chance - estimate.loss) / np.log(2), rtol=1e-5)


def test_padded_sessions_are_drawn_alike():
    for kind in ("continuous", "discrete"):
        labels = labels_of_sessions(kind)
        make = samplers.DiscreteMultisession if kind == "discrete" else samplers.Multisession
        longest = max(map(len, labels))
        padded = [np.concatenate([y, y[: longest - len(y)]]) for y in labels]
        plain = cjm.draw(KEY, make(labels), 16, 3)
        found = cjm.draw(KEY, make(padded, lengths=[len(y) for y in labels]), 16, 3)
        chex.assert_trees_all_equal(found, plain)


X0, X1 = np.zeros((120, 7)), np.zeros((100, 5))
Y0, Y1 = np.zeros((120, 2), np.float32), np.zeros((100, 2), np.float32)
JOINT = "multisession_infonce_loss"


def joint(*arguments, **options):
    return cjm.multisession_infonce_loss(load("multisession"), *arguments, **options)


BAD = {
    "single": (
        lambda: cjm.multisession_infonce_loss(load("time"), [X0], [Y0]),
        ValueError,
        "one session only",
    ),
    "no_labels": (lambda: joint([X0, X1]), RuntimeError, "No label"),
    "label_sets": (
        lambda: joint([X0, X1], [Y0, Y1], [Y0, Y1]),
        NotImplementedError,
        "multiple set of index",
    ),
    "sessions": (lambda: joint([X0], [Y0]), ValueError, "Invalid number of sessions"),
    "labels": (lambda: joint([X0, X1], [Y0]), ValueError, "X:2 and y:.1."),
    "samples": (
        lambda: joint([X0, X1], [Y0, Y1[1:]]),
        ValueError,
        "Invalid number of samples in session 1",
    ),
    "neurons": (lambda: joint([X0, X0], [Y0, Y0]), ValueError, "session 1 requires"),
    "kind": (lambda: joint([X0, X1], [Y0, Y1.astype(int)]), ValueError, "type of features"),
    "full": (
        lambda: joint([X0, X1], [Y0, Y1], batch_size=None),
        NotImplementedError,
        "Invalid index combination",
    ),
    "named": (
        lambda: cjm.infonce_loss(load("multisession"), [X0, X1], Y0, session_id=0),
        NotImplementedError,
        JOINT,
    ),
    "named_for_labels": (
        lambda: cjm.infonce_loss(load("multisession"), X0, [Y0, Y1], session_id=0),
        NotImplementedError,
        JOINT,
    ),
    "lacking": (
        lambda: samplers.DiscreteMultisession([np.array([1, 2, 7]), np.array([1, 2, 2])]),
        ValueError,
        r"Session 1 lacks the discrete labels \[7\]",
    ),
    "widths": (lambda: samplers.Multisession([Y0, Y1[:, 0]]), ValueError, r"\[2, 1\]"),
    "short": (lambda: samplers.Multisession([Y0, Y1[:5]], 5), ValueError, "Session 1 has 5"),
    "not_conditional": (
        lambda: samplers.Hybrid(samplers.Discrete(np.arange(5))),
        TypeError,
        "Time, TimeDelta and DeltaNormal",
    ),
    "hybrid_long": (
        lambda: samplers.Hybrid(samplers.TimeDelta(Y0, 1), 120),
        ValueError,
        "exceed the time offset, but got 120 <= 120",
    ),
    "hybrid_times": (
        lambda: samplers.Hybrid(samplers.Time(120, 5), 1),
        ValueError,
        "have to be the same, got 5 and 1",
    ),
    "full_labels": (
        lambda: samplers.FullBatch(samplers.TimeDelta(Y1), 120, (5, 5)),
        ValueError,
        "for 100 time steps",
    ),
    "full_offset": (
        lambda: cjm.estimate_infonce(
            KEY, load("time"), X0, samplers.FullBatch(samplers.Time(120), 120, (0, 1))
        ),
        ValueError,
        r"offset \(0, 1\)",
    ),
    "long_sampler": (
        lambda: cjm.estimate_infonce(KEY, load("time"), X0, samplers.Time(5000), batch_size=8),
        ValueError,
        "5000 time steps, but the recording has 120",
    ),
    "few_sessions": (
        lambda: cjm.estimate_infonce(
            KEY, load("multisession"), [X0, X1], samplers.Multisession([Y0]), batch_size=8
        ),
        ValueError,
        "1 sessions, there are 2",
    ),
    "same_ranges": (
        lambda: cjm.infonce_loss(load("time"), X0, feature_range=[slice(0, 2)] * 2),
        ValueError,
        "several different ones",
    ),
    "numbers_for_ranges": (
        lambda: cjm.infonce_loss(load("time"), X0, feature_range=(0, 2)),
        ValueError,
        "list of slices, got .0, 2.",
    ),
    "joint_ranges": (
        lambda: joint([X0, X1], [Y0, Y1], feature_range=[slice(0, 1), slice(0, 2)]),
        ValueError,
        "one feature range",
    ),
    **{
        f"unused_{name}": (
            lambda model=model, labels=labels, settings=settings: cjm.infonce_loss(
                load(model), X0, *labels, **settings
            ),
            ValueError,
            f"{next(iter(settings))}=.* has no effect",
        )
        for name, model, labels, settings in (
            ("conditional", "time", (), {"conditional": "time_delta"}),
            ("conditional_2", "discrete", (np.arange(120) % 2,), {"conditional": "time"}),
            ("offset", "discrete", (np.arange(120) % 2,), {"time_offset": 3}),
            ("prior", "offset10-model", (Y0,), {"prior": "uniform"}),
            ("delta", "offset10-model", (Y0,), {"delta": 0.1}),
        )
    },
    "full_size": (
        lambda: cjm.draw(KEY, samplers.FullBatch(samplers.Time(50), 50, (0, 1)), 7, 1),
        ValueError,
        "full batch has 48 references",
    ),
    "joint_session": (
        lambda: cjm.evaluate(
            load("multisession"), X0, cjm.draw(KEY, samplers.Multisession([Y0, Y1]), 8, 1)
        ),
        ValueError,
        "takes a list",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
