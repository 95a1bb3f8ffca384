"""Arrays that come from users: NumPy, JAX, torch (also with grad) and lists."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike


def is_traced(*arrays: object) -> bool:
    """Whether any of the arrays is traced by JAX, so that its values are not known."""
    return any(isinstance(x, jax.core.Tracer) for x in arrays)


def as_numpy(x: Any) -> np.ndarray:
    """Any array-like as NumPy, without copying where possible; torch tensors leave autograd."""
    if hasattr(x, "detach") and hasattr(x, "cpu"):
        x = x.detach().cpu()
        if not hasattr(np, str(x.dtype).removeprefix("torch.")):  # bfloat16
            x = x.float()
        x = x.resolve_conj().numpy()
    x = np.asarray(x)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def as_array(x: Any) -> Array | np.ndarray:
    """JAX arrays, traced or not, as they are; everything else as NumPy."""
    return x if isinstance(x, Array) else as_numpy(x)


def as_rows(x: Any) -> Any:
    """JAX arrays, and what is read from disk by slices (h5py, zarr), as they are; else NumPy."""
    is_read_by_slices = all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__"))
    if isinstance(x, Array) or (is_read_by_slices and not hasattr(x, "detach")):
        return x
    return as_numpy(x)


def on_cpu(*arrays: object) -> bool:
    """Whether all values are known and in the memory of this process's CPU."""
    return all(
        not isinstance(x, jax.core.Tracer)
        and all(device.platform == "cpu" for device in x.devices())
        and (x.is_fully_addressable or x.is_fully_replicated)
        for x in arrays
        if isinstance(x, Array)
    )


def check_dimensions(x: Any, least: int) -> None:
    """Refuse arrays that are not of ``least`` to 2 dimensions or hold no real numbers."""
    dimensions = len(x.shape)
    if dimensions < least:
        raise ValueError(
            f"Expected {least}D array, got {dimensions}D array instead: of shape {x.shape}; the "
            "first axis is time."
        )
    if dimensions > 2:
        raise ValueError(
            f"Found array with dim {dimensions}, while dim <= 2 is required: of shape {x.shape}."
        )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"Complex data not supported: got dtype {x.dtype}.")
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        raise ValueError(f"Expected numbers, got dtype {x.dtype}.")


def check_finite(x: Array | np.ndarray, what: str, start: int = 0) -> None:
    """Refuse NaN and infinity, in the words that scikit-learn and so CEBRA use.

    Args:
        x: ``(time,)`` or ``(time, features)``; what JAX traces passes.
        what: What to call it.
        start: The number of its first row, where it is but a part of a recording.

    Raises:
        ValueError: There is one; the message says where the first one is.
    """
    if is_traced(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return
    if not isinstance(x, Array):
        with np.errstate(over="ignore"):
            x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)  # as JAX will have it
    xp = jnp if isinstance(x, Array) else np
    with jax.ensure_compile_time_eval():  # known values are looked at even inside jit
        if xp.isfinite(x).all():
            return
        is_wrong = xp.isnan(x)
        found = "NaN"
        if not is_wrong.any():
            is_wrong, found = xp.isinf(x), f"infinity or a value too large for {x.dtype}"
        where = first_place(is_wrong, start)
    raise ValueError(
        f"Input contains {found}, first at {where}. Interpolate or drop these time steps of {what}."
    )


def unit_rows(x: Any) -> Any:
    """Rows ``(rows, features)`` of NumPy or JAX divided by their norms; rows of zeros become NaN.

    In units of the largest feature of a row: the squares of others may leave the range of floats.
    """
    xp = jnp if isinstance(x, Array) else np
    largest = xp.abs(x).max(axis=1, keepdims=True)
    scaled = x / (lax.stop_gradient(largest) if xp is jnp else largest)
    return (scaled / xp.linalg.norm(scaled, axis=1, keepdims=True)).astype(x.dtype)


def first_place(is_wrong: Array | np.ndarray, start: int = 0) -> str:
    """Where the first true value of a mask ``(time,)`` or ``(time, features)`` is, in words."""
    rows = is_wrong.reshape(is_wrong.shape[0], -1)
    row = int(rows.any(axis=1).argmax())
    column = f", column {int(rows[row].argmax())}" if is_wrong.ndim > 1 else ""
    return f"row {start + row}{column} (counted from 0)"


def wide(dtype: Any) -> np.dtype:
    """The dtype to compute in: the same if it is of floats of at least 32 bits, else float32."""
    is_wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4
    return dtype if is_wide else np.dtype(np.float32)


def as_integer(name: str, value: Any, at_least: int) -> int:
    """A Python integer, or an error that says what the argument has to be."""
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name} has to be an integer, got {value!r} of type {type(value).__name__}."
        ) from None
    if number < at_least:
        raise ValueError(f"{name} has to be at least {at_least}, got {number}.")
    return int(number)


def as_key(key: ArrayLike) -> Array:
    """A typed PRNG key from a typed or an old uint32 key."""
    if isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if getattr(key, "dtype", None) == np.uint32:
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(
        f"key has to be a JAX PRNG key such as jax.random.key(0), got {type(key).__name__}."
    )


def size_class(number: int) -> int:
    """The size that so many rows are padded to: a power of 4, beyond 2**18 a multiple of it.

    What is compiled for a size class serves all numbers of rows in it.
    """
    size = 2**12
    while size < number and size < 2**18:
        size *= 4
    return -(-number // size) * size


def pad_rows(x: Any) -> Any:
    """Zeros behind the last row, up to the size class; NumPy, or on the device where it is."""
    xp = np if on_cpu(x) else jnp
    x = xp.asarray(x)
    return xp.pad(x, [(0, size_class(len(x)) - len(x))] + [(0, 0)] * (x.ndim - 1))


def map_rows(function: Callable[..., Any], arrays: tuple[Array, ...], block_size: int) -> Any:
    """Apply a function of rows to blocks of rows, and concatenate; traced at most twice.

    Unlike ``lax.map(..., batch_size=...)`` the function sees blocks, not single rows.
    """
    number = arrays[0].shape[0]
    rest = number % block_size if number > block_size else number
    parts = []
    if number > rest:
        blocks = [x[: number - rest].reshape(-1, block_size, *x.shape[1:]) for x in arrays]
        many = lax.map(lambda rows: function(*rows), blocks)
        parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), many))
    if rest:
        parts.append(function(*(x[number - rest :] for x in arrays)))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if len(parts) > 1 else parts[0]
