"""Write ``objectives.npz``: losses of the golden hybrid, full-batch and multi-session model.

CEBRA cannot score these itself (or not on given data): its models and criteria are called
directly, on given indices. Needs CEBRA. ``python tests/golden/make_objectives.py``
"""

import warnings
from pathlib import Path

import cebra
import numpy as np
import torch
from cebra.data.datatypes import Batch, BatchIndex
from cebra.integrations.sklearn.dataset import SklearnDataset

FOLDER = Path(__file__).parent
BATCH_SIZE = 16

Losses = list[float]


def windows(model: torch.nn.Module, X: np.ndarray) -> SklearnDataset:
    """A recording that gives the windows of time steps."""
    dataset = SklearnDataset(X, (np.zeros(len(X), np.float32),))  # several need some label
    dataset.configure_for(model)
    return dataset


def _indices(*steps: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(index)).long() for index in steps]


def _losses(estimator: cebra.CEBRA, embedded: Batch) -> Losses:
    """Loss, align and uniform."""
    criterion = estimator.solver_.criterion
    parts = criterion(embedded.reference, embedded.positive, embedded.negative)
    return [part.item() for part in parts]


@torch.no_grad()
def hybrid(
    estimator: cebra.CEBRA,
    X: np.ndarray,
    reference: np.ndarray,
    positive: np.ndarray,
    time_positive: np.ndarray,
    negative: np.ndarray,
) -> list[Losses]:
    """The losses of the behaviour objective, and of that of time."""
    solver = estimator.solver_
    solver.model.eval()
    index = BatchIndex(*_indices(reference, np.concatenate([positive, time_positive]), negative))
    batch = windows(estimator.model_, X).load_batch(index)
    return [_losses(estimator, embedded) for embedded in solver._inference(batch)]


@torch.no_grad()
def full_batch(
    estimator: cebra.CEBRA,
    X: np.ndarray,
    reference: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
) -> Losses:
    """The losses of one full batch of a given recording."""
    solver = estimator.solver_
    solver.model.eval()
    solver.offset = estimator.offset_
    solver.neural = torch.from_numpy(X).float().T[None]
    is_convolutional = isinstance(solver.model, cebra.models.ConvolutionalModelMixin)
    solver._mode = "convolutional" if is_convolutional else "fully_connected"
    index = BatchIndex(*_indices(reference, positive, negative))
    return _losses(estimator, solver._inference(index))


@torch.no_grad()
def joint(
    estimator: cebra.CEBRA,
    Xs: list[np.ndarray],
    reference: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    order: np.ndarray,
) -> Losses:
    """The losses of one batch of all sessions."""
    solver = estimator.solver_
    solver.model.eval()
    sessions = [windows(model, X) for model, X in zip(solver.model, Xs, strict=True)]
    reference, positive, negative = _indices(reference, positive, negative)
    index = BatchIndex(reference, positive, negative, None, np.array(order))
    batches = cebra.data.DatasetCollection(*sessions).load_batch(index)
    return _losses(estimator, solver._inference(batches))


def main() -> None:
    """Draw indices, also at the edges, and write them with their losses."""
    rng = np.random.default_rng(0)
    with np.load(FOLDER / "recording.npz") as data:
        Xs = [data["X"], data["X_1"]]
    load = cebra.CEBRA.load
    arrays = {}

    steps = rng.integers(len(Xs[0]), size=(4, BATCH_SIZE))
    steps[:, :4] = 0, 1, len(Xs[0]) - 2, len(Xs[0]) - 1
    names = ("reference", "positive", "time_positive", "negative")
    arrays |= {f"hybrid.{name}": index for name, index in zip(names, steps, strict=True)}
    arrays["hybrid.losses"] = np.array(hybrid(load(FOLDER / "hybrid.pt"), Xs[0], *steps))

    estimator = load(FOLDER / "full_batch.pt")
    offset, number = estimator.offset_, len(Xs[0])
    reference = np.arange(offset.left, number - len(offset) - 1)
    positive = rng.integers(offset.left, number - offset.right + 1, size=len(reference))
    negative = rng.permutation(reference)
    arrays |= {
        "full_batch.reference": reference,
        "full_batch.positive": positive,
        "full_batch.negative": negative,
        "full_batch.losses": full_batch(estimator, Xs[0], reference, positive, negative),
    }

    reference, positive, negative = (
        np.stack([rng.integers(len(X), size=BATCH_SIZE) for X in Xs]) for _ in range(3)
    )
    order = rng.permutation(2 * BATCH_SIZE)
    arrays |= {
        "joint.reference": reference,
        "joint.positive": positive,
        "joint.negative": negative,
        "joint.order": order,
        "joint.losses": joint(
            load(FOLDER / "multisession.pt"), Xs, reference, positive, negative, order
        ),
    }
    np.savez_compressed(FOLDER / "objectives.npz", **arrays)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
