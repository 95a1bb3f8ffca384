"""Estimators and their files, imported; and that neither import nor scoring changes them."""

import copy
import io
import subprocess
import sys
from typing import NamedTuple

import cebra
import jax
import numpy as np
import pytest
import sklearn
import torch
from sklearn.exceptions import NotFittedError

import cebra_jax_metrics as cjm

from . import peer

pytestmark = pytest.mark.filterwarnings("ignore:MultiobjectiveSolver:DeprecationWarning")

FIRST = peer.simulate(3, num_steps=120, num_neurons=5)
SECOND = peer.simulate(4, num_steps=100, num_neurons=7)
X, POSITION, DIRECTION = FIRST.X, FIRST.position, FIRST.direction


class Fitted(NamedTuple):
    """An estimator with one recording (of several sessions the first) that it was fitted to."""

    estimator: cebra.CEBRA
    X: np.ndarray
    labels: tuple
    session_id: int | None = None
    is_scored: bool = True


def fit(*labels, is_scored=True, **settings):
    return Fitted(peer.fit(X, *labels, **settings), X, labels, is_scored=is_scored)


def fit_sessions(name, **settings):
    labels = [getattr(session, name) for session in (FIRST, SECOND)]
    estimator = peer.fit([FIRST.X, SECOND.X], labels, **settings)
    return Fitted(estimator, FIRST.X, (labels[0],), session_id=0)


def adapt():
    estimator = peer.fit(X, POSITION, max_adapt_iterations=3)
    estimator.fit(SECOND.X, SECOND.position, adapt=True)
    return Fitted(estimator, SECOND.X, (SECOND.position,))


def continue_fitting():
    fitted = fit(POSITION)
    return fitted._replace(estimator=fitted.estimator.partial_fit(X, POSITION))


FITS = {
    "time": lambda: fit(time_offsets=3, conditional="time"),
    "continuous": lambda: fit(POSITION, FIRST.height.astype(np.float64)),
    "continuous, float16": lambda: fit(POSITION.astype(np.float16)),
    "discrete": lambda: fit(DIRECTION),
    "discrete, uint8": lambda: fit(DIRECTION.astype(np.uint8)),
    "discrete, one column": lambda: fit(DIRECTION[:, None]),
    "mixed": lambda: fit(DIRECTION, POSITION),
    "delta_normal": lambda: fit(POSITION, conditional="delta_normal", delta=0.2),
    "learned temperature": lambda: fit(
        POSITION, temperature_mode="auto", temperature=0.5, min_temperature=None
    ),
    "learned temperature at its minimum": lambda: fit(
        POSITION, temperature_mode="auto", min_temperature=2.0, distance="euclidean"
    ),
    "hybrid": lambda: fit(POSITION, hybrid=True, output_dimension=4, is_scored=False),
    "full batch": lambda: fit(POSITION, batch_size=None, is_scored=False),
    "several sessions": lambda: fit_sessions("position"),
    "several sessions, discrete": lambda: fit_sessions("direction"),
    "several sessions, learned temperature": lambda: fit_sessions(
        "height", temperature_mode="auto"
    ),
    "torch labels": lambda: fit(torch.from_numpy(POSITION), torch.from_numpy(DIRECTION)),
    "adapted": adapt,
    "continued": continue_fitting,
    "tied weights, no padding": lambda: fit(
        POSITION,
        model_architecture="offset1-model-mse-resnet-3layers-tanh",
        pad_before_transform=False,
    ),
    "NumPy settings": lambda: fit(
        POSITION, temperature=np.float64(0.7), min_temperature=np.float32(0.2)
    ),
    "NumPy sizes": lambda: fit(
        batch_size=np.int64(16), num_hidden_units=np.int64(6), output_dimension=np.int32(4)
    ),
    "settings in lists": lambda: fit(time_offsets=[2], optimizer_kwargs=[["eps", 1e-6]]),
    "masked": lambda: fit(POSITION, masking_kwargs=(("RandomNeuronMask", 0.3),)),
}


@pytest.fixture(scope="module", params=FITS)
def fitted(request):
    return FITS[request.param]()


def assert_equal_checkpoints(left, right):
    assert jax.tree.structure(left.model) == jax.tree.structure(right.model)
    jax.tree.map(np.testing.assert_array_equal, left.model, right.model)
    assert left.settings == right.settings
    assert set(left.history) == set(right.history)
    for name in left.history:
        np.testing.assert_array_equal(left.history[name], right.history[name])


def test_the_estimator_and_its_file_are_one_checkpoint(fitted, tmp_path):
    path = tmp_path / "cebra.pt"
    fitted.estimator.save(path)
    imported, loaded = cjm.from_cebra(fitted.estimator), cjm.load(path)
    assert_equal_checkpoints(imported, loaded)
    assert imported.metadata["cebra_version"] == cebra.__version__
    assert loaded.metadata == {
        "backend": "sklearn",
        "cebra_version": cebra.__version__,
        "torch_version": str(torch.__version__),
        "numpy_version": np.__version__,
        "sklearn_version": sklearn.__version__,
    }
    cjm.save(imported, tmp_path / "own.safetensors")
    assert_equal_checkpoints(cjm.load(tmp_path / "own.safetensors"), imported)


def as_lists(value):
    """Nested tuples as lists, as JSON holds them."""
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def test_what_is_imported_is_what_cebra_fitted(fitted):
    estimator, session_id = fitted.estimator, fitted.session_id
    imported = cjm.from_cebra(estimator)
    for name, value in estimator.get_params().items():
        assert imported.settings[name] == as_lists(value)
    assert imported.settings["num_sessions"] == estimator.num_sessions
    state = estimator.state_dict_
    total = state["log"]["total"] or state["loss"]
    np.testing.assert_allclose(imported.history["total"], total, rtol=1e-6)
    for name in ("pos", "neg", "temperature"):
        np.testing.assert_allclose(imported.history.get(name, []), state["log"][name], rtol=1e-6)
    temperature = imported.model.criterion.effective_temperature
    assert float(temperature) == pytest.approx(float(estimator.solver_.criterion.temperature))
    np.testing.assert_allclose(
        cjm.embed(imported, fitted.X, session_id),
        estimator.transform(fitted.X, session_id=session_id),
        rtol=0,
        atol=2e-5,
    )


def everything(estimator):
    """The whole estimator as bytes: attributes, parameters, optimiser, logs, training mode."""
    buffer = io.BytesIO()
    torch.save(estimator, buffer)
    return buffer.getvalue()


def test_estimators_and_data_stay_as_they_are(fitted):
    estimator, recording, labels, session_id, is_scored = fitted
    estimator.model_.train()  # so that a change to evaluation would show
    before, attributes = everything(estimator), dict(vars(estimator))
    inputs = copy.deepcopy((recording, labels))
    cjm.from_cebra(estimator)
    if is_scored:
        for score in (cjm.infonce_loss, cjm.goodness_of_fit_score):
            result = score(estimator, recording, *labels, session_id=session_id, num_batches=2)
            assert np.isfinite(result)
        cjm.goodness_of_fit_history(estimator)
        cjm.infonce_to_goodness_of_fit(1.0, estimator)
    assert everything(estimator) == before
    assert vars(estimator).keys() == attributes.keys()
    assert all(vars(estimator)[key] is attributes[key] for key in attributes)
    for now, then in zip([recording, *labels], [inputs[0], *inputs[1]], strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("kind", ["tensor", "tensor with grad", "list", "float64", "float16"])
def test_the_kind_of_array_makes_no_difference(kind):
    checkpoint = cjm.from_cebra(peer.fit(X, POSITION))
    coarse = X.astype(np.float16).astype(np.float32)
    convert = {
        "tensor": torch.from_numpy,
        "tensor with grad": lambda x: torch.from_numpy(x).requires_grad_(),
        "list": np.ndarray.tolist,
        "float64": lambda x: x.astype(np.float64),
        "float16": lambda x: x.astype(np.float16),
    }[kind]
    np.testing.assert_array_equal(
        cjm.embed(checkpoint, convert(coarse)), cjm.embed(checkpoint, coarse)
    )
    losses = [
        cjm.infonce_loss(checkpoint, recording, labels, num_batches=2)
        for recording, labels in (
            (coarse, POSITION),
            (convert(coarse), POSITION if kind in ("list", "float16") else convert(POSITION)),
        )
    ]
    assert losses[0] == losses[1]


def test_unfitted_estimators_are_refused():
    with pytest.raises(NotFittedError):
        cjm.from_cebra(cebra.CEBRA())


def test_a_file_is_loaded_and_scored_without_torch_and_cebra(tmp_path):
    peer.fit(X, POSITION).save(tmp_path / "cebra.pt")
    np.savez(tmp_path / "recording.npz", X=X, y=POSITION)
    script = """
import sys, numpy as np, cebra_jax_metrics as cjm
data = np.load("recording.npz")
checkpoint = cjm.load("cebra.pt")
cjm.goodness_of_fit_score(checkpoint, data["X"], data["y"], num_batches=2)
cjm.embed(checkpoint, data["X"])
print(sorted({"torch", "cebra"} & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
