"""Positives across sessions: queries of all are dealt out to all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cebra_jax_metrics.arrays import is_traced
from cebra_jax_metrics.neighbors import nearest
from cebra_jax_metrics.samplers.base import (
    Leaf,
    Proposal,
    SampleInTwoSteps,
    as_continuous,
    as_integers,
    as_length,
    jitted,
    pytree,
    set_fields,
    uniform_steps,
)
from cebra_jax_metrics.samplers.delta import as_time_offset
from cebra_jax_metrics.samplers.discrete import matching_step


class MultisessionBatch(NamedTuple):
    """Indices of time steps, int32, ``(sessions, batch)`` each; ``draw`` puts batches first.

    Attributes:
        reference: Draws from each session.
        positive: Time steps of the session that each query was dealt to.
        negative: Further draws from each session.
        order: ``(sessions * batch,)``: with references and positives in one row each, session by
            session, the positive of reference i is number ``order[i]``.
    """

    reference: Array
    positive: Array
    negative: Array
    order: Array


class _AcrossSessions(SampleInTwoSteps):
    """What samplers of several sessions share."""

    def probabilities(self, *num_steps: int) -> tuple[Array, ...]:
        """How probable every time step of each session is, as one of its references ``(time,)``."""
        lengths = map(jnp.asarray, self.lengths)  # type: ignore[attr-defined]
        return tuple(
            jnp.where(
                jnp.arange(steps, dtype=jnp.int32) < length, 1 / length.astype(jnp.float32), 0
            )
            for length, steps in zip(lengths, num_steps, strict=True)
        )

    def complete(self, proposal: Proposal) -> MultisessionBatch:
        """Find the positives in the sessions that their queries were dealt to."""
        query, order = proposal.query
        positive = self.resolve(query)  # type: ignore[attr-defined]
        return MultisessionBatch(proposal.reference, positive, proposal.negative, order)


def _prior(key: Array, batch_size: int, lengths: tuple[Array, ...]) -> tuple[Array, Array]:
    """References and negatives, uniform over time in each session ``(sessions, batch)``."""
    steps = [
        uniform_steps(jax.random.fold_in(key, session), (2, batch_size), length)
        for session, length in enumerate(lengths)
    ]
    reference, negative = jnp.stack(steps, axis=1)
    return reference, negative


def _deal(key: Array, query: Array) -> tuple[Array, Array]:
    """Deal queries ``(sessions, batch, …)`` out at random, and say where each went."""
    sessions, batch_size, *rest = query.shape
    places = jnp.arange(sessions * batch_size, dtype=jnp.int32)
    taken = jax.random.permutation(key, places)
    order = jnp.zeros_like(places).at[taken].set(places)
    return query.reshape(-1, *rest)[taken].reshape(query.shape), order


@pytree()
class Multisession(_AcrossSessions):
    """Positives nearest to a label plus a change, in a session drawn at random.

    References and negatives are uniform over time, as many from each session; the change is that
    of the labels over ``time_offset`` steps, at a time drawn uniformly from all sessions. The
    queries of all sessions are dealt out at random, equally many to each, and the positive is the
    nearest in the session that the query was dealt to.

    Args:
        labels: Continuous labels, for each session ``(time,)`` or ``(time, features)``.
        time_offset: Steps over which the labels change.
        lengths: For each session the number of real rows where its labels are padded.

    Raises:
        ValueError: Labels are empty or not finite, differ in width, or are not longer than the
            time offset.

    Source: CEBRA 0.6.1 ``cebra.distributions.MultisessionSampler``.
    """

    labels: Leaf
    time_offset: Leaf = 1
    lengths: Leaf = None

    def __post_init__(self) -> None:
        labels = tuple(as_continuous(label) for label in self.labels)
        if len({label.shape[1] for label in labels}) != 1:
            raise ValueError(
                "The labels of all sessions have to have the same number of features, got "
                f"{[label.shape[1] for label in labels]}."
            )
        offset, lengths = as_time_offset(self.time_offset), _as_lengths(self.lengths, labels)
        for session, length in enumerate(lengths):
            if not is_traced(length, offset) and length <= offset:
                raise ValueError(
                    f"Session {session} has {length} time steps, which have to be more than the "
                    f"time offset of {offset}."
                )
        set_fields(self, labels=labels, time_offset=offset, lengths=lengths)

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; queries are labels, dealt out, and where each went."""
        prior, change, deal = jax.random.split(key, 3)
        reference, negative = _prior(prior, batch_size, self.lengths)
        here = jnp.stack([y[steps] for y, steps in zip(self.labels, reference, strict=True)])
        query = here + self._change(change, here.shape[:2])
        return Proposal(reference, negative, _deal(deal, query))

    def _change(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Changes of the labels, uniform over all that occur in any session."""
        counts = jnp.stack(self.lengths) - self.time_offset
        stops = jnp.cumsum(counts, dtype=jnp.int32)
        number = uniform_steps(key, shape, stops[-1])
        session = jnp.searchsorted(stops, number, side="right")
        starts = np.cumsum([0, *(len(label) for label in self.labels[:-1])]).astype(np.int32)
        before = number - (stops - counts)[session] + jnp.asarray(starts)[session]
        every = jnp.concatenate(self.labels)
        return every[before + self.time_offset] - every[before]

    def resolve(self, query: Array) -> Array:
        """Find the nearest time steps ``(…, sessions, batch)``."""
        found = [
            nearest(labels, query[..., session, :, :], length)
            for session, (labels, length) in enumerate(zip(self.labels, self.lengths, strict=True))
        ]
        return jnp.stack(found, axis=-2)


@pytree()
class DiscreteMultisession(_AcrossSessions):
    """Positives of the same discrete label, in a session drawn at random.

    References and negatives are uniform over time, as many from each session. The references of
    all sessions are dealt out at random, equally many to each, and the positive is uniform among
    the time steps with the reference's label in the session that it was dealt to.

    Args:
        labels: Integers, for each session ``(time,)``; all sessions have the same values (which
            cannot be checked of traced labels: references without a match give a wrong step).
        lengths: For each session the number of real entries where its labels are padded.

    Raises:
        TypeError: The labels are no integers.
        ValueError: The labels are not one-dimensional, or a session lacks a value of another.

    Source: CEBRA 0.6.1 ``cebra.distributions.DiscreteMultisessionSampler`` (where a value that a
    session lacks gives an IndexError or a wrong time step).
    """

    labels: Leaf
    lengths: Leaf = None

    def __post_init__(self) -> None:
        labels = tuple(as_integers(label) for label in self.labels)
        lengths = _as_lengths(self.lengths, labels)
        if not is_traced(*labels, *lengths):
            labels = _renumbered(tuple(map(np.asarray, labels)), tuple(map(int, lengths)))
        set_fields(self, labels=tuple(map(jnp.asarray, labels)), lengths=lengths)

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; queries are positives, and where each was dealt to."""
        prior, conditional, deal = jax.random.split(key, 3)
        reference, negative = _prior(prior, batch_size, self.lengths)
        here = jnp.stack([y[steps] for y, steps in zip(self.labels, reference, strict=True)])
        wanted, order = _deal(deal, here)
        positive = [
            matching_step(jax.random.fold_in(conditional, session), labels, length, values)
            for session, (labels, length, values) in enumerate(
                zip(self.labels, self.lengths, wanted, strict=True)
            )
        ]
        return Proposal(reference, negative, (jnp.stack(positive), order))

    def resolve(self, query: Array) -> Array:
        """Return the query: it is the positive."""
        return query


def _as_lengths(lengths: Any, labels: tuple[Any, ...]) -> tuple[Array, ...]:
    given = [None] * len(labels) if lengths is None else list(lengths)
    if len(given) != len(labels) or not labels:
        raise ValueError(f"Got labels of {len(labels)} sessions and {len(given)} lengths.")
    return tuple(as_length(length, label) for length, label in zip(given, labels, strict=True))


def _renumbered(labels: tuple[np.ndarray, ...], lengths: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Labels of all sessions, their values numbered from 0; every session has to have them all."""
    real = [label[:length] for label, length in zip(labels, lengths, strict=True)]
    values = np.unique(np.concatenate(real))
    for session, label in enumerate(real):
        missing = np.setdiff1d(values, label).tolist()
        if missing:
            raise ValueError(
                f"Session {session} lacks the discrete labels {missing}, which other sessions "
                "have: leave their time steps out, or merge labels."
            )
    return tuple(np.searchsorted(values, label).astype(np.int32) for label in labels)
