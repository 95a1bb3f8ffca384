"""All architectures with random parameters: the same embedding as CEBRA, and the way back."""

import subprocess
import sys

import cebra
import cebra.solver.base
import numpy as np
import pytest
import torch

import cebra_jax_metrics as cjm

from . import peer

NAMES = cebra.CEBRA.supported_model_architectures()
UNITS, OUTPUTS = 6, 3


def transform(model, X, pad):
    with torch.no_grad():
        return cebra.solver.base._not_batched_transform(
            model, torch.from_numpy(X), pad, model.get_offset()
        ).numpy()


def random_model(name, neurons, X):
    """A model whose outputs vary: CEBRA's own initial ones of deep models are almost constant."""
    model = cebra.models.init(name, num_neurons=neurons, num_units=UNITS, num_output=OUTPUTS).eval()
    layers = [x for x in model.modules() if isinstance(x, torch.nn.Linear | torch.nn.Conv1d)]
    with torch.no_grad():
        for layer in layers:
            torch.nn.init.orthogonal_(layer.weight, 1.5)
            torch.nn.init.normal_(layer.bias, 0, 0.5)
        # Outputs of mean 0 and SD 1; of mean 1 and SD 4 where they are clipped, to clip some.
        mean, scale = (1, 4) if "clip" in name else (0, 1)
        outputs = []
        hook = layers[-1].register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
        transform(model, X, pad=True)
        hook.remove()
        steps = (0, 2) if outputs[0].ndim == 3 else 0
        scale = scale / outputs[0].std(dim=steps)
        layers[-1].bias.sub_(outputs[0].mean(dim=steps)).mul_(scale).add_(mean)
        layers[-1].weight.mul_(scale.reshape(-1, *[1] * (layers[-1].weight.ndim - 1)))
    return model


# Fewer neurons than units: the resnet models' shortcuts are padded; more: they are cropped.
CASES = [(name, 4) for name in NAMES] + [(name, 9) for name in NAMES if "resnet" in name]


@pytest.mark.parametrize(("name", "neurons"), CASES)
def test_embedding_and_state_dict(name, neurons):
    peer.seed(NAMES.index(name))
    X = np.random.default_rng(0).normal(size=(80, neurons)).astype(np.float32)
    model = random_model(name, neurons, X)
    settings = {"num_hidden_units": UNITS, "output_dimension": OUTPUTS}
    ours = cjm.from_state_dict(model.state_dict(), model_architecture=name, **settings)
    for pad in (True, False):
        expected = transform(model, X, pad)
        assert expected.std(axis=0).min() > 0.1
        embedding = cjm.embed(ours, X, pad=pad)
        assert embedding.shape == expected.shape
        assert embedding.dtype == np.float32
        tolerance = 1e-5 * (1 + np.abs(expected).max())
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=tolerance)
    back = {key: torch.from_numpy(value) for key, value in cjm.to_state_dict(ours).items()}
    original = model.state_dict()
    assert set(back) == set(original)
    assert all(torch.equal(back[key], original[key]) for key in original)
    fresh = cebra.models.init(name, num_neurons=neurons, num_units=UNITS, num_output=OUTPUTS)
    fresh.load_state_dict(back, strict=True)


SUPERVISED = {"supervised1-model", "supervised10-model"}


def test_the_names_are_those_of_cebra():
    assert len(NAMES) == 139
    assert set(NAMES) <= set(cjm.architecture_names())
    script = "import cebra_jax_metrics as cjm; print(*cjm.architecture_names())"
    unregistered = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    # Those that subsample are not reachable through the estimator (see test_objectives.py).
    assert set(unregistered.stdout.split()) == set(cebra.models.get_options()) - SUPERVISED


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_other_models_of_cebra_are_refused(name):
    with pytest.raises(ValueError, match="cannot be used here"):
        cjm.from_state_dict({}, model_architecture=name)


@pytest.mark.parametrize("name", ["offset1-model-mse-v2-3layers", "offset5-model"])
def test_state_dict_of_several_sessions(name):
    peer.seed(0)
    sizes = {"num_units": UNITS, "num_output": OUTPUTS}
    models = torch.nn.ModuleList(
        cebra.models.init(name, num_neurons=neurons, **sizes) for neurons in (4, 9)
    ).eval()
    original = models.state_dict()
    settings = {"num_hidden_units": UNITS, "output_dimension": OUTPUTS}
    ours = cjm.from_state_dict(original, model_architecture=name, **settings)
    for session, neurons in enumerate((4, 9)):
        X = np.random.default_rng(session).normal(size=(30, neurons)).astype(np.float32)
        expected = transform(models[session], X, pad=True)
        embedding = cjm.embed(ours, X, session_id=session)
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=2e-5)
    back = {key: torch.from_numpy(value) for key, value in cjm.to_state_dict(ours).items()}
    assert all(torch.equal(back[key], original[key]) for key in original)
    models.load_state_dict(back, strict=True)
