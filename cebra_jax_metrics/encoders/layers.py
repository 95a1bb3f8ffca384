"""Layers of CEBRA's encoders as pure functions over a dictionary of parameters.

Recordings are ``(time, features)``. A convolution over time without padding is one matrix product
with the weights of all taps, summed along shifted diagonals: on the CPU faster than XLA's
convolution, to run and to compile.
A layer knows the shapes of its parameters by torch's names (``weight``, ``bias``), and torch's
layouts, so that a torch state dict needs no conversion.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from cebra_jax_metrics.arrays import unit_rows

Parameters = Mapping[str, Array]
Shapes = dict[str, tuple[int, ...]]


def _matmul(x: Array, weight: Array) -> Array:
    return jnp.matmul(x, weight.T, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True, eq=False)
class Layer:
    """A function of ``(time, features)`` with parameters; by default without any."""

    def shapes(self, name: str) -> Shapes:
        """Shapes of the parameters of this layer at ``name``, by their full names."""
        return {}

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """Apply this layer at ``name`` to ``(time, features)``; with a key, as in training."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Linear(Layer):
    """``x Wᵀ + b`` at every time step."""

    inputs: int
    outputs: int

    def shapes(self, name: str) -> Shapes:
        """``weight`` (outputs, inputs) and ``bias`` (outputs,)."""
        return {f"{name}.weight": (self.outputs, self.inputs), f"{name}.bias": (self.outputs,)}

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """``(time, inputs)`` to ``(time, outputs)``."""
        return _matmul(x, params[f"{name}.weight"]) + params[f"{name}.bias"][None, :]


@dataclass(frozen=True, eq=False)
class Conv(Layer):
    """One-dimensional convolution over time, without padding; its taps ``dilation`` steps apart."""

    inputs: int
    outputs: int
    taps: int
    dilation: int = 1

    def shapes(self, name: str) -> Shapes:
        """``weight`` (outputs, inputs, taps) and ``bias`` (outputs,)."""
        weight = (self.outputs, self.inputs, self.taps)
        return {f"{name}.weight": weight, f"{name}.bias": (self.outputs,)}

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """``(time, inputs)`` to ``(time - dilation (taps - 1), outputs)``."""
        weight = params[f"{name}.weight"]
        shifts = [tap * self.dilation for tap in range(self.taps)]
        steps = x.shape[0] - shifts[-1]
        stacked = weight.transpose(2, 0, 1).reshape(-1, self.inputs)
        products = _matmul(x, stacked).reshape(-1, self.taps, self.outputs)
        out = sum(products[shift : shift + steps, tap] for tap, shift in enumerate(shifts))
        return out + params[f"{name}.bias"][None, :]


@dataclass(frozen=True, eq=False)
class Function(Layer):
    """A function without parameters: an activation, a normalisation, a clamp."""

    function: Callable[[Array], Array]

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """Apply the function."""
        return self.function(x)


@dataclass(frozen=True, eq=False)
class Skip(Layer):
    """A chain of layers beside a shortcut, cropped in time to what the chain leaves over."""

    layers: tuple[Layer, ...]
    crop: int = 0

    def shapes(self, name: str) -> Shapes:
        """Those of the chain, under ``module``."""
        return chain_shapes(self.layers, f"{name}.module")

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """``(time, features)`` to ``(time - 2 crop, features)``."""
        shortcut = x[self.crop : x.shape[0] - self.crop]
        return shortcut + apply_chain(self.layers, params, f"{name}.module", x, key)


@dataclass(frozen=True, eq=False)
class SkipLinear(Layer):
    """A linear layer beside a shortcut, padded with zeros or cropped to the layer's width."""

    linear: Linear

    def shapes(self, name: str) -> Shapes:
        """Those of the linear layer, under ``module``."""
        return self.linear.shapes(f"{name}.module")

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """``(time, inputs)`` to ``(time, outputs)``."""
        missing = self.linear.outputs - self.linear.inputs
        shortcut = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, missing, 0)))
        return shortcut + self.linear.apply(params, f"{name}.module", x)


@dataclass(frozen=True, eq=False)
class Beside(Layer):
    """A convolution's output, and beside it the input at its first tap."""

    conv: Conv

    def shapes(self, name: str) -> Shapes:
        """Those of the convolution, under ``layer``."""
        return self.conv.shapes(f"{name}.layer")

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """``(time, inputs)`` to ``(time - taps + 1, outputs + inputs)``."""
        out = self.conv.apply(params, f"{name}.layer", x)
        return jnp.concatenate([out, x[: len(out)]], axis=1)


GELU = Function(lambda x: jax.nn.gelu(x, approximate=False))
TANH = Function(jnp.tanh)
FLATTEN = Function(lambda x: x)
NORMALIZE = Function(unit_rows)


@dataclass(frozen=True, eq=False)
class Dropout(Layer):
    """Dropout of whole features for all time steps; off at evaluation."""

    rate: float

    def apply(self, params: Parameters, name: str, x: Array, key: Array | None = None) -> Array:
        """Return the input; in training with some features 0 and the others larger."""
        if key is None:
            return x
        kept = jax.random.bernoulli(key, 1 - self.rate, (1, x.shape[1]))
        return jnp.where(kept, x / (1 - self.rate), 0)


def clamp(lower: float, upper: float) -> Function:
    """Limit every feature to ``[lower, upper]``."""
    return Function(lambda x: jnp.clip(x, lower, upper))


def named(layers: tuple[Layer, ...], name: str) -> Iterator[tuple[str, str, Layer]]:
    """Name every layer of a chain: its place, the name that holds its parameters, and the layer.

    A layer that stands in a chain several times has one set of parameters, under its first place.
    """
    first: dict[int, str] = {}
    for place, layer in enumerate(layers):
        here = f"{name}.{place}"
        yield here, first.setdefault(id(layer), here), layer


def chain_shapes(layers: tuple[Layer, ...], name: str) -> Shapes:
    """Shapes of all parameters of a chain, those of a repeated layer once."""
    shapes: Shapes = {}
    for _, owner, layer in named(layers, name):
        shapes.update(layer.shapes(owner))
    return shapes


def chain_aliases(layers: tuple[Layer, ...], name: str) -> dict[str, str]:
    """Names under which torch's state dict repeats tied parameters, and the names they repeat."""
    aliases: dict[str, str] = {}
    for here, owner, layer in named(layers, name):
        if here != owner:
            aliases.update(zip(layer.shapes(here), layer.shapes(owner), strict=True))
    return aliases


def apply_chain(
    layers: tuple[Layer, ...], params: Parameters, name: str, x: Array, key: Array | None = None
) -> Array:
    """Apply one layer after the other, each with a key of its own if there is one."""
    for place, (_, owner, layer) in enumerate(named(layers, name)):
        x = layer.apply(params, owner, x, None if key is None else jax.random.fold_in(key, place))
    return x


def has_dropout(layers: tuple[Layer, ...]) -> bool:
    """Whether a chain does otherwise in training."""
    return any(
        isinstance(layer, Dropout) or (isinstance(layer, Skip) and has_dropout(layer.layers))
        for layer in layers
    )


@functools.partial(jax.jit, static_argnames="shapes")
def initialise(key: Array, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Array]:
    """Draw parameters as torch's default does: uniform within ±1/√(inputs x taps) of the layer.

    Args:
        key: A JAX PRNG key.
        shapes: The items of a :data:`Shapes`.

    Source: torch ``nn.Linear.reset_parameters``, ``nn.Conv1d.reset_parameters``.
    """
    by_name = dict(shapes)
    sizes = [math.prod(shape) for shape in by_name.values()]
    # All at once, since every draw of its own takes its time to compile.
    values = jax.random.uniform(key, (sum(sizes),), jnp.float32, -1, 1)
    params, start = {}, 0
    for (name, shape), size in zip(by_name.items(), sizes, strict=True):
        weight = by_name[f"{name.rpartition('.')[0]}.weight"]
        bound = 1 / math.sqrt(math.prod(weight[1:]))
        params[name] = bound * values[start : start + size].reshape(shape)
        start += size
    return params
