"""Hybrid, full-batch and joint losses: CEBRA's models and loaders, called directly."""

import cebra
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cebra.integrations.sklearn.dataset import SklearnDataset

import cebra_jax_metrics as cjm

from ..golden import make_objectives as golden
from . import peer

KEY = jax.random.key(0)
NUM_BATCHES = 400
TRAINED = {"max_iterations": 60, "learning_rate": 3e-3, "batch_size": 64, "output_dimension": 5}
RECORDING = peer.simulate(1, num_steps=300, num_neurons=6)
SESSIONS = [
    peer.simulate(2, num_steps=260, num_neurons=4),
    RECORDING,
    peer.simulate(3, num_steps=340, num_neurons=7),
    peer.simulate(4, num_steps=220, num_neurons=3),
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CEBRA's hybrid wrapper


def configured(model, X, *labels):
    dataset = SklearnDataset(X, labels)
    dataset.configure_for(model)
    return dataset


# Hybrid -------------------------------------------------------------------------------------


HYBRID = {
    "time_delta": {},
    "delta_normal": {"conditional": "delta_normal", "delta": 0.2},
    "time": {"conditional": "time"},
    "euclidean": {
        "model_architecture": "offset10-model-mse",
        "distance": "euclidean",
        "temperature_mode": "auto",
    },
}


@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_on_the_same_indices(name):
    settings = {**TRAINED, "hybrid": True, "time_offsets": 4, **HYBRID[name]}
    estimator = peer.fit(RECORDING.X, RECORDING.position, **settings)
    checkpoint = cjm.from_cebra(estimator)
    sampler = cjm.samplers.Hybrid(cjm.samplers.TimeDelta(RECORDING.position, 4), 4)
    batch = cjm.draw(KEY, sampler, 64, 3)
    total = cjm.evaluate(checkpoint, RECORDING.X, batch)
    behavior = cjm.evaluate(
        checkpoint, RECORDING.X, batch.objectives["behavior"], feature_range=slice(0, 3)
    )
    time = cjm.evaluate(checkpoint, RECORDING.X, batch.objectives["time"])
    for i in range(3):
        expected = np.array(golden.hybrid(estimator, RECORDING.X, *(x[i] for x in batch)))
        found = np.array([[x[i] for x in behavior], [x[i] for x in time]])
        np.testing.assert_allclose(found, expected, rtol=5e-6, atol=5e-6)
        np.testing.assert_allclose([x[i] for x in total], expected.sum(0), rtol=5e-6, atol=1e-5)


@pytest.mark.usefixtures("exact_index")
@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_scores(name):
    settings = {**TRAINED, "hybrid": True, "time_offsets": 4, **HYBRID[name]}
    estimator = peer.fit(RECORDING.X, RECORDING.position, **settings)
    ours = cjm.infonce_loss(
        estimator,
        RECORDING.X,
        RECORDING.position,
        num_batches=NUM_BATCHES,
        return_estimate=True,
    )
    peer.seed(1)
    dataset = configured(estimator.model_, RECORDING.X, RECORDING.position)
    loader, _ = estimator._prepare_loader(dataset, NUM_BATCHES, is_multisession=False)
    theirs = []
    for _ in range(NUM_BATCHES):
        index = loader.get_indices(64)
        positives = index.positive.split(64)
        steps = index.reference, *positives, index.negative
        theirs.append(golden.hybrid(estimator, RECORDING.X, *steps))
    theirs = np.array(theirs)
    for number, part in enumerate(("behavior", "time")):
        estimate = ours.parts[part]
        stderr = theirs[:, number, 0].std(ddof=1) / NUM_BATCHES**0.5
        difference = estimate.loss - theirs[:, number, 0].mean()
        assert abs(difference) < 4 * np.hypot(estimate.stderr, stderr)
    total = theirs[:, :, 0].sum(1)
    stderr = np.hypot(ours.stderr, total.std(ddof=1) / NUM_BATCHES**0.5)
    assert abs(ours.loss - total.mean()) < 4 * stderr
    np.testing.assert_allclose(ours.bits, (2 * np.log(64) - ours.loss) / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(
        ours.bits, ours.parts["behavior"].bits + ours.parts["time"].bits, atol=1e-5
    )


def test_hybrid_history():
    estimator = peer.fit(RECORDING.X, RECORDING.position, **{**TRAINED, "hybrid": True})
    bits = cjm.goodness_of_fit_history(estimator)
    losses = np.array(estimator.solver_.history)
    np.testing.assert_allclose(bits, (2 * np.log(64) - losses) / np.log(2), atol=1e-6)


# Full batch ---------------------------------------------------------------------------------

FULL = {
    "no labels": ((), {"time_offsets": 3}),
    "time_delta": (("position",), {"time_offsets": 3}),
    "delta_normal": (("position",), {"conditional": "delta_normal", "delta": 0.3}),
    "one time step": (("position",), {"model_architecture": "offset1-model"}),
    "euclidean": (
        ("height",),
        {"model_architecture": "offset10-model-mse", "distance": "euclidean"},
    ),
}


def full_batch_sampler(checkpoint, num_steps, labels):
    from cebra_jax_metrics.metrics import sampler_for

    offset = checkpoint.model.encoders[0].offset
    return sampler_for(checkpoint.settings, num_steps, labels, offset)


@pytest.mark.parametrize("name", FULL)
def test_full_batch_on_the_same_indices(name):
    labels, settings = FULL[name]
    labels = [getattr(RECORDING, label) for label in labels]
    settings = {**TRAINED, "batch_size": None, **settings}
    estimator = peer.fit(RECORDING.X, *labels, **settings)
    checkpoint = cjm.from_cebra(estimator)
    sampler = full_batch_sampler(checkpoint, 300, labels)
    batch = cjm.draw(KEY, sampler, None, 3)
    ours = cjm.evaluate(checkpoint, RECORDING.X, batch)
    estimate = cjm.estimate_infonce(KEY, checkpoint, RECORDING.X, sampler, num_batches=3)
    np.testing.assert_allclose(estimate.per_batch, ours.loss, rtol=5e-6)
    rng = np.random.default_rng(0)
    for i in range(3):
        permuted = rng.permutation(batch.negative[i])
        steps = batch.reference[i], batch.positive[i], permuted
        expected = golden.full_batch(estimator, RECORDING.X, *steps)
        np.testing.assert_allclose([x[i] for x in ours], expected, rtol=5e-6, atol=5e-6)
    loader, _ = estimator._prepare_loader(
        configured(estimator.model_, RECORDING.X, *labels), 1, is_multisession=False
    )
    reference = loader.get_indices().reference
    np.testing.assert_array_equal(reference, batch.reference[0])


@pytest.mark.usefixtures("exact_index")
@pytest.mark.parametrize("name", ["time_delta", "delta_normal", "one time step"])
def test_full_batch_scores(name):
    labels, settings = FULL[name]
    labels = [getattr(RECORDING, label) for label in labels]
    estimator = peer.fit(RECORDING.X, *labels, **{**TRAINED, "batch_size": None, **settings})
    ours = cjm.infonce_loss(estimator, RECORDING.X, *labels, num_batches=200, return_estimate=True)
    peer.seed(1)
    loader, _ = estimator._prepare_loader(
        configured(estimator.model_, RECORDING.X, *labels), 1, is_multisession=False
    )
    left = estimator.offset_.left
    theirs = []
    for _ in range(200):
        index = loader.get_indices()
        positive = index.positive.clamp(min=left)  # they would wrap round
        steps = index.reference, positive, index.negative
        theirs.append(golden.full_batch(estimator, RECORDING.X, *steps)[0])
    stderr = np.hypot(ours.stderr, np.std(theirs, ddof=1) / 200**0.5)
    assert abs(ours.loss - np.mean(theirs)) < 4 * stderr
    num_negatives = len(index.reference)
    assert ours.num_negatives == num_negatives
    bits = cjm.goodness_of_fit_score(estimator, RECORDING.X, *labels, num_batches=200)
    assert bits == pytest.approx((np.log(num_negatives) - float(ours)) / np.log(2), abs=1e-5)


def test_full_batch_scores_what_it_is_given():
    """CEBRA scores the recording that it was fitted to, whatever it is given."""
    settings = {**TRAINED, "batch_size": None}
    estimator = peer.fit(RECORDING.X, RECORDING.position, **settings)
    other = SESSIONS[1]
    part = cjm.infonce_loss(estimator, other.X[:200], other.position[:200], num_batches=5)
    whole = cjm.infonce_loss(estimator, other.X, other.position, num_batches=5)
    assert abs(part - whole) > 0.1


# Several sessions ---------------------------------------------------------------------------


def fit_sessions(number, label, **settings):
    sessions = SESSIONS[:number]
    labels = [getattr(session, label) for session in sessions]
    estimator = peer.fit([s.X for s in sessions], labels, **{**TRAINED, **settings})
    return estimator, [s.X for s in sessions], labels


SAMPLERS = {
    "position": lambda labels: cjm.samplers.Multisession(labels, 3),
    "direction": cjm.samplers.DiscreteMultisession,
}


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("label", SAMPLERS)
def test_joint_loss_on_the_same_indices(number, label):
    estimator, Xs, labels = fit_sessions(number, label)
    checkpoint = cjm.from_cebra(estimator)
    batch = cjm.draw(KEY, SAMPLERS[label](labels), 64, 2)
    ours = cjm.evaluate(checkpoint, Xs, batch)
    for i in range(2):
        expected = golden.joint(estimator, Xs, *(x[i] for x in batch))
        np.testing.assert_allclose([x[i] for x in ours], expected, rtol=5e-6, atol=5e-6)


@pytest.mark.usefixtures("exact_index")
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("label", SAMPLERS)
def test_joint_scores(number, label):
    estimator, Xs, labels = fit_sessions(number, label, time_offsets=3)
    ours = cjm.multisession_infonce_loss(estimator, Xs, labels, num_batches=NUM_BATCHES)
    peer.seed(1)
    dataset, _ = estimator._prepare_data(Xs, (labels,))
    loader, _ = estimator._prepare_loader(dataset, NUM_BATCHES, is_multisession=True)
    theirs = []
    for _ in range(NUM_BATCHES):
        index = loader.get_indices(64)
        steps = index.reference, index.positive, index.negative
        theirs.append(golden.joint(estimator, Xs, *steps, index.index_reversed))
    theirs = np.array(theirs)
    stderr = np.hypot(ours.stderr, theirs[:, 0].std(ddof=1) / NUM_BATCHES**0.5)
    assert abs(ours.loss - theirs[:, 0].mean()) < 4 * stderr
    spread = np.log(ours.per_batch.std(ddof=1) / theirs[:, 0].std(ddof=1))
    assert abs(spread) < 4 * (NUM_BATCHES - 1) ** -0.5
    for name, value, column in (("align", ours.align, 1), ("uniform", ours.uniform, 2)):
        tolerance = 6 * theirs[:, column].std(ddof=1) / NUM_BATCHES**0.5
        assert abs(value - theirs[:, column].mean()) < tolerance, name
    np.testing.assert_allclose(
        np.mean([part.loss for part in ours.parts.values()]), ours.loss, rtol=1e-6
    )
    assert ours.num_negatives == 64 * number
    assert sorted(ours.parts) == [str(i) for i in range(number)]


def test_torch_backend_files(tmp_path):
    """An estimator pickled whole: the same model as in its own file."""
    cases = {
        "hybrid": (RECORDING.X, RECORDING.position, {"hybrid": True}),
        "learned": (RECORDING.X, RECORDING.position, {"temperature_mode": "auto"}),
        "sessions": ([s.X for s in SESSIONS[:2]], [s.position for s in SESSIONS[:2]], {}),
        "tied": (
            RECORDING.X,
            RECORDING.direction,
            {"model_architecture": "offset1-model-mse-resnet-3layers"},
        ),
    }
    for name, (X, y, settings) in cases.items():
        estimator = peer.fit(X, y, **{**TRAINED, "max_iterations": 3, **settings})
        check_file(estimator, tmp_path / f"{name}.pt")
    adapted = peer.fit(RECORDING.X, RECORDING.position, **{**TRAINED, "max_adapt_iterations": 3})
    adapted.fit(SESSIONS[0].X, SESSIONS[0].position, adapt=True)
    check_file(adapted, tmp_path / "adapted.pt")


def check_file(estimator, path):
    estimator.save(str(path), backend="torch")
    found, expected = cjm.load(path), cjm.from_cebra(estimator)
    assert found.settings == expected.settings
    for ours, theirs in zip(
        jax.tree.leaves(found.model), jax.tree.leaves(expected.model), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert found.history.keys() == expected.history.keys()
    for name, values in expected.history.items():
        np.testing.assert_array_equal(found.history[name], values)


def test_subsampling_encoders():
    for name in cjm.architecture_names():
        if not name.endswith("subsample") and not name.startswith("resample"):
            continue
        torch.manual_seed(0)
        module = cebra.models.init(name, num_neurons=6, num_units=8, num_output=3)
        size = len(module.get_offset())
        windows = np.lib.stride_tricks.sliding_window_view(RECORDING.X, size, axis=0)
        with torch.no_grad():
            expected = module(torch.from_numpy(windows.copy())).numpy()
        checkpoint = cjm.from_state_dict(
            module.state_dict(), model_architecture=name, num_hidden_units=8, output_dimension=3
        )
        found = cjm.embed(checkpoint, RECORDING.X, pad=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert checkpoint.model.encoders[0].offset == (size // 2, size - size // 2)


def test_estimators_are_imported_once():
    from cebra_jax_metrics.metrics import as_checkpoint

    estimator = peer.fit(RECORDING.X, RECORDING.position, **TRAINED)
    first = as_checkpoint(estimator)
    before = {k: v.clone() for k, v in estimator.model_.state_dict().items()}
    cjm.infonce_loss(estimator, RECORDING.X, RECORDING.position, num_batches=2)
    assert as_checkpoint(estimator) is first
    assert all((before[k] == v).all() for k, v in estimator.model_.state_dict().items())
    changes = {
        "trained further": lambda: estimator.partial_fit(RECORDING.X, RECORDING.position),
        "fitted again": lambda: estimator.fit(RECORDING.X, RECORDING.position),
        "adapted": lambda: estimator.fit(SESSIONS[0].X, SESSIONS[0].position, adapt=True),
        "set otherwise": lambda: estimator.set_params(batch_size=32),
    }
    for name, change in changes.items():
        change()
        now = as_checkpoint(estimator)
        assert now is not first, name
        expected = [np.asarray(p.detach()) for p in estimator.solver_.model.parameters()]
        for ours, theirs in zip(now.model.encoders[0].params.values(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert as_checkpoint(estimator) is now, name
        first = now
    for edit in (
        lambda p: p.data.add_(1.0),
        lambda p: p.detach().numpy().fill(0.5),  # torch does not notice this one
    ):
        edit(next(iter(estimator.model_.parameters())))
        now = as_checkpoint(estimator)
        assert now is not first
        first = now


def test_several_feature_ranges():
    estimator = peer.fit(RECORDING.X, RECORDING.position, **TRAINED)
    checkpoint = cjm.from_cebra(estimator)
    batch = cjm.draw(KEY, cjm.samplers.TimeDelta(RECORDING.position, 3), 64, 2)
    z = jnp.asarray(estimator.model_(torch.from_numpy(RECORDING.X.T[None].copy()))[0].T.detach())
    steps = [np.clip(index, 2, 297) - 2 for index in batch]
    for renormalize in (False, True):
        each = []
        for features in (slice(0, 2), slice(1, 5)):
            part = z[:, features]
            if renormalize:
                part = part / jnp.linalg.norm(part, axis=1, keepdims=True)
            expected = [cjm.infonce(*(part[index[i]] for index in steps)).loss for i in range(2)]
            found = cjm.evaluate(
                checkpoint, RECORDING.X, batch, feature_range=features, renormalize=renormalize
            )
            np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
            each.append(found.loss)
        both = cjm.evaluate(
            checkpoint,
            RECORDING.X,
            batch,
            feature_range=[slice(0, 2), slice(1, 5)],
            renormalize=renormalize,
        )
        np.testing.assert_allclose(both.loss, sum(each), rtol=1e-6)
