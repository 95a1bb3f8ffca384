"""Make the golden files: what the real CEBRA computes on a small simulated recording.

Run it with the `parity` extra installed (it brings cebra and torch):

    python tests/golden/make_golden.py

Everything is written next to this script, and a second run writes the same numbers:

- `recording.npz`: the recording all cases share. `X`, `position` (continuous labels) and
  `direction` (discrete labels); `X_1` and `position_1` are the second session of the
  multi-session case.
- `<case>.pt`: a CEBRA estimator, fitted for a few steps and saved by its own `save`.
- `<case>.npz`: `embedding` (its `transform`); `reference`, `positive`, `negative` (indices of one
  batch); `loss`, `align`, `uniform` (its criterion on the windows at these indices, in eval mode);
  `grad.<name>` (gradient of `loss`, under torch's parameter names; tied weights appear once). In
  the multi-session case each session is scored alone, by its own encoder: the session is the
  suffix of a key (`loss.0`) and the prefix of a parameter (`grad.0.net.0.weight`).
- `cebra_versions.json`: the versions that made them.
"""

import json
import math
import platform
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cebra
import numpy as np
import torch
from cebra.distributions.base import HasGenerator
from cebra.integrations.sklearn.dataset import SklearnDataset

FOLDER = Path(__file__).resolve().parent
BATCH_SIZE = 24  # of the golden batch; the fits use their own
FITTING = {
    "max_iterations": 3,
    "batch_size": 16,
    "num_hidden_units": 6,
    "output_dimension": 3,
    "device": "cpu",
    "verbose": False,
}

Arrays = dict[str, np.ndarray]


def _stretch_outputs(estimator: cebra.CEBRA, recording: Arrays) -> None:
    """Give every output mean 1 and SD 4 by its last layer: a clip to [-1, 5] bites twice."""
    net = estimator.model_.net
    with torch.no_grad():
        outputs = net(torch.from_numpy(recording["X"]))
        scale = 4 / outputs.std(dim=0)
        net[-2].weight.mul_(scale[:, None])
        net[-2].bias.sub_(outputs.mean(dim=0)).mul_(scale).add_(1)


def _cool_below_minimum(estimator: cebra.CEBRA, recording: Arrays) -> None:
    """Set the learned temperature to half the minimum, so that the criterion clamps it."""
    with torch.no_grad():
        inverse_temperature = 2 / estimator.min_temperature
        estimator.solver_.criterion.log_inverse_temperature.fill_(math.log(inverse_temperature))


@dataclass(frozen=True)
class Case:
    """One fit: constructor arguments, names of its labels, and an edit made before it is saved."""

    settings: dict[str, Any]
    labels: tuple[str, ...] = ("position",)
    edit: Callable[[cebra.CEBRA, Arrays], None] | None = None
    scored: bool = True
    multisession: bool = False


def _case(architecture: str, criterion: dict[str, Any], **settings: Any) -> Case:
    return Case({"model_architecture": architecture, **criterion, **settings})


def _criterion(distance: str, mode: str, temperature: float, **settings: Any) -> dict[str, Any]:
    return {
        "distance": distance,
        "temperature_mode": mode,
        "temperature": temperature,
        **settings,
    }


COSINE = _criterion("cosine", "constant", 1.0)
COSINE_AUTO = _criterion("cosine", "auto", 0.7, min_temperature=0.1)
EUCLIDEAN = _criterion("euclidean", "constant", 1.0)
EUCLIDEAN_AUTO = _criterion("euclidean", "auto", 1.5)  # CEBRA's default minimum temperature

ARCHITECTURES = {
    "offset1-model": COSINE,
    "offset1-model-v2": COSINE_AUTO,
    "offset1-model-v3": EUCLIDEAN,
    "offset1-model-v4": EUCLIDEAN_AUTO,
    "offset1-model-v5": COSINE,
    "offset1-model-mse-v2-3layers": COSINE,
    "offset1-model-mse-v2-2layers-tanh": EUCLIDEAN,
    "offset1-model-mse-resnet-3layers": EUCLIDEAN_AUTO,
    "offset5-model": COSINE_AUTO,
    "offset10-model": COSINE,
    "offset10-model-mse": EUCLIDEAN,
    "offset10-model-mse-tanh": COSINE_AUTO,
    "offset15-model": COSINE_AUTO,
    "offset20-model": EUCLIDEAN_AUTO,
}
WIDE_ARCHITECTURES = {  # their hidden layers have 30 units per output: few outputs, small files
    "offset1-model-mse": EUCLIDEAN,
    "offset1-model-mse-tanh": EUCLIDEAN_AUTO,
}
LONG_ARCHITECTURES = {
    "offset36-model": COSINE,
    "offset36-model-dropout": COSINE_AUTO,
    "offset36-model-more-dropout": COSINE,
    "offset40-model": EUCLIDEAN,
    "offset50-model": COSINE_AUTO,
}
CLIPPED = "offset1-model-mse-clip-1-5"
WIDENING = "offset1-model-mse-resnet-1layers-tanh"  # more units than neurons: padded skip

CASES = {
    **{name: _case(name, criterion) for name, criterion in ARCHITECTURES.items()},
    **{
        name: _case(name, criterion, output_dimension=2)
        for name, criterion in WIDE_ARCHITECTURES.items()
    },
    **{
        name: _case(name, criterion, num_hidden_units=4)
        for name, criterion in LONG_ARCHITECTURES.items()
    },
    WIDENING: _case(WIDENING, EUCLIDEAN, num_hidden_units=10),
    CLIPPED: Case(
        {"model_architecture": CLIPPED, **EUCLIDEAN, "output_dimension": 2}, edit=_stretch_outputs
    ),
    "criterion_cosine_constant": _case("offset10-model", _criterion("cosine", "constant", 0.5)),
    "criterion_cosine_auto": Case(
        {
            "model_architecture": "offset10-model",
            **_criterion("cosine", "auto", 0.5, min_temperature=0.4),
        },
        edit=_cool_below_minimum,
    ),
    "criterion_euclidean_constant": _case(
        "offset10-model-mse", _criterion("euclidean", "constant", 2.0)
    ),
    "criterion_euclidean_auto": _case(
        "offset10-model-mse", _criterion("euclidean", "auto", 2.0, min_temperature=0.4)
    ),
    "no_padding": _case("offset10-model", COSINE, pad_before_transform=False),
    "discrete": Case({"model_architecture": "offset10-model", **COSINE}, ("direction",)),
    "mixed": Case({"model_architecture": "offset10-model", **COSINE}, ("position", "direction")),
    "time": Case({"model_architecture": "offset10-model", **COSINE}, ()),
    "multisession": Case(
        {"model_architecture": "offset10-model", **_criterion("cosine", "constant", 0.5)},
        multisession=True,
    ),
    "hybrid": Case(
        {
            "model_architecture": "offset10-model",
            **COSINE,
            "hybrid": True,
            "output_dimension": 4,
            "time_offsets": 2,
        },
        scored=False,
    ),
    "full_batch": Case(
        {"model_architecture": "offset10-model", **COSINE, "batch_size": None}, scored=False
    ),
}


def simulate_session(
    rng: np.random.Generator, num_steps: int, num_neurons: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neurons tuned to a slow path in the plane, with noise: `(steps, neurons)`, `(steps, 2)`.

    Activity is of the order of 10: with less, the barely trained MLPs without normalisation give
    almost constant outputs, and their losses and gradients would tell a wrong encoder from a right
    one no better than rounding does.
    """
    turns = np.linspace(0, 2 * np.pi, num_steps)[:, None]
    position = np.sin(turns * rng.uniform(1, 3, 2) + rng.uniform(0, 2 * np.pi, 2))
    tuning = 2 * rng.normal(size=(2, num_neurons))
    rates = np.cos(position @ tuning + rng.uniform(0, 2 * np.pi, num_neurons))
    X = 10 * rates + 3 * rng.normal(size=rates.shape)
    return X.astype(np.float32), position.astype(np.float32)


def simulate_recording() -> Arrays:
    """Two sessions of different length and neuron count; only the first has discrete labels."""
    rng = np.random.default_rng(0)
    X, position = simulate_session(rng, num_steps=120, num_neurons=7)
    X_1, position_1 = simulate_session(rng, num_steps=100, num_neurons=5)
    direction = (np.gradient(position[:, 0]) > 0).astype(np.int64)
    return {
        "X": X,
        "position": position,
        "direction": direction,
        "X_1": X_1,
        "position_1": position_1,
    }


def _seed_everything(seed: int) -> None:
    """Seed both global generators: CEBRA draws weights from torch and some samples from NumPy."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator CEBRA itself uses)


def _repeatable_sampling() -> AbstractContextManager[object]:
    """Patch CEBRA's samplers, which seed themselves from the system, to seed from torch instead."""
    original = HasGenerator.__init__

    def seeded(self: HasGenerator, device: str, seed: int | None) -> None:
        original(self, device=device, seed=seed)
        self.generator.manual_seed(int(torch.randint(2**31, ())))

    return mock.patch.object(HasGenerator, "__init__", seeded)


def fit(case: Case, recording: Arrays) -> cebra.CEBRA:
    """Fit one estimator, to one session or to both."""
    estimator = cebra.CEBRA(**{**FITTING, **case.settings})
    if case.multisession:
        sessions = [recording["X"], recording["X_1"]]
        return estimator.fit(sessions, [recording["position"], recording["position_1"]])
    return estimator.fit(recording["X"], *(recording[label] for label in case.labels))


def draw_batch(rng: np.random.Generator, num_steps: int) -> Arrays:
    """Indices of one batch; the first four of each kind sit at the edges of the recording."""
    batch = {}
    for kind in ("reference", "positive", "negative"):
        batch[kind] = rng.integers(num_steps, size=BATCH_SIZE, dtype=np.int32)
        batch[kind][:4] = 0, 1, num_steps - 1, num_steps - 2
    return batch


def score(
    model: torch.nn.Module, criterion: torch.nn.Module, X: np.ndarray, batch: Arrays
) -> Arrays:
    """CEBRA's loss on the windows of a batch, its two parts, and its gradients."""
    dataset = SklearnDataset(X, ())
    dataset.configure_for(model)
    model.eval()
    windows = (dataset[torch.from_numpy(index).long()] for index in batch.values())
    loss, align, uniform = criterion(*map(model, windows))
    parameters = dict(model.named_parameters()) | dict(criterion.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    values = {"loss": loss, "align": align, "uniform": uniform}
    values |= {f"grad.{name}": grad for name, grad in zip(parameters, gradients, strict=True)}
    return {name: value.detach().numpy() for name, value in values.items()}


def evaluate(estimator: cebra.CEBRA, case: Case, X: np.ndarray, rng: np.random.Generator) -> Arrays:
    """The golden arrays of a case with one session."""
    arrays = {"embedding": estimator.transform(X)}
    if case.scored:
        batch = draw_batch(rng, len(X))
        arrays |= batch | score(estimator.model_, estimator.solver_.criterion, X, batch)
    return arrays


def evaluate_sessions(
    estimator: cebra.CEBRA, recordings: list[np.ndarray], rng: np.random.Generator
) -> Arrays:
    """The golden arrays of a multi-session case."""
    arrays = {}
    for session, X in enumerate(recordings):
        batch = draw_batch(rng, len(X))
        scores = score(estimator.model_[session], estimator.solver_.criterion, X, batch)
        embedding = estimator.transform(X, session_id=session)
        for key, array in {"embedding": embedding, **batch, **scores}.items():
            arrays[_session_key(key, session)] = array
    return arrays


def _session_key(key: str, session: int) -> str:
    kind, _, parameter = key.partition(".")
    return f"{kind}.{session}.{parameter}" if parameter else f"{kind}.{session}"


def make_case(name: str, case: Case, recording: Arrays) -> None:
    """Fit, save and score one case."""
    seed = zlib.crc32(name.encode())
    _seed_everything(seed)
    rng = np.random.default_rng(seed)
    estimator = fit(case, recording)
    if case.edit is not None:
        case.edit(estimator, recording)
    estimator.save(str(FOLDER / f"{name}.pt"))
    if case.multisession:
        arrays = evaluate_sessions(estimator, [recording["X"], recording["X_1"]], rng)
    else:
        arrays = evaluate(estimator, case, recording["X"], rng)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def write_versions() -> None:
    """Record the versions that made the golden files."""
    versions = {
        "cebra": cebra.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    (FOLDER / "cebra_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def main() -> None:
    """Make all golden files."""
    torch.set_num_threads(1)
    recording = simulate_recording()
    np.savez_compressed(FOLDER / "recording.npz", **recording)
    with warnings.catch_warnings(), _repeatable_sampling():
        warnings.simplefilter("ignore")
        for name, case in CASES.items():
            make_case(name, case, recording)
    write_versions()


if __name__ == "__main__":
    main()
