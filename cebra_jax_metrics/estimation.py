"""InfoNCE of a model on a recording: the mean over batches, with its standard error."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from cebra_jax_metrics.arrays import as_integer, as_key, is_traced
from cebra_jax_metrics.control_variates import (
    PAIRS,
    reduced,
)
from cebra_jax_metrics.evaluation import (
    FeatureRange,
    check_lengths,
    controlled_losses,
    embedded,
    full_losses,
    length_of,
    parts_of,
    plain_losses,
    subspaces,
    uniform_terms,
    what_is_known,
)
from cebra_jax_metrics.infonce import InfoNCE, chance_level
from cebra_jax_metrics.model import (
    Checkpoint,
    Model,
    Windows,
    as_model,
)
from cebra_jax_metrics.samplers import (
    DiscreteMultisession,
    FullBatch,
    Hybrid,
    Multisession,
    Sampler,
    Soft,
)
from cebra_jax_metrics.samplers.drawing import MAX_QUERIES_AT_ONCE, check_batch_size, draw
from cebra_jax_metrics.sharding import check_enough, checked_mesh, placed, spread

# The most batches that a wanted standard error may take.
MAX_BATCHES = 100_000

Method = Literal["plain", "control_variates"]
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Estimate:
    """A Monte-Carlo estimate of an InfoNCE loss, in nats. ``float(estimate)`` is the loss.

    Attributes:
        loss: Mean over the batches.
        stderr: Standard error of that mean; NaN for a single batch.
        per_batch: Loss of every batch ``(num_batches,)``.
        align: Mean of the align part.
        uniform: Mean of the uniform part.
        num_negatives: Negatives in each batch, which set the level of chance.
        parts: Where the loss is made of several, an estimate of each by its name: the objectives
            that it is the sum of, or the sessions that it is the mean of.
        num_objectives: How many objectives the loss is the sum of.
        gain: Variance of plain batches over that of ``per_batch``, as estimated from the same
            draws: how many times as many plain batches it takes; 1 for those.
    """

    loss: Array
    stderr: Array
    per_batch: Array
    align: Array
    uniform: Array
    num_negatives: int | Array
    parts: dict[str, "Estimate"] = field(default_factory=dict)
    num_objectives: int = field(default=1, metadata={"static": True})
    gain: Array | float = 1.0

    @property
    def chance(self) -> Array:
        """The loss of an embedding that carries nothing, in nats."""
        return self.num_objectives * chance_level(self.num_negatives).astype(self.loss.dtype)

    @property
    def bits(self) -> Array:
        """Goodness of fit in bits: 0 is chance, below 0 is worse than chance."""
        return (self.chance - self.loss) / math.log(2)

    @property
    def per_batch_bits(self) -> Array:
        """Goodness of fit of every batch ``(num_batches,)``, in bits."""
        return (self.chance - self.per_batch) / math.log(2)

    @property
    def bits_stderr(self) -> Array:
        """Standard error of the goodness of fit, in bits."""
        return self.stderr / math.log(2)

    def __float__(self) -> float:
        return float(self.loss)

    def __repr__(self) -> str:
        if any(isinstance(x, Array) and x.size == 1 for x in (self.loss, self.stderr)):
            try:
                return (
                    f"Estimate(loss={float(self.loss):.4f} ± {float(self.stderr):.4f} nats, "
                    f"{float(self.bits):.4f} ± {float(self.bits_stderr):.4f} bits, "
                    f"{self.per_batch.size} batches, {self.num_negatives} negatives)"
                )
            except jax.errors.ConcretizationTypeError:
                pass
        return f"Estimate(loss={self.loss!r}, num_negatives={self.num_negatives!r})"


def estimate_infonce(
    key: Array,
    model: Model | Checkpoint,
    X: Any,
    sampler: Sampler,
    *,
    batch_size: int | None = None,
    num_batches: int = 500,
    target_stderr_bits: float | None = None,
    max_batches: int = MAX_BATCHES,
    method: Method = "plain",
    session_id: int | None = None,
    feature_range: FeatureRange = None,
    renormalize: bool = False,
    chunk_size: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """InfoNCE of a model on a recording, averaged over batches drawn by a sampler.

    It is ``draw``, then ``evaluate``, then a mean. Works under ``jit``, under ``grad`` with respect
    to the model or the recording (indices stay outside the gradient), and under ``vmap`` over
    stacked models.

    Args:
        key: A JAX PRNG key; the same key gives the same draws.
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``; a list of one per session with a sampler of several.
        sampler: One of ``cebra_jax_metrics.samplers``.
        batch_size: References, positives and negatives per batch (and session); needed unless the
            sampler is ``samplers.FullBatch``.
        num_batches: Batches to average; with a target, those to start with.
        target_stderr_bits: Draw more batches until the standard error is at most this, in bits. The
            result is that of as many batches asked for at once.
        max_batches: The most to draw for it; where they do not suffice, there is a warning.
        method: ``"plain"`` is the mean of the batches; ``"control_variates"`` has the same
            expectation and a smaller standard error, by comparing each batch with the recording
            (:mod:`cebra_jax_metrics.control_variates`): it looks for more positives, and computes
            at most as many similarities again. It takes from about 20 batches on. A full batch has
            nothing to gain, and is scored as it is.
        session_id: Which encoder of a multi-session model to use.
        feature_range: Features of the embedding to score, see :func:`evaluate`.
        renormalize: Divide the embeddings in a feature range by their norm.
        chunk_size: Batches drawn at a time: bounds memory, changes no draw.
        progress: Wraps the loop over chunks, such as ``tqdm.tqdm``.
        mesh: Devices to spread the windows, then the batches over (:func:`spread`): the draws are
            those of one device. Every process calls this with the same arguments, draws its own
            batches only, and reads the rows of ``X`` that it needs.
        axis_name: The axis of the mesh, where it has several.

    Returns:
        The mean loss with its standard error, and the goodness of fit as ``.bits``; for a hybrid
        sampler, several feature ranges or several sessions also those of each, as ``.parts``. The
        loss is not finite where an embedding is not (one of norm 0, normalised, is NaN) or its
        squared norm leaves the range of floats; a collapsed embedding has 0 bits up to rounding.

    Raises:
        ValueError: The recording does not fit the model, a size is below 1, the method is unknown,
            a known temperature is not above 0, or the mesh does not fit (:func:`spread`).
        TypeError: The key is no JAX key, the sampler none, or a size no integer.
        RuntimeError: Missing or wrong ``session_id``.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_loss``.
    """
    key = as_key(key)
    batch_size = check_batch_size(sampler, batch_size)
    num_batches = as_integer("num_batches", num_batches, at_least=1)
    if method not in get_args(Method):
        raise ValueError(f"method has to be one of {get_args(Method)}, got {method!r}.")
    if target_stderr_bits is not None:
        _check_target(target_stderr_bits, num_batches, max_batches)
    processes, devices = 1, 1
    if mesh is not None:
        mesh, axis_name = checked_mesh(mesh, axis_name)
        processes, devices = check_enough("batches", num_batches, mesh), mesh.shape[axis_name]
    over = partial(spread, mesh=mesh, axis_name=axis_name)
    is_joint = isinstance(sampler, Multisession | DiscreteMultisession)
    encoders, windows = embedded(model, X, session_id, is_joint, mesh, axis_name)
    spaces = subspaces(windows, feature_range, renormalize, isinstance(sampler, Hybrid))
    check_lengths(sampler, encoders, list(map(length_of, windows, encoders)))
    criterion = as_model(model).criterion
    if mesh is not None:  # once for all chunks
        criterion, encoders, spaces = placed((criterion, encoders, spaces), mesh, PartitionSpec())
    uniform, knowns, pairs = {}, {}, 1
    if isinstance(sampler, FullBatch):
        for name, (space,) in spaces.items():  # of all full batches the same
            rows = space.rows[: sampler.batch_size]
            uniform[name] = jnp.mean(over(uniform_terms, (criterion, rows), rows))
    elif method == "control_variates":
        if not hasattr(sampler, "probabilities"):
            raise TypeError(
                'method="control_variates" takes a sampler that says how probable its time steps '
                f"are: give {type(sampler).__name__} a method probabilities(num_steps)."
            )
        most_pairs = num_batches * batch_size**2 * len(encoders)
        knowns = what_is_known(criterion, encoders, spaces, sampler, most_pairs, mesh, axis_name)
        pairs = 1 if all(k.is_exact for each in knowns.values() for k in each) else PAIRS
    drawn_size = pairs * batch_size
    chunk_size = _even_chunks(num_batches, processes * MAX_QUERIES_AT_ONCE, drawn_size, chunk_size)
    chunk_size += -chunk_size % devices

    def losses(name: str, windows: tuple[Windows, ...], soft: Soft | None, batch: Any) -> Any:
        shared = criterion, encoders, windows, soft
        if isinstance(sampler, FullBatch):
            return (over(full_losses, (criterion, *encoders, *windows, uniform[name]), batch),)
        if not knowns:
            return over(plain_losses, shared, batch)
        return over(controlled_losses, (*shared, knowns[name]), batch, batch_size=batch_size)

    chunks: list[dict[str, Any]] = []
    while True:
        for start in progress(range(len(chunks) * chunk_size, num_batches, chunk_size)):
            # Chunks are all of one size, so that one compilation serves them: the last overshoots.
            batch = draw(
                key, sampler, drawn_size, chunk_size, start=start, mesh=mesh, axis_name=axis_name
            )
            chunks.append(parts_of(losses, spaces, batch))
            num_negatives = math.prod(batch.negative.shape[1:]) // pairs
        parts = {
            name: _summarise(tuple(chunk[name] for chunk in chunks), num_batches=num_batches)
            for name in chunks[0]
        }
        plain = None
        if knowns:
            plain = {name: part[0] for name, part in parts.items()}
            parts = {name: reduced(*part) for name, part in parts.items()}
        estimate = _combined(parts, plain, num_negatives, is_joint)
        wanted = num_batches
        if target_stderr_bits is not None:
            wanted = _batches_for(estimate, num_batches, target_stderr_bits, max_batches)
        if wanted == num_batches:
            return estimate
        num_batches = wanted


def _check_target(target: float, num_batches: int, max_batches: int) -> None:
    if is_traced(target) or not isinstance(target, int | float | np.number) or not target > 0:
        raise ValueError(f"target_stderr_bits has to be a number above 0, got {target!r}.")
    as_integer("max_batches", max_batches, at_least=1)
    if not 2 <= num_batches <= max_batches:
        raise ValueError(
            f"target_stderr_bits takes from 2 to max_batches={max_batches} batches to start with, "
            f"got num_batches={num_batches}."
        )


def _batches_for(estimate: Estimate, num_batches: int, target: float, max_batches: int) -> int:
    """How many batches to go on with, or as many as there are where there is no need."""
    if is_traced(estimate.stderr):
        raise ValueError(
            "target_stderr_bits takes known values: leave it out under jit, grad and vmap."
        )
    stderr = float(estimate.bits_stderr)
    if stderr <= target or not math.isfinite(stderr):
        return num_batches
    if num_batches == max_batches:
        warnings.warn(
            f"After max_batches={max_batches} batches the standard error is {stderr:.2g} bits, "
            f"above the {target:g} asked for.",
            stacklevel=3,
        )
        return num_batches
    most = math.sqrt(max_batches / num_batches)
    expected = num_batches * min(stderr / target, most) ** 2  # as it shrinks with the root
    return min(max(math.ceil(1.02 * expected), num_batches + 1), max_batches)


def _even_chunks(
    num_batches: int, max_queries: int, batch_size: int, chunk_size: int | None
) -> int:
    if chunk_size is not None:
        return min(as_integer("chunk_size", chunk_size, at_least=1), num_batches)
    num_chunks = min(num_batches, math.ceil(num_batches * batch_size / max_queries))
    return math.ceil(num_batches / num_chunks)


@partial(jax.jit, static_argnames="num_batches")
def _summarise(chunks: tuple[T, ...], *, num_batches: int) -> T:
    """What is known of every batch, the overshoot left out."""
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:num_batches], *chunks)


@partial(jax.jit, static_argnames=("num_negatives", "is_joint"))
def _combined(
    parts: dict[str, InfoNCE],
    plain: dict[str, InfoNCE] | None,
    num_negatives: int,
    is_joint: bool,
) -> Estimate:
    """The estimate of a sum of objectives, or of the mean over sessions, and of each.

    Args:
        parts: Losses of every batch, for each objective or session.
        plain: The same before control variates, where there were any.
        num_negatives: Negatives in each batch.
        is_joint: Whether the parts are sessions.
    """
    combine = jnp.mean if is_joint else jnp.sum

    def total(parts: dict[str, InfoNCE]) -> InfoNCE:
        return jax.tree.map(lambda *x: combine(jnp.stack(x), axis=0), *parts.values())

    before = parts if plain is None else plain
    each = {name: _estimate(part, before[name], num_negatives) for name, part in parts.items()}
    if len(each) == 1 and not is_joint:
        return each.popitem()[1]
    estimate = _estimate(total(parts), total(before), num_negatives)
    return replace(estimate, parts=each, num_objectives=1 if is_joint else len(each))


def _estimate(losses: InfoNCE, plain: InfoNCE, num_negatives: int) -> Estimate:
    count = len(losses.loss)
    nothing = jnp.full((), jnp.nan, losses.loss.dtype)
    spread, before = (
        jnp.std(x, ddof=1) if count > 1 else nothing for x in (losses.loss, plain.loss)
    )
    is_plain = count == 1 or spread == before
    gain = jnp.where(is_plain, 1, (before / spread) ** 2)
    return Estimate(
        loss=jnp.mean(losses.loss),
        stderr=spread / math.sqrt(count),
        per_batch=losses.loss,
        align=jnp.mean(losses.align),
        uniform=jnp.mean(losses.uniform),
        num_negatives=num_negatives,
        gain=gain,
    )
