"""InfoNCE estimated by CEBRA and by us, within the standard errors of both."""

from dataclasses import dataclass, field

import cebra
import jax
import numpy as np
import pytest
import torch
from cebra.integrations.sklearn import metrics as theirs
from cebra.integrations.sklearn.dataset import SklearnDataset

import cebra_jax_metrics as cjm

from . import peer

pytestmark = pytest.mark.filterwarnings('ignore:"delta" distribution:DeprecationWarning:cebra')

NUM_BATCHES = 500
TRAINED = {"max_iterations": 60, "learning_rate": 3e-3, "batch_size": 128}
RECORDING = peer.simulate(1, num_steps=600, num_neurons=6)
SECOND = peer.simulate(2, num_steps=500, num_neurons=4)
FURTHER = [peer.simulate(n, num_steps=400 + n, num_neurons=n) for n in (9, 8)]


@dataclass
class Case:
    labels: tuple[str, ...] = ("position",)
    settings: dict = field(default_factory=dict)


CASES = {
    "time": Case((), {"time_offsets": 3}),
    "time with labels": Case(settings={"conditional": "time", "time_offsets": 4}),
    "time_delta": Case(settings={"time_offsets": 5}),
    "time_delta, 1-D labels": Case(("height",), {"conditional": "time_delta"}),
    "time_delta, two arrays": Case(("position", "height")),
    "delta_normal": Case(settings={"conditional": "delta_normal", "delta": 0.3}),
    "delta": Case(("height",), {"conditional": "delta", "delta": 0.1}),
    "discrete": Case(("direction",)),
    "mixed": Case(("position", "direction"), {"time_offsets": 3}),
    "mixed, 1-D labels": Case(("direction", "height")),
    "euclidean, learned temperature": Case(
        settings={
            "model_architecture": "offset10-model-mse",
            "distance": "euclidean",
            "temperature_mode": "auto",
            "temperature": 2.0,
            "min_temperature": 0.5,
            "time_offsets": 5,
        }
    ),
    "one time step, low temperature": Case(
        settings={"model_architecture": "offset1-model", "temperature": 0.1, "time_offsets": 5}
    ),
}


def their_batches(estimator, score):
    """Loss, align and uniform of every batch that CEBRA scores: (batches, 3); and its result."""
    batches = []
    hook = estimator.solver_.criterion.register_forward_hook(
        lambda *arguments: batches.append([part.item() for part in arguments[-1]])
    )
    try:
        result = score()
    finally:
        hook.remove()
    return np.array(batches), result


def assert_same_distribution(ours, batches):
    assert len(ours.per_batch) == len(batches) == NUM_BATCHES
    stderr = batches.std(axis=0, ddof=1) / NUM_BATCHES**0.5
    combined = np.hypot(stderr, [ours.stderr, stderr[1], stderr[2]])
    differences = np.array([ours.loss, ours.align, ours.uniform]) - batches.mean(axis=0)
    assert np.abs(differences / combined).max() < 4
    # The log of a standard deviation has a standard error of 1/√(2 (n - 1)).
    log_ratio = np.log(ours.stderr / stderr[0])
    assert abs(log_ratio) < 4 * (NUM_BATCHES - 1) ** -0.5
    chance = np.log(TRAINED["batch_size"])
    assert abs(ours.loss - chance) > 50 * ours.stderr  # or the test would tell little


@pytest.mark.usefixtures("exact_index")
@pytest.mark.parametrize("name", CASES)
def test_one_session(name):
    case = CASES[name]
    labels = [getattr(RECORDING, label) for label in case.labels]
    estimator = peer.fit(RECORDING.X, *labels, **{**TRAINED, **case.settings})
    peer.seed(1)
    batches, loss = their_batches(
        estimator, lambda: theirs.infonce_loss(estimator, RECORDING.X, *labels)
    )
    ours = cjm.infonce_loss(estimator, RECORDING.X, *labels, return_estimate=True)
    assert_same_distribution(ours, batches)
    bits = theirs.infonce_to_goodness_of_fit(loss, estimator)
    score = cjm.goodness_of_fit_score(estimator, RECORDING.X, *labels)
    assert score == pytest.approx(float(ours.bits), abs=1e-5)
    assert abs(score - bits) < 6 * ours.bits_stderr  # 4 of the difference of two such estimates


@pytest.mark.usefixtures("exact_index")
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("label", ["position", "direction"])
def test_several_sessions(label, number):
    sessions = [RECORDING, SECOND, *FURTHER][:number]
    estimator = peer.fit(
        [session.X for session in sessions],
        [getattr(session, label) for session in sessions],
        **TRAINED,
    )
    for i, session in list(enumerate(sessions))[-2:]:
        peer.seed(i)
        y = getattr(session, label)
        batches, _ = their_batches(
            estimator,
            lambda x=session.X, y=y, i=i: theirs.infonce_loss(estimator, x, y, session_id=i),
        )
        ours = cjm.infonce_loss(estimator, session.X, y, session_id=i, return_estimate=True)
        assert_same_distribution(ours, batches)


@pytest.mark.parametrize("prior", ["empirical", "uniform"])
def test_discrete_with_either_prior(prior):
    X, direction = RECORDING.X, RECORDING.direction
    estimator = peer.fit(X, direction, **TRAINED)
    peer.seed(1)
    dataset = SklearnDataset(X, (direction,))
    dataset.configure_for(estimator.model_)
    loader = cebra.data.DiscreteDataLoader(
        dataset=dataset, batch_size=TRAINED["batch_size"], num_steps=NUM_BATCHES, prior=prior
    )
    batches, _ = their_batches(estimator, lambda: estimator.solver_.validation(loader))
    ours = cjm.estimate_infonce(
        jax.random.key(1),
        cjm.from_cebra(estimator),
        X,
        cjm.samplers.Discrete(direction, prior=prior),
        batch_size=TRAINED["batch_size"],
        num_batches=NUM_BATCHES,
    )
    assert_same_distribution(ours, batches)


def test_discrete_labels_of_any_values():
    labels = np.array([2, 3, 7])[RECORDING.direction].astype(np.int32)
    estimator = peer.fit(RECORDING.X, labels, **TRAINED)
    peer.seed(1)
    batches, _ = their_batches(
        estimator, lambda: theirs.infonce_loss(estimator, RECORDING.X, labels)
    )
    ours = cjm.infonce_loss(estimator, RECORDING.X, labels, return_estimate=True)
    assert_same_distribution(ours, batches)


def test_shifted_labels_score_below_chance():
    X, y = RECORDING.X, np.roll(RECORDING.direction, 180)
    estimator = peer.fit(RECORDING.X, RECORDING.direction, **TRAINED)
    peer.seed(1)
    batches, _ = their_batches(estimator, lambda: theirs.infonce_loss(estimator, X, y))
    ours = cjm.infonce_loss(estimator, X, y, return_estimate=True)
    assert_same_distribution(ours, batches)
    assert ours.bits < -0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"model_architecture": "offset1-model"},
        {"model_architecture": "offset36-model-dropout", "temperature": 0.2},
        {"model_architecture": "offset10-model-mse", "distance": "euclidean"},
        {"temperature_mode": "auto", "min_temperature": 2.0},
    ],
)
def test_the_same_indices_have_the_same_loss(settings):
    X = RECORDING.X
    estimator = peer.fit(X, **settings)
    steps = np.random.default_rng(0).integers(len(X), size=(3, 50))
    steps[:, :4] = 0, 1, len(X) - 2, len(X) - 1  # windows that would reach over the edges
    dataset = SklearnDataset(X, ())
    dataset.configure_for(estimator.model_)
    estimator.model_.eval()
    with torch.no_grad():
        windows = [estimator.model_(dataset[torch.from_numpy(index)]) for index in steps]
        expected = [part.item() for part in estimator.solver_.criterion(*windows)]
    batch = cjm.samplers.Batch(*steps[:, None])
    ours = cjm.evaluate(cjm.from_cebra(estimator), X, batch)
    np.testing.assert_allclose(np.concatenate(ours), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_conversions(batch_size):
    estimator = peer.fit(RECORDING.X, batch_size=batch_size)
    several = peer.fit([RECORDING.X, SECOND.X], [RECORDING.height, SECOND.height])
    losses = np.linspace(-3, 12, 7)
    for model in (estimator, several):
        for loss in (2.5, losses, losses.reshape(1, 7)):
            expected = theirs.infonce_to_goodness_of_fit(loss, model)
            np.testing.assert_allclose(
                cjm.infonce_to_goodness_of_fit(loss, model), expected, rtol=0, atol=1e-12
            )
        np.testing.assert_allclose(
            cjm.goodness_of_fit_history(model), theirs.goodness_of_fit_history(model), atol=1e-6
        )
    expected = theirs.infonce_to_goodness_of_fit(losses, batch_size=batch_size, num_sessions=3)
    ours = cjm.infonce_to_goodness_of_fit(losses, batch_size=batch_size, num_sessions=3)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_correction_by_batch_size():
    estimator = peer.fit(RECORDING.X, **TRAINED)
    plain, corrected = (
        cjm.infonce_loss(estimator, RECORDING.X, num_batches=5, correct_by_batchsize=correct)
        for correct in (False, True)
    )
    assert plain - corrected == pytest.approx(np.log(TRAINED["batch_size"]), abs=1e-5)
    peer.seed(1)
    batches, result = their_batches(
        estimator,
        lambda: theirs.infonce_loss(
            estimator, RECORDING.X, num_batches=5, correct_by_batchsize=True
        ),
    )
    assert batches[:, 0].mean() - result == pytest.approx(plain - corrected, abs=1e-5)
