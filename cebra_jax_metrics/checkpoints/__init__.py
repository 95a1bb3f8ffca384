"""Checkpoints in and out: CEBRA's estimators and files, and the library's own file."""

import os
from pathlib import Path

from cebra_jax_metrics.checkpoints.cebra import (
    from_cebra,
    from_state_dict,
    import_once,
    read_cebra_file,
    to_state_dict,
)
from cebra_jax_metrics.checkpoints.store import read_own_file, save
from cebra_jax_metrics.checkpoints.torch_zip import CheckpointError
from cebra_jax_metrics.model import Checkpoint

__all__ = [
    "CheckpointError",
    "from_cebra",
    "from_state_dict",
    "import_once",
    "load",
    "save",
    "to_state_dict",
]


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint from a file of ``cebra.CEBRA.save``, or of :func:`save`.

    Needs neither torch nor CEBRA, and executes nothing that the file asks for.

    Args:
        path: The file.

    Returns:
        Model, settings, training history and metadata.

    Raises:
        CheckpointError: (a ``ValueError``) The file is truncated, damaged, of another kind, or asks
            for anything but data; or its parameters do not fit its architecture.
        ValueError: The architecture is unknown here.
        OSError: The file does not exist or cannot be read.
    """
    with Path(path).open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        return read_cebra_file(path)
    if head[8:] == b"{":
        return read_own_file(path)
    raise CheckpointError(
        f"Cannot read {str(path)!r}: neither a file of cebra.CEBRA.save (a zip file) nor of "
        "cebra_jax_metrics.save (a safetensors file)."
    )
