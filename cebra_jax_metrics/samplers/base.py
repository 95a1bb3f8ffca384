"""What every sampler is: a frozen pytree that proposes references, negatives and queries."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import (
    as_array,
    as_integer,
    as_key,
    first_place,
    is_traced,
    pad_rows,
    wide,
)

T = TypeVar("T")
Leaf = Any  # anything array-like when a user passes it, an array once the sampler is made


class Batch(NamedTuple):
    """Indices of time steps, int32, ``(batch,)`` each, or ``(num_batches, batch)`` from ``draw``.

    Attributes:
        reference: Draws from the prior.
        positive: One draw from the conditional for every reference.
        negative: Further draws from the prior.
    """

    reference: Array
    positive: Array
    negative: Array


class Proposal(NamedTuple):
    """A batch whose positives are still to be found by ``sampler.resolve(query)``.

    Attributes:
        reference: Indices of time steps ``(batch,)``, int32; of several sessions, one row each.
        negative: The same of the negatives.
        query: What the sampler needs to find the positives: labels, or the positives themselves.
    """

    reference: Array
    negative: Array
    query: Any


class Sampler(Protocol):
    """Distribution of batches: a prior for references and negatives, a conditional for positives.

    ``propose`` is pure and jitted. ``resolve`` turns its queries, of any number of batches, into
    positives; where that takes a nearest-neighbour search it runs on the host if it can.
    """

    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives, and where to look for the positives."""
        ...

    def resolve(self, query: Any) -> Array:
        """Find the positives."""
        ...

    def complete(self, proposal: Proposal) -> Any:
        """Make a batch of a proposal, or many of many."""
        ...

    def sample(self, key: Array, batch_size: int) -> Batch:
        """Draw one batch."""
        ...


class SampleInTwoSteps:
    """``sample`` as ``propose``, then ``resolve``."""

    def padded(self: T) -> T:
        """The same sampler with labels padded to their size class, which share a compilation."""
        if is_traced(*jax.tree.leaves(self)):
            return self
        return jax.tree.map(lambda leaf: pad_rows(leaf) if np.ndim(leaf) else leaf, self)

    def complete(self: Sampler, proposal: Proposal) -> Any:
        """Find the positives of a proposal, or of many."""
        return Batch(proposal.reference, self.resolve(proposal.query), proposal.negative)

    def sample(self: Any, key: Array, batch_size: int) -> Any:
        """Draw one batch of ``batch_size`` references, positives and negatives."""
        batch_size = as_integer("batch_size", batch_size, at_least=1)
        return self.attached(self.complete(self.propose(as_key(key), batch_size)))

    def attached(self, batch: Any) -> Any:
        """The batch, or many, with what they need of the sampler itself: of most samplers nothing.

        Apart from :meth:`complete`, since it has no axis for batches.
        """
        return batch


class FromSteps(SampleInTwoSteps):
    """A sampler of one recording, of all its time steps or of some of them.

    Where ``steps`` are given, what is drawn are places among them, and ``length`` counts them.
    """

    steps: Leaf
    length: Leaf

    def drawn(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Time steps drawn uniformly."""
        return self.at(uniform_steps(key, shape, self.length))

    def at(self, places: Array) -> Array:
        """The time steps at places among those that are drawn from."""
        return places if self.steps is None else self.steps[places]

    def of_steps(self, labels: Array) -> Array:
        """The labels of the time steps that are drawn from."""
        return labels if self.steps is None else labels[self.steps]

    def probabilities(self, num_steps: int) -> tuple[Array]:
        """How probable every time step is as a reference, or as a negative ``(time,)``."""
        places = jnp.arange(num_steps if self.steps is None else len(self.steps), dtype=jnp.int32)
        weights = jnp.broadcast_to(1 / jnp.asarray(self.length).astype(jnp.float32), places.shape)
        return (self.of_places(weights, num_steps),)

    def of_places(self, weights: Array, num_steps: int) -> Array:
        """Weights of places, as those of time steps; those of padding are left out."""
        places = jnp.arange(len(weights), dtype=jnp.int32)
        weights = jnp.where(places < self.length, weights, 0)
        return jnp.zeros(num_steps, weights.dtype).at[self.at(places)].add(weights)

    @property
    def span(self) -> Any:
        """How long the recording has to be."""
        if self.steps is None or is_traced(self.steps, self.length):
            return self.length if self.steps is None else 0
        return np.max(np.asarray(self.steps)[: int(self.length)]) + 1


class Conditional(Protocol):
    """A sampler whose positives can be asked for at references drawn elsewhere.

    Attributes:
        length: Number of time steps.
    """

    @property
    def length(self) -> Leaf:
        """Number of time steps."""
        ...

    def query(self, key: Array, reference: Array) -> Any:
        """Draw where to look for the positives of given references ``(batch,)``."""
        ...

    def resolve(self, query: Any) -> Array:
        """Find the positives."""
        ...


def check_conditional(sampler: object) -> None:
    """Refuse samplers that cannot take references drawn elsewhere."""
    if not hasattr(sampler, "query"):
        raise TypeError(
            "Expected one of the samplers Time, TimeDelta and DeltaNormal, got "
            f"{type(sampler).__name__}."
        )
    if getattr(sampler, "steps", None) is not None:
        raise ValueError(
            "References are drawn elsewhere here: pass a sampler of all time steps, without steps=."
        )


# A sampler being a pytree, its method compiles once per kind and shape of sampler.
jitted = partial(jax.jit, static_argnames="batch_size")


@dataclass_transform(frozen_default=True)
def pytree(*, static: tuple[str, ...] = ()) -> Any:
    """Make a frozen dataclass and a pytree of a class whose ``__post_init__`` checks user input.

    Unlike with ``jax.tree_util.register_dataclass``, JAX rebuilds instances without running that
    check: its leaves may be stacked, traced or no arrays at all.
    """

    def register(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        leaves = [name for name in names if name not in static]

        def flatten(self: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children = [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in leaves]
            return children, tuple(getattr(self, name) for name in static)

        def unflatten(fixed: tuple[Any, ...], children: Any) -> T:
            self = object.__new__(cls)
            for name, value in zip((*leaves, *static), (*children, *fixed), strict=True):
                object.__setattr__(self, name, value)
            return self

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


def set_fields(self: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(self, name, value)


def uniform_steps(key: Array, shape: tuple[int, ...], stop: ArrayLike) -> Array:
    """Uniform draws from ``[0, stop)``, int32 whether or not JAX runs in x64.

    Floor of ``bits · stop / 2^32``, so that no step is more than ``2^-32`` off in probability:
    ``jax.random.randint`` takes twice as many bits and three integer divisions for each, which take
    several times as long to compile and to run.

    Args:
        key: A typed PRNG key.
        shape: Of the draws.
        stop: Number of steps to choose from, of a shape that broadcasts to ``shape``.
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    stop = jnp.broadcast_to(jnp.asarray(stop).astype(jnp.uint32), shape)
    # The upper half of a product of 64 bits, from halves of 16 bits.
    low, high = bits & 0xFFFF, bits >> 16
    stop_low, stop_high = stop & 0xFFFF, stop >> 16
    crossed = high * stop_low + (low * stop_low >> 16)
    carried = (crossed & 0xFFFF) + low * stop_high
    return (high * stop_high + (crossed >> 16) + (carried >> 16)).astype(jnp.int32)


def as_continuous(labels: object) -> Array:
    """Continuous labels ``(time,)`` or ``(time, features)`` as float32 ``(time, features)``."""
    labels = as_array(labels)
    if labels.ndim not in (1, 2) or 0 in labels.shape:
        raise ValueError(
            "Continuous labels have to be of shape (time,) or (time, features) and not empty, "
            f"got {labels.shape}."
        )
    if not any(jnp.issubdtype(labels.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"Continuous labels have to be numbers, got dtype {labels.dtype}.")
    with np.errstate(over="ignore"):
        labels = jnp.asarray(labels.astype(np.float32))
    if not is_traced(labels) and not np.isfinite(labels).all():
        where = first_place(~np.isfinite(labels))
        raise ValueError(
            f"Labels contain NaN or infinity (in float32), first at {where}; drop these time steps "
            "from X and labels."
        )
    return labels.reshape(labels.shape[0], -1)


def as_integers(values: object, what: str = "Discrete labels") -> Array | np.ndarray:
    """Integers ``(time,)``, such as discrete labels, of whatever kind they are."""
    values = as_array(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or 0 in values.shape:
        raise ValueError(f"{what} have to be of shape (time,) and not empty, got {values.shape}.")
    if not np.issubdtype(values.dtype, np.integer):
        hint = "use a continuous sampler for floats, or cast with astype(int)."
        raise TypeError(f"{what} have to be integers, got dtype {values.dtype}; {hint}")
    return values


def as_discrete(labels: object) -> Array:
    """Discrete labels ``(time,)`` as int32; known values are renumbered from 0."""
    labels = as_integers(labels)
    if is_traced(labels):  # not renumbered: wide integers stay wide
        return jnp.asarray(labels if labels.dtype.itemsize >= 4 else labels.astype(np.int32))
    return jnp.asarray(np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int32))


def as_leaf(value: Any, dtype: Any) -> Any:
    """A number, traced or not, as a leaf of one dtype whether or not JAX runs in x64."""
    return value.astype(dtype) if isinstance(value, Array) else np.asarray(value, dtype)


def as_floats(name: str, value: Any) -> Any:
    """Numbers as a leaf that is differentiated: float32, or as wide as they are in x64."""
    value = as_array(value)
    if not (jnp.issubdtype(value.dtype, jnp.floating) or np.issubdtype(value.dtype, np.integer)):
        raise TypeError(f"{name} has to be made of real numbers, got {value!r}.")
    with np.errstate(over="ignore"):
        return value.astype(jax.dtypes.canonicalize_dtype(wide(value.dtype)))


def as_length(length: object, rows: Array, steps: Any = None) -> Any:
    """The number of real rows of possibly padded labels, or steps, as an int32 leaf."""
    number = rows.shape[0] if steps is None else steps.shape[0]
    if length is None:
        length = number
    if is_traced(length):
        return as_leaf(length, jnp.int32)
    length = as_integer("length", length, at_least=1)
    if length > number:
        of_what = "labels for" if steps is None else "only"
        raise ValueError(f"length is {length}, but there are {of_what} {number} steps.")
    return np.asarray(length, np.int32)


def as_steps(steps: object, stop: ArrayLike) -> Any:
    """Time steps to draw from, all within ``[0, stop)``, as int32; ``None`` stays ``None``."""
    if steps is None:
        return None
    if isinstance(steps, slice):
        if is_traced(stop):
            raise TypeError("A slice of steps takes a known length: pass integers under jit.")
        steps = np.arange(int(np.asarray(stop)))[steps]
    steps = as_integers(steps, "steps")
    known = None if is_traced(steps, stop) else np.asarray(steps)
    if known is not None and not (known.min() >= 0 and known.max() < int(np.asarray(stop))):
        raise ValueError(
            f"steps have to be within [0, {stop}), got {known.min()} to {known.max()}."
        )
    return jnp.asarray(steps).astype(jnp.int32)
