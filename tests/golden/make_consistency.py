"""Write ``consistency/*.npz``: embeddings, labels, and CEBRA's consistency of them. Needs CEBRA.

``python tests/golden/make_consistency.py``
"""

from pathlib import Path

import cebra
import numpy as np

FOLDER = Path(__file__).parent / "consistency"
RNG = np.random.default_rng(0)

Arrays = list[np.ndarray]


def related(rows: int, *widths: int) -> Arrays:
    """Embeddings that share three dimensions, each with noise of its own."""
    shared = RNG.normal(size=(rows, 3))
    return [
        shared @ RNG.normal(size=(3, width)) + RNG.normal(size=(rows, width)) for width in widths
    ]


def recordings(rows: int, *widths: int) -> tuple[Arrays, Arrays]:
    """Embeddings of recordings of different lengths, and the label they all follow."""
    labels = [RNG.uniform(-1, 2, size=rows + 30 * i) for i in range(len(widths))]
    curves = [np.stack([np.sin(k * x) for k in range(1, 5)], axis=1) for x in labels]
    embeddings = [
        curve @ RNG.normal(size=(4, width)) + 0.5 * RNG.normal(size=(len(curve), width))
        for curve, width in zip(curves, widths, strict=True)
    ]
    return embeddings, labels


def with_missing_rows(embeddings: Arrays, labels: Arrays) -> tuple[Arrays, Arrays]:
    """Some time steps NaN, in one column or in all."""
    embeddings[0][3:9] = np.nan
    embeddings[1][10, 0] = np.nan
    return embeddings, labels


def with_column(embedding: np.ndarray, column: np.ndarray | float) -> np.ndarray:
    """The embedding with one more column."""
    return np.insert(embedding, 1, column, axis=1)


def runs() -> dict[str, Arrays]:
    """Cases between runs."""
    one, two, three = related(60, 3, 3, 3)
    return {
        "equal_widths": related(100, 3, 3, 3),
        "different_widths": related(100, 1, 8, 3, 32),
        "independent_noise": [RNG.normal(size=(50, 32)) for _ in range(2)],
        "identical": [one, one.copy(), one.copy()],
        "width_close_to_length": related(20, 18, 15, 3),
        "width_beyond_length": related(12, 18, 3),
        "constant_column": [with_column(one, 0.0), with_column(two, 2.5), three],
        "constant_column_that_rounds": [with_column(one, 0.1), with_column(two, 1 / 3), three],
        "duplicated_columns": [with_column(one, one[:, 0]), with_column(two, 2 * two[:, 2]), three],
        "scales": [one * [1e-3, 1, 1e3], two + 100, three],
    }


def datasets() -> dict[str, tuple]:
    """Cases between datasets: embeddings, labels, ids, and number of bins."""
    return {
        "datasets": (*recordings(400, 3, 3, 3), None, 100),
        "different_datasets": (*recordings(400, 3, 8, 2), ["a", "b", "c"], 20),
        "many_bins": (*recordings(900, 3, 5), [7, 3], 400),
        "sparse_bins": (*recordings(120, 3, 3), None, 90),
        "few_bins": (*recordings(50, 3, 1), None, 6),
        "missing_rows": (*with_missing_rows(*recordings(300, 3, 5)), ["x", "y"], 30),
    }


def save(name: str, embeddings: Arrays, labels: Arrays | None, ids: list | None, bins: int) -> None:
    """Score the case in float64 and in float32, and write it."""
    arrays = {f"embedding_{i}": x for i, x in enumerate(embeddings)}
    options: tuple = ()
    if labels is not None:
        arrays |= {f"label_{i}": x for i, x in enumerate(labels)}
        arrays["num_bins"] = np.array(bins)
        arrays["ids"] = np.arange(len(labels)) if ids is None else np.array(ids)
        options = (ids, bins)
    for dtype in (np.float64, np.float32):
        scores, pairs, found_ids = cebra.sklearn.metrics.consistency_score(
            [x.astype(dtype) for x in embeddings],
            "runs" if labels is None else "datasets",
            None if labels is None else [x.copy() for x in labels],
            *options,
        )
        arrays[f"scores_{np.dtype(dtype).name}"] = np.array(scores)
    arrays |= {"pairs": np.array(pairs), "found_ids": np.array(found_ids)}
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def main() -> None:
    """Make all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, embeddings in runs().items():
        save(name, embeddings, None, None, 100)
    for name, case in datasets().items():
        save(name, *case)


if __name__ == "__main__":
    main()
