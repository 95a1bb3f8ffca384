"""The library's own file: one safetensors file of arrays, with the rest as JSON in its header."""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cebra_jax_metrics.checkpoints.cebra import check_kinds
from cebra_jax_metrics.checkpoints.torch_zip import CheckpointError
from cebra_jax_metrics.encoders import Encoder, get_architecture
from cebra_jax_metrics.infonce import SIMILARITIES
from cebra_jax_metrics.model import Checkpoint, Criterion, Model

FORMAT = "cebra_jax_metrics"
VERSION = 1
ABANDONED = 3600  # seconds after which a temporary file is nobody's


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint to one safetensors file, atomically: all of it, or nothing changes.

    That holds for a process that is killed, too, and for several that save to one path: the last
    one wins. A killed one may leave a hidden ``.tmp`` file beside it, which the first save to that
    path after an hour removes.

    Args:
        checkpoint: What ``load``, ``from_cebra`` or ``from_state_dict`` returned.
        path: The file; an existing one is replaced.

    Raises:
        TypeError: It is no checkpoint, or its settings hold what JSON cannot.
        CheckpointError: Its parameters do not fit their architecture (as those of stacked models).
        OSError: The file cannot be written.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(
            f"Expected a Checkpoint, got {type(checkpoint).__name__}; a bare model is saved as "
            "Checkpoint(model)."
        )
    model = checkpoint.model
    arrays: dict[str, Any] = {
        f"encoders.{i}.{name}": value
        for i, encoder in enumerate(model.encoders)
        for name, value in encoder.params.items()
    }
    arrays["criterion.temperature"] = _as_floats(model.criterion.temperature, np.float32)
    arrays["criterion.min_temperature"] = _as_floats(model.criterion.min_temperature, np.float32)
    arrays |= {f"history.{n}": _as_floats(x, np.float64) for n, x in checkpoint.history.items()}
    description = {
        "encoders": [
            {
                "architecture": encoder.architecture,
                "num_neurons": encoder.num_neurons,
                "num_hidden_units": encoder.num_hidden_units,
                "output_dimension": encoder.output_dimension,
                "params": sorted(encoder.params),
            }
            for encoder in model.encoders
        ],
        "criterion": {
            "similarity": model.criterion.similarity,
            "learned": model.criterion.learned,
        },
        "history": sorted(checkpoint.history),
        "settings": dict(checkpoint.settings),
        "metadata": dict(checkpoint.metadata),
    }
    arrays = {name: np.array(value, order="C") for name, value in arrays.items()}
    text = json.dumps(description)
    _checkpoint(json.loads(text), dict(arrays))  # what cannot be loaded is not written
    header = {"format": FORMAT, "version": str(VERSION), "checkpoint": text}
    data = safetensors.numpy.save(arrays, header)
    _write_atomically(Path(path).resolve(), data)


def _as_floats(value: Any, dtype: type) -> np.ndarray:
    """An array of floats, integers as ``dtype``."""
    value = np.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(dtype)


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file beside the file, and rename it: the file is the old or the new one.

    A process that is killed leaves its temporary file. Saving to the same path removes those that
    have not been written to for a while, so that they do not gather.
    """
    mark = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    temporary = path.parent / f".{mark}-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        now = temporary.stat().st_mtime  # by the clock of the file system, which need not be ours
        temporary.replace(path)
    except OSError as error:
        reason = f"Cannot save the checkpoint, nothing was changed ({error.strerror or error})"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    for other in path.parent.glob(f".{mark}-*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it, too
            if now - other.stat().st_mtime > ABANDONED:
                other.unlink()


def read_own_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file that :func:`save` wrote, checking names, shapes and dtypes.

    Raises:
        CheckpointError: Not such a file, a damaged one, or one of a newer version.
        OSError: The file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"Cannot read {str(path)!r}: it is truncated, damaged or no safetensors file ({error})."
        ) from None
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"Cannot use {str(path)!r}: it is a safetensors file, but cebra_jax_metrics.save did "
            "not write it; use from_state_dict for bare parameters."
        )
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"Cannot use {str(path)!r}: its format version is {header.get('version')}, this "
            f"library reads version {VERSION}; upgrade cebra-jax-metrics."
        )
    try:
        return _checkpoint(json.loads(header["checkpoint"]), arrays)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"Cannot use {str(path)!r}: its header is damaged ({error})."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"Cannot use {str(path)!r}: {error}") from None
    except Exception as error:  # whatever a damaged header makes the code below stumble over
        raise CheckpointError(
            f"Cannot use {str(path)!r}: its header is damaged ({type(error).__name__}: {error})."
        ) from error


def _checkpoint(description: Any, arrays: dict[str, np.ndarray]) -> Checkpoint:
    _check_description(description)
    encoders = tuple(
        _encoder(entry, f"encoders.{i}.", arrays) for i, entry in enumerate(description["encoders"])
    )
    if not encoders:
        raise CheckpointError("it holds no encoder.")
    criterion = Criterion(
        similarity=description["criterion"]["similarity"],
        temperature=jnp.asarray(_take(arrays, "criterion.temperature", ())),
        learned=description["criterion"]["learned"],
        min_temperature=jnp.asarray(_take(arrays, "criterion.min_temperature", ())),
    )
    history = {name: _take(arrays, f"history.{name}", None) for name in description["history"]}
    if any(values.ndim != 1 for values in history.values()):
        raise CheckpointError("its training history is not one-dimensional.")
    if arrays:
        raise CheckpointError(f"it holds arrays that belong to nothing: {sorted(arrays)}.")
    return Checkpoint(
        Model(encoders, criterion), description["settings"], history, description["metadata"]
    )


def _check_description(description: Any) -> None:
    """Check the kinds of what the header says; shapes are checked with the arrays."""
    criterion, metadata = description["criterion"], description["metadata"]
    settings = description["settings"]
    sizes = ("num_neurons", "num_hidden_units", "output_dimension")
    problems = {
        "criterion": criterion["similarity"] not in (*SIMILARITIES,)
        or type(criterion["learned"]) is not bool,
        "encoders": any(
            type(entry[n]) is not int for entry in description["encoders"] for n in sizes
        ),
        "settings": type(settings) is not dict or not _are_label_types(settings.get("label_types")),
        "metadata": type(metadata) is not dict
        or any(type(text) is not str for text in metadata.values()),
    }
    wrong = [name for name, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise CheckpointError(f"its header is damaged: {', '.join(wrong)}.")
    check_kinds(settings)


def _are_label_types(value: Any) -> bool:
    """Whether it is a list of kinds of labels, or of lists of them, one per session."""
    if type(value) is not list:
        return value is None
    return all(
        type(one) is dict
        and one.keys() == {"dtype", "shape"}
        and type(one["dtype"]) is str
        and type(one["shape"]) is list
        and all(type(n) is int for n in one["shape"])
        for entry in value
        for one in (entry if type(entry) is list else [entry])
    )


def _encoder(entry: Any, prefix: str, arrays: dict[str, np.ndarray]) -> Encoder:
    sizes = entry["num_neurons"], entry["num_hidden_units"], entry["output_dimension"]
    shapes = get_architecture(entry["architecture"]).shapes(*sizes)
    names = entry["params"] if shapes is None else shapes
    params = {
        name: jnp.asarray(_take(arrays, prefix + name, shapes[name] if shapes else None))
        for name in names
    }
    return Encoder(params, entry["architecture"], *sizes)


def _take(arrays: dict[str, np.ndarray], name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Remove an array from those that were read, checking that it is what it should be."""
    if name not in arrays:
        raise CheckpointError(f"{name} is missing.")
    array = arrays.pop(name)
    if shape is not None and array.shape != tuple(shape):
        raise CheckpointError(f"{name} has shape {array.shape}, not {tuple(shape)}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise CheckpointError(f"{name} is of dtype {array.dtype}, not of floats.")
    return array
