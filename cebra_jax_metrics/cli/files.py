"""Recordings and labels from .npz, .npy and .csv files, by name or because they alone fit."""

import argparse
import csv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cebra_jax_metrics.arrays import check_finite
from cebra_jax_metrics.model import Checkpoint, select_encoder

Arrays = dict[str, np.ndarray]
# Spikes compress well, bombs a thousandfold: what is beyond both of these is not unpacked.
MOST_BYTES, MOST_TIMES = 2**30, 300


class Recording:
    """The arrays of a file, of which one is the recording and others may be labels.

    Args:
        path: An .npz file, whose arrays have names; an .npy file of one array; or a .csv file of
            numbers, where a first line that holds no number names the columns. Named columns are
            arrays as well, and those that are no labels make up the recording.

    Raises:
        OSError: There is no such file.
        ValueError: It cannot be read as what its name says.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.columns: Arrays = {}
        suffix = Path(path).suffix.lower()
        if suffix == ".csv":
            self.arrays, self.columns = _read_csv(path)
        elif suffix == ".npy":
            self.arrays = {Path(path).stem: read_npy(path)}
        else:
            self.arrays = _read_npz(path)

    def of_model(
        self, checkpoint: Checkpoint, arguments: argparse.Namespace
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The recording and the labels that a model takes, of the rows asked for.

        Args:
            checkpoint: The model.
            arguments: Those of the command: ``data_name``, ``labels``, ``session``, ``rows``.
        """
        neurons = select_encoder(checkpoint, arguments.session).num_neurons

        def fits(x: np.ndarray) -> bool:
            return x.ndim == 2 and x.shape[1] == neurons

        return self._chosen(arguments, fits, f"recording with {neurons} neurons", checkpoint)

    def of_training(self, arguments: argparse.Namespace) -> tuple[np.ndarray, list[np.ndarray]]:
        """The recording and the labels to train on, of the rows asked for."""
        arguments.labels = arguments.labels or []
        return self._chosen(arguments, lambda x: x.ndim == 2, "recording", None)

    def _chosen(
        self,
        arguments: argparse.Namespace,
        fits: Callable[[np.ndarray], bool],
        what: str,
        checkpoint: Checkpoint | None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        arrays = self.arrays
        named = arguments.labels or []
        rest = [x for name, x in self.columns.items() if name not in ",".join(named).split(",")]
        if rest and len(rest) < len(self.columns):
            arrays = {Path(self.path).stem: np.stack(rest, axis=1)}
        candidates = [name for name, x in arrays.items() if fits(x) and name not in named]
        name = arguments.data_name or _only(candidates, what, "--data", arrays)
        X = _with_rows(arrays, name)
        if X.ndim != 2:
            raise ValueError(
                f"The recording {name!r} has to be of shape (time, neurons), got {X.shape}."
            )
        if arguments.labels is not None:
            labels = [self._named(label) for label in arguments.labels]
        else:
            assert checkpoint is not None  # noqa: S101 (of_training names its labels)
            labels = self._fitting(checkpoint, name, X, arguments.session)
        rows = arguments.rows or slice(None)
        for array, kind in ((X, f"the recording {name!r}"), *((y, "the labels") for y in labels)):
            check_finite(array[rows], kind, rows.indices(len(array))[0])
        return X[rows], [label[rows] for label in labels]

    def _named(self, name: str) -> np.ndarray:
        """Labels by the name of an array, of several put side by side, or of a file."""
        arrays = self.arrays | self.columns
        if name not in arrays and all(part in arrays for part in name.split(",")):
            return np.column_stack([_with_rows(arrays, part) for part in name.split(",")])
        if name not in arrays and Path(name).suffix.lower() in (".npy", ".csv"):
            (only,) = Recording(name).arrays.values()
            return only[:, 0] if Path(name).suffix == ".csv" and only.shape[1] == 1 else only
        return _with_rows(arrays, name)

    def _fitting(
        self, checkpoint: Checkpoint, data_name: str, X: np.ndarray, session: int | None
    ) -> list[np.ndarray]:
        """Labels of the kinds that the model was fitted with."""
        candidates = {
            n: x
            for n, x in self.arrays.items()
            if n != data_name and x.ndim in (1, 2) and len(x) == len(X) and x.dtype.kind in "iuf"
        }
        fitted = checkpoint.settings.get("label_types")
        if fitted is None:
            raise ValueError(
                "The checkpoint does not say what labels it needs: name them (--labels)."
            )
        labels = []
        for entry in fitted:
            entry = entry[session or 0] if isinstance(entry, list) else entry
            fits = [n for n, x in candidates.items() if _kind(x.dtype, x.shape) == _kind(**entry)]
            what = f"{entry['dtype']} labels like {entry['shape']}"
            labels.append(candidates.pop(_only(fits, what, "--labels", self.arrays)))
        return labels


def is_recording(path: str) -> bool:
    """Whether a file is one of arrays, by its name."""
    return Path(path).suffix.lower() in (".npz", ".npy", ".csv")


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of files without folder and ending, if that tells them apart."""
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names)]
    return names


def read_npy(path: str) -> np.ndarray:
    """The array of a file, unless it holds pickled objects."""
    with Path(path).open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # whatever NumPy stumbles over in a damaged file
            raise ValueError(
                f"Cannot read {path!r}: expected an .npy file, as numpy.save writes ({error})."
            ) from error


def _read_npz(path: str) -> Arrays:
    with Path(path).open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(
                f"Cannot read {path!r}: expected an .npz file, as numpy.savez writes (or .npy, "
                ".csv, by its name)."
            )
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > max(MOST_BYTES, MOST_TIMES * Path(path).stat().st_size):
                raise ValueError(
                    f"it would take {unpacked / 2**30:.1f} GiB, over {MOST_TIMES} times its size: "
                    "if it is what you trust it to be, save it again with numpy.savez"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as data:
                arrays = dict(_readable(data))
            if not arrays:
                raise ValueError("it holds no arrays of numbers")
            return arrays
        except Exception as error:  # whatever NumPy stumbles over in a damaged file
            raise ValueError(f"Cannot read {path!r} as an .npz file ({error}).") from error


def _readable(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a file without those of pickled objects, which are never loaded."""
    for name in data.files:
        try:
            array = data[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            continue
        if isinstance(array, np.ndarray):  # else a member that is no array at all
            yield name, array


def _read_csv(path: str) -> tuple[Arrays, Arrays]:
    """The table of a file, and its columns by their names."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Cannot read {path!r} as a .csv file ({error}).") from error
    names = [] if not lines or any(map(_is_number, lines[0])) else lines.pop(0)
    widths = {len(line) for line in [names, *lines] if line}
    if not lines or len(widths) > 1 or len(set(names)) < len(names):
        raise ValueError(
            f"Cannot read {path!r} as a .csv file: expected lines of equally many numbers, and "
            "above them names that differ, or none."
        )
    columns = [
        _as_numbers(column, path, number) for number, column in enumerate(zip(*lines, strict=True))
    ]
    table = {Path(path).stem: np.stack(columns, axis=1)}
    return table, dict(zip(names, columns, strict=True)) if names else {}


def _as_numbers(column: Sequence[str], path: str, number: int) -> np.ndarray:
    for dtype in (np.int64, np.float64):
        try:
            return np.array(column).astype(dtype)
        except (ValueError, OverflowError):
            continue
    wrong = next(text for text in column if not _is_number(text))
    raise ValueError(f"Expected numbers in {path!r}, got {wrong!r} in column {number + 1}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(dtype: Any, shape: Sequence[int]) -> tuple[bool, int]:
    """Whether labels are continuous, and their width."""
    return "float" in str(dtype), int(shape[1]) if len(shape) > 1 else 1


def _with_rows(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"There is no array {name!r} in the file; it has {_listed(arrays)}.")
    if not arrays[name].ndim:
        raise ValueError(f"The array {name!r} is a single value.")
    return arrays[name]


def _only(names: list[str], what: str, option: str, arrays: Arrays) -> str:
    if len(names) != 1:
        found = "no" if not names else "more than one"
        raise ValueError(
            f"Found {found} array for the {what}: choose with {option}; the file has "
            f"{_listed(arrays)}."
        )
    return names[0]


def _listed(arrays: Arrays) -> str:
    return ", ".join(f"{name} {x.dtype}{x.shape}" for name, x in arrays.items())
