"""The CEBRA-signature functions: what they take, what they return, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from cebra_jax_metrics import (
    Checkpoint,
    Criterion,
    Encoder,
    Estimate,
    Model,
    estimate_infonce,
    goodness_of_fit_history,
    goodness_of_fit_score,
    infonce_loss,
    infonce_to_goodness_of_fit,
    load,
)
from cebra_jax_metrics.metrics import sampler_for
from cebra_jax_metrics.samplers import DeltaNormal, Discrete, Mixed, Time, TimeDelta

from .conftest import GOLDEN

QUICK = dict(num_batches=4)


@pytest.fixture(scope="module")
def position_model():
    return load(GOLDEN / "offset10-model.pt")


@pytest.fixture
def data(recording):
    return recording["X"], recording["position"]


def test_score_is_the_estimate_with_the_models_settings(position_model, data):
    X, position = data
    key = jax.random.key(3)
    expected = estimate_infonce(
        key, position_model, X, TimeDelta(position, 1), batch_size=16, num_batches=4
    )
    loss = infonce_loss(position_model, X, position, key=key, **QUICK)
    assert type(loss) is float
    assert loss == float(expected.loss)
    bits = goodness_of_fit_score(position_model, X, position, key=key, **QUICK)
    assert type(bits) is float
    assert bits == float(expected.bits)
    corrected = infonce_loss(
        position_model, X, position, key=key, correct_by_batchsize=True, **QUICK
    )
    assert corrected == pytest.approx(loss - np.log(16), abs=1e-6)
    estimate = infonce_loss(position_model, X, position, key=key, return_estimate=True, **QUICK)
    assert isinstance(estimate, Estimate)


def test_default_key_repeats(position_model, data):
    first, second = (infonce_loss(position_model, *data, **QUICK) for _ in range(2))
    assert first == second
    assert infonce_loss(position_model, *data, key=jax.random.key(1), **QUICK) != first


def test_path_and_checkpoint_are_the_same(position_model, data):
    path = GOLDEN / "offset10-model.pt"
    expected = infonce_loss(position_model, *data, **QUICK)
    assert infonce_loss(path, *data, **QUICK) == expected
    assert infonce_loss(str(path), *data, **QUICK) == expected


class Tensor:
    """What torch's tensors have in common with ours: leave autograd, go to the CPU, be NumPy."""

    def __init__(self, values, requires_grad=True):
        self.values, self.requires_grad, self.dtype = values, requires_grad, f"torch.{values.dtype}"

    def detach(self):
        return Tensor(self.values, False)

    def cpu(self):
        return self

    def resolve_conj(self):
        return self

    def numpy(self):
        assert not self.requires_grad
        return self.values


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist, Tensor, np.float64])
def test_any_array(position_model, data, kind):
    X, position = data
    expected = infonce_loss(position_model, X, position, **QUICK)
    assert infonce_loss(position_model, kind(X), kind(position), **QUICK) == expected


def test_inputs_are_not_modified(position_model, data):
    X, position = data
    X.setflags(write=False)
    before = position.copy()
    infonce_loss(position_model, X, position, **QUICK)
    np.testing.assert_array_equal(position, before)


@pytest.mark.parametrize(
    ("case", "labels", "sampler"),
    [
        ("time", (), lambda position, direction: Time(len(position), 1)),
        ("discrete", ("direction",), lambda position, direction: Discrete(direction)),
        (
            "mixed",
            ("position", "direction"),
            lambda position, direction: Mixed(direction, position, 1),
        ),
    ],
)
def test_kinds_of_labels(case, labels, sampler, recording):
    X, checkpoint = recording["X"], load(GOLDEN / f"{case}.pt")
    loss = infonce_loss(checkpoint, X, *(recording[n] for n in labels), **QUICK)
    sampler = sampler(recording["position"], recording["direction"])
    expected = estimate_infonce(
        jax.random.key(0), checkpoint, X, sampler, batch_size=16, num_batches=4
    )
    assert loss == float(expected.loss)


def test_bfloat16_labels_and_foreign_byte_order(position_model, data):
    X, position = data
    coarse = jnp.asarray(position, jnp.bfloat16)
    expected = infonce_loss(position_model, X, np.asarray(coarse, np.float32), **QUICK)
    assert infonce_loss(position_model, X, coarse, **QUICK) == expected
    assert infonce_loss(position_model, X.astype(">f4"), coarse, **QUICK) == expected


def test_correction_in_x64(position_model, data):
    with jax.enable_x64(True):
        corrected = infonce_loss(position_model, *data, correct_by_batchsize=True, **QUICK)
    expected = infonce_loss(position_model, *data, **QUICK) - np.log(16)
    assert corrected == pytest.approx(expected, abs=1e-6)


def test_session_of_a_multisession_model(recording):
    checkpoint = load(GOLDEN / "multisession.pt")
    estimate = goodness_of_fit_score(
        checkpoint, recording["X_1"], recording["position_1"], session_id=1, return_estimate=True
    )
    assert estimate.num_negatives == 16


def test_collapsed_multisession_model_is_at_chance(recording):
    """CEBRA counts the negatives of all sessions and gives log2 of their number."""
    checkpoint = load(GOLDEN / "multisession.pt")
    collapsed = jax.tree.map(jnp.zeros_like, checkpoint.model.encoders)
    for encoder in collapsed:
        encoder.params["net.5.bias"] = jnp.ones(3)
    checkpoint = Checkpoint(Model(collapsed, checkpoint.model.criterion), checkpoint.settings)
    bits = goodness_of_fit_score(
        checkpoint, recording["X_1"], recording["position_1"], session_id=1, **QUICK
    )
    assert abs(bits) < 1e-5


LABELS = np.zeros((9, 2))
INTEGERS = np.arange(9)


@pytest.mark.parametrize(
    ("settings", "labels", "kind"),
    [
        ({}, (), Time),
        ({"conditional": "delta_normal"}, (), Time),
        ({}, (LABELS,), TimeDelta),
        ({"conditional": None}, (LABELS,), TimeDelta),
        ({"conditional": "time"}, (LABELS,), Time),
        ({"conditional": "delta_normal", "delta": 1}, (LABELS, LABELS[:, 0]), DeltaNormal),
        ({"conditional": "time"}, (INTEGERS,), Discrete),
        ({"conditional": "time"}, (INTEGERS, LABELS), Mixed),
    ],
)
def test_sampler_of_the_settings(settings, labels, kind):
    sampler = sampler_for({"time_offsets": [2], **settings}, 9, labels)
    assert isinstance(sampler, kind)
    if hasattr(sampler, "time_offset"):
        assert sampler.time_offset == 2
    if kind is DeltaNormal:
        assert sampler.labels.shape[1] == sum(label.reshape(9, -1).shape[1] for label in labels)


def test_history(position_model):
    bits = goodness_of_fit_history(position_model)
    assert isinstance(bits, np.ndarray)
    total = position_model.history["total"]
    np.testing.assert_allclose(bits, (np.log(16) - total) / np.log(2))
    joint = load(GOLDEN / "multisession.pt")
    expected = (np.log(32) - joint.history["total"]) / np.log(2)
    np.testing.assert_allclose(goodness_of_fit_history(joint), expected)


def test_conversion_to_bits(position_model):
    assert infonce_to_goodness_of_fit(0.0, batch_size=4, num_sessions=2) == pytest.approx(3.0)
    assert type(infonce_to_goodness_of_fit(np.float32(1), position_model)) is float
    losses = np.asarray([[0.0, np.log(2)]])
    bits = infonce_to_goodness_of_fit(losses, position_model)
    np.testing.assert_allclose(bits, [[4.0, 3.0]])
    np.testing.assert_array_equal(infonce_to_goodness_of_fit(losses.tolist(), position_model), bits)


class Unfitted(BaseEstimator):
    def fit(self, X):
        return self


BAD = {
    "unfitted": (lambda m, X, y: infonce_loss(Unfitted(), X, y), NotFittedError, "not fitted"),
    "unfitted_bits": (
        lambda m, X, y: infonce_to_goodness_of_fit(0.0, Unfitted()),
        RuntimeError,
        "Fit the CEBRA model first",
    ),
    "no_model": (lambda m, X, y: infonce_loss(3, X, y), TypeError, "fitted cebra.CEBRA"),
    "bare_model": (lambda m, X, y: infonce_loss(m.model, X, y), TypeError, "estimate_infonce"),
    "no_file": (lambda m, X, y: infonce_loss("missing.pt", X, y), FileNotFoundError, "missing.pt"),
    "sessions": (
        lambda m, X, y: infonce_loss(m, [X, X], y),
        NotImplementedError,
        "Data invalid: score cannot be computed on multiple sessions",
    ),
    "label_sessions": (
        lambda m, X, y: infonce_loss(m, X, [y, y]),
        NotImplementedError,
        "Labels invalid: score cannot be computed on multiple sessions",
    ),
    "session": (lambda m, X, y: infonce_loss(m, X, y, session_id=2), RuntimeError, "session_id 2"),
    "neurons": (lambda m, X, y: infonce_loss(m, X[:, :5], y), ValueError, "Invalid input shape"),
    "short": (lambda m, X, y: infonce_loss(m, X[:9], y[:9]), ValueError, "9 sample"),
    "nan": (lambda m, X, y: infonce_loss(m, X * np.nan, y), ValueError, "Input contains NaN"),
    "nan_label": (lambda m, X, y: infonce_loss(m, X, y * np.nan), ValueError, "contains NaN"),
    "no_label": (lambda m, X, y: infonce_loss(m, X), ValueError, "Number of index invalid"),
    "too_many": (lambda m, X, y: infonce_loss(m, X, y, y), ValueError, "Number of index invalid"),
    "length": (lambda m, X, y: infonce_loss(m, X, y[1:]), ValueError, "Invalid number of samples"),
    "width": (lambda m, X, y: infonce_loss(m, X, y[:, :1]), ValueError, "number of features"),
    "flat": (lambda m, X, y: infonce_loss(m, X, y[:, 0]), ValueError, "number of features"),
    "kind": (lambda m, X, y: infonce_loss(m, X, y.astype(int)), ValueError, "type of features"),
    "text": (lambda m, X, y: infonce_loss(m, X, y.astype(str)), ValueError, "numbers"),
    "3d": (lambda m, X, y: infonce_loss(m, X, y[..., None]), ValueError, "Found array with dim 3"),
    "batches": (lambda m, X, y: infonce_loss(m, X, y, num_batches=0), ValueError, "num_steps"),
    "negative_batches": (
        lambda m, X, y: infonce_loss(m, X, y, num_batches=-3),
        ValueError,
        "num_steps",
    ),
    "no_batches": (
        lambda m, X, y: infonce_loss(m, X, y, num_batches=None),
        ValueError,
        "num_steps",
    ),
    "half": (lambda m, X, y: infonce_loss(m, X, y, num_batches=1.5), TypeError, "num_batches"),
    "key": (lambda m, X, y: infonce_loss(m, X, y, key=7), TypeError, "PRNG key"),
    "correction": (
        lambda m, X, y: infonce_loss(m, X, y, batch_size=None, correct_by_batchsize=True),
        ValueError,
        "Batch size is None",
    ),
    "setting": (lambda m, X, y: infonce_loss(m, X, y, tau=1), TypeError, r"\['tau'\]"),
    "cold": (lambda m, X, y: infonce_loss(m, X, y, temperature=0), ValueError, "above 0"),
    "features": (
        lambda m, X, y: infonce_loss(m, X, y, feature_range=slice(0, 9)),
        ValueError,
        r"slice of the 3 features, such as slice\(0, 3\)",
    ),
    "no_features": (
        lambda m, X, y: infonce_loss(m, X, y, feature_range=slice(2, 2)),
        ValueError,
        "feature_range",
    ),
    "hybrid_features": (
        lambda m, X, y: infonce_loss(GOLDEN / "hybrid.pt", X, y, feature_range=slice(0, 2)),
        ValueError,
        "two feature ranges",
    ),
    "hybrid_full": (
        lambda m, X, y: infonce_loss(GOLDEN / "hybrid.pt", X, y, batch_size=None),
        NotImplementedError,
        "Invalid index combination",
    ),
    "full_discrete": (
        lambda m, X, y: infonce_loss(
            GOLDEN / "discrete.pt", X, np.arange(len(X)) % 2, batch_size=None
        ),
        NotImplementedError,
        "Full dataset: True",
    ),
    "full_short": (
        lambda m, X, y: infonce_loss(m, X[:12], y[:12], batch_size=None),
        ValueError,
        "at least 17 time steps",
    ),
    "prior": (
        lambda m, X, y: infonce_loss(
            GOLDEN / "discrete.pt", X, np.arange(len(X)) % 2, prior="other"
        ),
        ValueError,
        "Invalid choice of prior",
    ),
    "full_bits": (
        lambda m, X, y: goodness_of_fit_history(GOLDEN / "full_batch.pt"),
        ValueError,
        "not yet supported",
    ),
    "both": (
        lambda m, X, y: infonce_to_goodness_of_fit(0.0, m, batch_size=3),
        ValueError,
        "should not be provided",
    ),
    "neither": (
        lambda m, X, y: infonce_to_goodness_of_fit(0.0, batch_size=3),
        ValueError,
        r"num_sessions \(None\)",
    ),
    "zero": (
        lambda m, X, y: infonce_to_goodness_of_fit(0.0, batch_size=0, num_sessions=1),
        ValueError,
        "batch_size",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, position_model, data):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(position_model, *data)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size has to be at least 1"),
        ({"time_offsets": [1, 2]}, NotImplementedError, "multiple time offsets"),
        ({"time_offsets": 500, "conditional": "time"}, ValueError, "exceed the time offset"),
        ({"conditional": "delta_vmf"}, ValueError, "'delta_vmf'"),
        ({"conditional": "delta"}, ValueError, "needs the setting delta"),
    ],
)
def test_bad_settings(settings, error, message, position_model, data):
    changed = Checkpoint(position_model.model, {**position_model.settings, **settings})
    with pytest.raises(error, match=message):
        infonce_loss(changed, *data, **QUICK)


def test_a_batch_size_is_needed(position_model, data):
    settings = {k: v for k, v in position_model.settings.items() if k != "batch_size"}
    with pytest.raises(ValueError, match="Batch size is None"):
        infonce_loss(Checkpoint(position_model.model, settings), *data, **QUICK)


def test_the_old_name_of_a_conditional_warns(position_model, data):
    with pytest.warns(DeprecationWarning, match='"delta" distribution will be deprecated'):
        old = infonce_loss(position_model, *data, conditional="delta", delta=0.1, **QUICK)
    new = infonce_loss(position_model, *data, conditional="delta_normal", delta=0.1, **QUICK)
    assert old == new


def test_two_discrete_labels_are_refused():
    with pytest.raises(ValueError, match="Only 1D discrete indices"):
        sampler_for({}, 9, (INTEGERS, INTEGERS))


def test_parameters_that_are_not_finite_are_an_error(data):
    encoder = Encoder.init(jax.random.key(0), "offset1-model", 7, 4, 3)
    broken = jax.tree.map(lambda x: x * jnp.nan, encoder)
    with pytest.raises(ValueError, match="not finite"):
        infonce_loss(Checkpoint(Model((broken,), Criterion()), {"batch_size": 8}), *data)
