"""Embeddings, losses and gradients of models that CEBRA trained, against what CEBRA computed."""

import jax
import numpy as np
import pytest

from cebra_jax_metrics import embed, evaluate, load
from cebra_jax_metrics.samplers import Batch, HybridBatch, MultisessionBatch

from .conftest import GOLDEN

CASES = sorted(path.stem for path in GOLDEN.glob("*.pt"))
SESSIONS = [(case, None) for case in CASES if case != "multisession"]
SESSIONS += [("multisession", 0), ("multisession", 1)]


def golden(case, session, recording):
    """Checkpoint, recording, and CEBRA's results without the session's suffix and prefix."""
    with np.load(GOLDEN / f"{case}.npz") as data:
        results = dict(data)
    if session is not None:
        results = {k.replace(f"grad.{session}.", "grad."): v for k, v in results.items()}
        results = {k.removesuffix(f".{session}"): v for k, v in results.items()}
    return load(GOLDEN / f"{case}.pt"), recording["X_1" if session == 1 else "X"], results


def test_there_is_a_case_per_family_and_criterion():
    models = [load(GOLDEN / f"{case}.pt").model for case in CASES]
    assert len({model.encoders[0].architecture for model in models}) >= 23
    assert len({(m.criterion.similarity, m.criterion.learned) for m in models}) == 4


@pytest.mark.parametrize(("case", "session"), SESSIONS)
def test_embedding(case, session, recording):
    checkpoint, X, results = golden(case, session, recording)
    z = embed(checkpoint, X, session)
    assert z.shape == results["embedding"].shape
    assert z.dtype == np.float32
    largest = np.abs(results["embedding"]).max()
    assert np.abs(z - results["embedding"]).max() <= 1e-5 * (1 + largest)


WITH_LOSS = [(case, session) for case, session in SESSIONS if case not in ("hybrid", "full_batch")]


@pytest.mark.heavy
@pytest.mark.parametrize(("case", "session"), WITH_LOSS)
def test_loss_and_gradient(case, session, recording):
    checkpoint, X, results = golden(case, session, recording)
    batch = Batch(*(results[name][None] for name in Batch._fields))

    def loss(model):
        infonce = evaluate(model, X, batch, session_id=session)
        return infonce.loss[0], infonce

    (_, infonce), gradient = jax.value_and_grad(loss, has_aux=True)(checkpoint.model)
    for name in ("loss", "align", "uniform"):
        expected = results[name]
        assert abs(getattr(infonce, name)[0] - expected) <= 5e-6 * (1 + abs(expected)), name

    ours = {f"grad.{k}": v for k, v in gradient.encoders[session or 0].params.items()}
    criterion = checkpoint.model.criterion
    if criterion.learned:  # by the chain rule, d log(1/τ) = -dτ / τ
        ours["grad.log_inverse_temperature"] = (
            -criterion.temperature * gradient.criterion.temperature
        )
    theirs = {name: value for name, value in results.items() if name.startswith("grad.")}
    theirs = {k: v for k, v in theirs.items() if session is None or not k[5:6].isdigit()}
    assert ours.keys() == theirs.keys()
    # The last bias of a model without output nonlinearity has gradient 0 under the Euclidean
    # similarity: what torch has there is rounding, relative to the gradients of the others.
    rounding = 1e-6 * max(np.abs(value).max() for value in theirs.values())
    for name, expected in theirs.items():
        bound = 1e-4 * np.abs(expected).max() + rounding
        assert np.abs(ours[name] - expected).max() <= bound, name


def test_one_case_has_a_clamped_temperature(recording):
    checkpoint, _, results = golden("criterion_cosine_auto", None, recording)
    assert float(checkpoint.model.criterion.effective_temperature) == pytest.approx(0.4)
    assert results["grad.log_inverse_temperature"] == 0


@pytest.fixture(scope="module")
def objectives():
    """What CEBRA's models and criteria give on given indices, where it cannot score itself."""
    with np.load(GOLDEN / "objectives.npz") as data:
        return dict(data)


def indices(objectives, kind, names):
    return [objectives[f"{kind}.{name}"][None].astype(np.int32) for name in names]


def assert_losses(found, expected):
    found = np.array([part[0] for part in found])
    assert (np.abs(found - expected) <= 5e-6 * (1 + np.abs(expected))).all()


def test_hybrid(objectives, recording):
    batch = HybridBatch(*indices(objectives, "hybrid", HybridBatch._fields))
    checkpoint = load(GOLDEN / "hybrid.pt")
    behavior, time = objectives["hybrid.losses"]
    assert_losses(evaluate(checkpoint, recording["X"], batch), behavior + time)
    parts = batch.objectives
    features = {"feature_range": slice(0, 3)}
    assert_losses(evaluate(checkpoint, recording["X"], parts["behavior"], **features), behavior)
    assert_losses(evaluate(checkpoint, recording["X"], parts["time"]), time)


def test_full_batch(objectives, recording):
    batch = Batch(*indices(objectives, "full_batch", Batch._fields))
    checkpoint = load(GOLDEN / "full_batch.pt")
    expected = objectives["full_batch.losses"]
    assert_losses(evaluate(checkpoint, recording["X"], batch), expected)


def test_joint(objectives, recording):
    batch = MultisessionBatch(*indices(objectives, "joint", MultisessionBatch._fields))
    Xs = [recording["X"], recording["X_1"]]
    found = evaluate(load(GOLDEN / "multisession.pt"), Xs, batch)
    assert_losses(found, objectives["joint.losses"])
