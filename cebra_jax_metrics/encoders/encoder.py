"""An encoder: an architecture with its parameters, as a pytree."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from cebra_jax_metrics.arrays import wide
from cebra_jax_metrics.encoders.architectures import Architecture, get_architecture


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder of one session: pure data, its parameters the only leaves.

    Attributes:
        params: Arrays under torch's state-dict names (``net.0.weight``); tied parameters once.
        architecture: A name of CEBRA's or a registered one.
        num_neurons: Features of the recording.
        num_hidden_units: Width of the hidden layers.
        output_dimension: Features of the embedding.
    """

    params: dict[str, Array]
    architecture: str = field(metadata={"static": True})
    num_neurons: int = field(metadata={"static": True})
    num_hidden_units: int = field(metadata={"static": True})
    output_dimension: int = field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        key: Array,
        architecture: str,
        num_neurons: int,
        num_hidden_units: int = 32,
        output_dimension: int = 8,
    ) -> "Encoder":
        """Make an encoder with random parameters, distributed as torch's defaults.

        Raises:
            ValueError: The architecture is unknown or a size too small for it.
        """
        sizes = num_neurons, num_hidden_units, output_dimension
        params = get_architecture(architecture).init(key, *sizes)
        return cls(params, architecture, *sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Neurons, hidden units and output dimension."""
        return self.num_neurons, self.num_hidden_units, self.output_dimension

    @property
    def offset(self) -> tuple[int, int]:
        """The window of time step t is ``[t - offset[0], t + offset[1] - 1]``."""
        return self._known.offset

    @property
    def receptive_field(self) -> int:
        """Time steps that one embedding depends on."""
        return sum(self.offset)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters, and so of the embedding."""
        return jnp.result_type(*self.params.values()) if self.params else jnp.dtype(jnp.float32)

    @property
    def _known(self) -> Architecture:
        return get_architecture(self.architecture)

    @property
    def has_dropout(self) -> bool:
        """Whether training makes a difference to what is computed."""
        return self._known.has_dropout(*self.sizes)

    def encode_windows(self, X: Array, key: Array | None = None) -> Array:
        """Embed every whole window of a recording.

        Args:
            X: ``(time, neurons)`` of any real dtype; it is cast to that of the parameters, but at
                least to float32, which they are computed with in.
            key: For dropout, as in training; ``None`` is evaluation.

        Returns:
            ``(time - receptive_field + 1, output_dimension)`` in the dtype of the parameters; row 0
            belongs to time step ``offset[0]``.

        Raises:
            ValueError: A registered architecture returns another shape.
        """
        dtype = wide(self.dtype)  # narrow parameters are for storage
        params = {name: value.astype(dtype) for name, value in self.params.items()}
        embedding = self._known.apply(params, jnp.asarray(X).astype(dtype), *self.sizes, key)
        expected = X.shape[0] - self.receptive_field + 1, self.output_dimension
        if embedding.shape != expected:
            raise ValueError(
                f"Architecture {self.architecture!r} with offset {self.offset} embeds "
                f"{X.shape} as {embedding.shape}, not as {expected}: its offset or its apply is "
                "wrong."
            )
        return embedding.astype(self.dtype)

    def encode(self, X: Array, pad: bool = True) -> Array:
        """Embed a recording, as CEBRA's ``transform`` does.

        Args:
            X: ``(time, neurons)``.
            pad: Repeat the edge samples so that every time step has an embedding.

        Returns:
            ``(time, output_dimension)``, or what ``encode_windows`` returns without padding.
        """
        left, right = self.offset
        X = jnp.asarray(X)
        return self.encode_windows(jnp.pad(X, ((left, right - 1), (0, 0)), "edge") if pad else X)

    def encode_steps(self, X: Array, steps: Array, key: Array | None = None) -> Array:
        """Embed the windows of some time steps only.

        Args:
            X: ``(time, neurons)``.
            steps: Time steps ``(steps,)``; those near the edges take the first or last window.
            key: For dropout, each window's own, as in training; ``None`` is evaluation.

        Returns:
            ``(steps, output_dimension)``.
        """
        window = jnp.arange(self.receptive_field, dtype=jnp.int32)
        blocks = X[self.window_of(steps, X.shape[0])[:, None] + window[None, :]]
        if key is None:
            return jax.vmap(self.encode_windows)(blocks)[:, 0]
        keys = jax.random.split(key, len(steps))
        return jax.vmap(self.encode_windows)(blocks, keys)[:, 0]

    def window_of(self, steps: Array, num_steps: int) -> Array:
        """Row of ``encode_windows`` for each time step, those near the edges clamped.

        Args:
            steps: Time steps, integers of any shape.
            num_steps: Length of the recording.
        """
        left, right = self.offset
        return jnp.clip(steps, left, num_steps - right) - left

    def __repr__(self) -> str:
        neurons, units, outputs = self.sizes
        return (
            f"Encoder({self.architecture!r}, {neurons} neurons -> {units} units -> {outputs} "
            "dimensions)"
        )
