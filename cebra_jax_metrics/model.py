"""A model, and a checkpoint: a model with what is known of how it came about."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import (
    as_numpy,
    as_rows,
    check_dimensions,
    check_finite,
    is_traced,
    on_cpu,
    size_class,
)
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.infonce import InfoNCE, infonce_terms
from cebra_jax_metrics.sharding import as_auto, checked_mesh, from_shares, placed, spread

# Windows embedded at a time; a divisor of all size classes.
CHUNK = 4096


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Criterion:
    """How embeddings are compared: a similarity and a temperature.

    Attributes:
        similarity: ``"cosine"`` (the dot product) or ``"euclidean"`` (minus the squared distance).
        temperature: What similarities are divided by. A leaf; where it is ``learned``, the value
            before clamping.
        learned: Whether the temperature was (or is to be) trained with the encoder.
        min_temperature: Lower limit of a learned temperature; 0 for none.
    """

    similarity: str = field(default="cosine", metadata={"static": True})
    temperature: ArrayLike = 1.0
    learned: bool = field(default=False, metadata={"static": True})
    min_temperature: ArrayLike = 0.0

    @property
    def effective_temperature(self) -> Array:
        """The temperature that similarities are divided by: clamped if it is learned."""
        temperature = jnp.asarray(self.temperature)
        if not self.learned:
            return temperature
        lowest = jnp.asarray(self.min_temperature).astype(temperature.dtype)
        return jnp.where(temperature < lowest, lowest, temperature)

    def __call__(self, reference: Array, positive: Array, negative: Array) -> InfoNCE:
        """InfoNCE of one batch of embeddings, see :func:`cebra_jax_metrics.infonce`."""
        return jax.tree.map(jnp.mean, self.terms(reference, positive, negative))

    def terms(self, reference: Array, positive: Array, negative: Array) -> InfoNCE:
        """InfoNCE of every reference ``(batch,)``."""
        return infonce_terms(
            reference,
            positive,
            negative,
            similarity=self.similarity,
            temperature=self.effective_temperature,
        )

    def __repr__(self) -> str:
        kind = "learned" if self.learned else "fixed"
        return f"Criterion({self.similarity!r}, temperature={_short(self.temperature)} ({kind}))"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Model:
    """Encoders, and the criterion they were trained with. A pytree, nothing else.

    Attributes:
        encoders: One for each session.
        criterion: How embeddings are compared.
    """

    encoders: tuple[Encoder, ...]
    criterion: Criterion = field(default_factory=Criterion)

    def __repr__(self) -> str:
        if not _are_encoders(self.encoders):
            return f"Model({self.encoders!r}, {self.criterion!r})"
        if len(self.encoders) == 1:
            return f"Model({self.encoders[0]!r}, {self.criterion!r})"
        first, neurons = self.encoders[0], "/".join(str(e.num_neurons) for e in self.encoders)
        return (
            f"Model({len(self.encoders)} sessions of {first.architecture!r}, {neurons} neurons -> "
            f"{first.output_dimension} dimensions, {self.criterion!r})"
        )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model with its settings, training history and metadata.

    Attributes:
        model: The model.
        settings: CEBRA's constructor arguments by their names (``batch_size``, ``conditional``,
            ``time_offsets``, ...), and ``label_types``: dtype and shape of each array of labels the
            model was fitted with (for several sessions, a list of them per array), or ``None``
            where they are not known. Values are such that JSON can hold them.
        history: Per training step, arrays ``(steps,)`` under CEBRA's names: ``total`` (the loss,
            nats), ``pos`` and ``neg`` (its align and uniform part), ``temperature``.
        metadata: Versions of what wrote the checkpoint.
        training: Where :func:`fit` stopped, to go on from; it is not saved.
    """

    model: Model
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, np.ndarray] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    training: Any = None

    @property
    def is_multisession(self) -> bool:
        """Whether the model was trained on several sessions, so that one has to be chosen."""
        return self.settings.get("num_sessions") is not None

    def __repr__(self) -> str:
        steps = len(self.history.get("total", ()))
        return f"Checkpoint({self.model!r}, trained for {steps} steps)"


def as_model(model: Model | Checkpoint) -> Model:
    """The model itself, or that of a checkpoint."""
    if isinstance(model, Checkpoint):
        model = model.model
    if not isinstance(model, Model):
        raise TypeError(
            f"Expected a Model or a Checkpoint, got {type(model).__name__}; load(path) and "
            "from_cebra(estimator) make a Checkpoint."
        )
    if not _are_encoders(model.encoders):
        raise TypeError(
            "Expected a model of one encoder or several, Model((encoder,)) or "
            f"Model((first, second)), got {model}."
        )
    return model


def _are_encoders(encoders: Any) -> bool:
    if not isinstance(encoders, tuple | list) or not encoders:
        return False
    return all(isinstance(encoder, Encoder) for encoder in encoders)


def select_encoder(model: Model | Checkpoint, session_id: int | None) -> Encoder:
    """The encoder of a session.

    Raises:
        RuntimeError: ``session_id`` is missing where one is needed, or there is no such session.
        ValueError: ``session_id`` is negative for a single-session model.
    """
    encoders = as_model(model).encoders
    if session_id is not None and not isinstance(session_id, (int, np.integer)):
        raise TypeError(f"session_id has to be an integer or None, got {session_id!r}.")
    if len(encoders) == 1 and not (isinstance(model, Checkpoint) and model.is_multisession):
        if session_id is not None and session_id > 0:
            raise RuntimeError(
                f"Invalid session_id {session_id}: single session models only takes an optional "
                "null session_id; leave it out."
            )
        if session_id is not None and session_id < 0:
            raise ValueError(f"session_id should be set to None or 0, got {session_id}")
        return encoders[0]
    if session_id is None:
        raise RuntimeError(
            "No session_id provided: multisession model requires a session_id to choose the model "
            f"corresponding to your data shape, one of 0 to {len(encoders) - 1}."
        )
    if not 0 <= session_id < len(encoders):
        raise RuntimeError(
            f"Invalid session_id {session_id}: session_id for the current multisession model must "
            f"be between 0 and {len(encoders) - 1}."
        )
    return encoders[session_id]


def as_recording(X: Any, encoder: Encoder, session_id: int | None = None) -> Any:
    """A recording that the encoder can take, not read yet where it is on disk.

    Args:
        X: Array-like ``(time, neurons)`` of a real dtype.
        encoder: The encoder that is to embed it.
        session_id: For the message only.

    Raises:
        ValueError: Wrong shape, too few time steps, or values that are no real numbers.
    """
    X = as_rows(X)
    check_dimensions(X, least=2)
    if X.shape[1] != encoder.num_neurons:
        raise ValueError(
            f"Invalid input shape: model for session {session_id} requires an input of shape"
            f"(n_samples, {encoder.num_neurons}), got (n_samples, {X.shape[1]})."
        )
    if X.shape[0] < encoder.receptive_field:
        raise ValueError(
            f"Found array with {X.shape[0]} sample(s) (shape={X.shape}) while a minimum of "
            f"{encoder.receptive_field} is required by the receptive field of "
            f"{encoder.architecture!r}."
        )
    return X


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Windows:
    """Embeddings of all whole windows of a recording.

    Attributes:
        rows: ``(windows, features)``, of which the last ones may be padding.
        number: How many are real.
    """

    rows: Array
    number: Any


def encode_recording(
    encoder: Encoder,
    X: Any,
    *,
    pad: bool = False,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Windows:
    """Embed every whole window of a recording.

    Known values are embedded in chunks of one size, read once and in order, so that neither a
    longer recording compiles anew nor one that is larger than memory has to fit into it.

    Args:
        encoder: The encoder.
        X: What :func:`as_recording` returns.
        pad: Repeat the edge samples so that every time step has a window.
        mesh: Devices to spread the windows over; each process reads the rows that it needs.
        axis_name: The axis of the mesh, where it has several.

    Raises:
        ValueError: NaN or infinity.
    """
    left, right = encoder.offset if pad else (0, 1)
    number = X.shape[0] + left + right - encoder.receptive_field
    if mesh is not None:
        return _encode_on_mesh(encoder, X, left, number, mesh, axis_name)
    if not on_cpu(X, *jax.tree.leaves(encoder)):
        X = X if isinstance(X, Array) else _as_jax_has_it(as_numpy(X[0 : X.shape[0]]))
        check_finite(X, "X")
        if is_traced(X, *jax.tree.leaves(encoder)):
            return Windows(_encode(encoder, X, pad=pad), number)
        every = np.arange(size_class(number) + encoder.receptive_field - 1) - left
        X = jnp.take(X, np.clip(every, 0, X.shape[0] - 1), axis=0)  # on an accelerator, in one go
        return Windows(_encode(encoder, X, pad=False), np.int32(number))
    with jax.ensure_compile_time_eval():  # also while tracing, known values are worked on at once
        rows = jnp.zeros((size_class(number), encoder.output_dimension), encoder.dtype)
        steps = CHUNK + encoder.receptive_field - 1
        read = _Reader(X)
        for start in range(0, number, CHUNK):
            block = read(start - left, start - left + steps)
            rows = _encode_chunk(rows, encoder, block, np.int32(start))
    return Windows(rows, np.int32(number))


def _encode_on_mesh(
    encoder: Encoder, X: Any, left: int, number: int, mesh: Mesh, axis_name: str | None
) -> Windows:
    """:func:`encode_recording` in chunks that are spread over the devices of a mesh."""
    mesh, axis_name = checked_mesh(mesh, axis_name)
    devices, size = mesh.shape[axis_name], size_class(number)
    chunk = min(CHUNK, -(-size // devices))
    chunks = -(-number // chunk)
    # As many for each device, of few different numbers, so that lengths share compilations.
    slots = devices * 2 ** math.ceil(math.log2(-(-chunks // devices)))
    starts = np.minimum(np.arange(slots), chunks - 1) * chunk - left
    steps = chunk + encoder.receptive_field - 1
    if on_cpu(X):
        with jax.ensure_compile_time_eval():
            blocks = from_shares(partial(_blocks, X, starts, steps), slots, mesh, axis_name)
    else:
        X = X if is_traced(X) else as_auto(X)
        check_finite(X, "X")
        every = np.clip(starts[:, None] + np.arange(steps), 0, X.shape[0] - 1)
        blocks = jnp.take(X, every, axis=0)
    rows = spread(_encode_chunks, (encoder,), blocks, mesh=mesh, axis_name=axis_name)
    rows = rows.reshape(-1, rows.shape[-1])
    rows = jnp.take(rows, np.minimum(np.arange(size), len(rows) - 1), axis=0)
    return Windows(placed(rows, mesh, PartitionSpec()), np.int32(number))


def _blocks(X: Any, starts: np.ndarray, steps: int, first: int, last: int) -> np.ndarray:
    """Blocks first to last of a recording, which begin at ``starts``."""
    read = _Reader(X, starts[first])
    return np.stack([read(start, start + steps) for start in starts[first:last]])


def _encode_chunks(encoder: Encoder, blocks: Array) -> Array:
    return lax.map(encoder.encode_windows, blocks)


def _as_jax_has_it(X: np.ndarray) -> np.ndarray:
    """Wide numbers as float32, unless JAX runs in x64."""
    if X.dtype.itemsize <= 4 or jax.config.read("jax_enable_x64"):
        return X
    with np.errstate(over="ignore"):
        return X.astype(np.float32)


class _Reader:
    """Reads ranges of a recording that move forward, so that each row is read once."""

    def __init__(self, X: Any, start: int = 0) -> None:
        self.X, self.length = np.asarray(X) if isinstance(X, Array) else X, X.shape[0]
        self.start, self.kept = max(start, 0), np.zeros((0, X.shape[1]), np.float32)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)``: before the first its copies, behind the last its copies."""
        first, last = max(start, 0), min(stop, self.length)
        here = self.start + len(self.kept)
        new = _as_jax_has_it(as_numpy(self.X[here:last]))
        check_finite(new, "X", here)
        self.kept = np.concatenate([self.kept[first - self.start :], new])
        self.start = first
        return np.pad(self.kept, ((first - start, stop - last), (0, 0)), "edge")


@partial(jax.jit, donate_argnames="rows")
def _encode_chunk(rows: Array, encoder: Encoder, block: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(rows, encoder.encode_windows(block), start, axis=0)


def embed(
    model: Model | Checkpoint, X: object, session_id: int | None = None, *, pad: bool | None = None
) -> Array:
    """Embed a recording: CEBRA's ``transform``.

    Args:
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``; any real dtype, NumPy, JAX, torch or lists.
        session_id: Which encoder of a multi-session model to use.
        pad: Repeat the edge samples so that every time step has an embedding. ``None`` does what
            the checkpoint's ``pad_before_transform`` says, or pads.

    Returns:
        ``(time, output_dimension)``; without padding ``(time - receptive_field + 1,
        output_dimension)``.

    Raises:
        ValueError: Wrong number of neurons, fewer steps than the receptive field, NaN or infinity.
        RuntimeError: Missing or wrong ``session_id``.

    Source: CEBRA 0.6.1 ``cebra.CEBRA.transform``.
    """
    encoder = select_encoder(model, session_id)
    if pad is None:
        settings = model.settings if isinstance(model, Checkpoint) else {}
        pad = settings.get("pad_before_transform", True)
    windows = encode_recording(encoder, as_recording(X, encoder, session_id), pad=bool(pad))
    if on_cpu(windows.rows):  # without compiling for each length
        return jnp.asarray(np.asarray(windows.rows)[: windows.number])
    return windows.rows[: int(windows.number)]


_encode = jax.jit(Encoder.encode, static_argnames="pad")


def _short(x: Any) -> str:
    """A number as text, whatever it is: traced, stacked or a leaf that JAX put there."""
    return f"{float(x):g}" if not is_traced(x) and np.size(x) == 1 else "..."
