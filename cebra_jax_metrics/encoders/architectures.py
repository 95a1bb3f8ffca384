"""Encoders by name: all architectures of CEBRA's scikit-learn interface, and registered ones."""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
from jax import Array

from cebra_jax_metrics.arrays import as_integer
from cebra_jax_metrics.encoders.layers import (
    FLATTEN,
    GELU,
    NORMALIZE,
    TANH,
    Beside,
    Conv,
    Dropout,
    Layer,
    Linear,
    Parameters,
    Shapes,
    Skip,
    SkipLinear,
    apply_chain,
    chain_aliases,
    chain_shapes,
    clamp,
    has_dropout,
    initialise,
)

Init = Callable[[Array, int, int, int], Mapping[str, Array]]
Apply = Callable[[Parameters, Array], Array]
Stack = tuple[Layer, ...]


class Architecture(Protocol):
    """What an encoder needs to know of its architecture.

    Attributes:
        offset: Steps (before, from) the current one on that an embedding depends on: the window of
            time step t is ``[t - offset[0], t + offset[1] - 1]``.
    """

    @property
    def offset(self) -> tuple[int, int]:
        """Steps before, and from, the current one on."""
        ...

    def init(self, key: Array, neurons: int, units: int, outputs: int) -> dict[str, Array]:
        """Draw parameters."""
        ...

    def shapes(self, neurons: int, units: int, outputs: int) -> Shapes | None:
        """Names and shapes of the parameters, or ``None`` where they are not known beforehand."""
        ...

    def aliases(self, neurons: int, units: int, outputs: int) -> dict[str, str]:
        """Names under which a state dict repeats tied parameters, and the names they repeat."""
        ...

    def apply(
        self,
        params: Parameters,
        X: Array,
        neurons: int,
        units: int,
        outputs: int,
        key: Array | None = None,
    ) -> Array:
        """Embed ``(time, neurons)`` as ``(time - sum(offset) + 1, outputs)``.

        With a key as in training, that is with dropout.
        """
        ...

    def has_dropout(self, neurons: int, units: int, outputs: int) -> bool:
        """Whether a key makes a difference."""
        ...


@dataclass(frozen=True)
class _Layered:
    """An architecture given by its layers."""

    offset: tuple[int, int]
    stack: Callable[[int, int, int], Stack]
    min_units: int = 1

    def _layers(self, neurons: int, units: int, outputs: int) -> Stack:
        for name, value, least in (
            ("Number of neurons", neurons, 1),
            ("Number of hidden units", units, self.min_units),
            ("Output dimension", outputs, 1),
        ):
            if value < least:
                raise ValueError(f"{name} needs to be at least {least}, but got {value}.")
        return self.stack(neurons, units, outputs)

    def init(self, key: Array, neurons: int, units: int, outputs: int) -> dict[str, Array]:
        return initialise(key, tuple(self.shapes(neurons, units, outputs).items()))

    def shapes(self, neurons: int, units: int, outputs: int) -> Shapes:
        return chain_shapes(self._layers(neurons, units, outputs), "net")

    def aliases(self, neurons: int, units: int, outputs: int) -> dict[str, str]:
        return chain_aliases(self._layers(neurons, units, outputs), "net")

    def apply(
        self,
        params: Parameters,
        X: Array,
        neurons: int,
        units: int,
        outputs: int,
        key: Array | None = None,
    ) -> Array:
        return apply_chain(self._layers(neurons, units, outputs), params, "net", X, key)

    def has_dropout(self, neurons: int, units: int, outputs: int) -> bool:
        return has_dropout(self._layers(neurons, units, outputs))


@dataclass(frozen=True)
class _Registered:
    """An architecture given by a user's functions."""

    offset: tuple[int, int]
    user_init: Init
    user_apply: Apply

    def init(self, key: Array, neurons: int, units: int, outputs: int) -> dict[str, Array]:
        return dict(self.user_init(key, neurons, units, outputs))

    def shapes(self, neurons: int, units: int, outputs: int) -> Shapes | None:
        return None

    def aliases(self, neurons: int, units: int, outputs: int) -> dict[str, str]:
        return {}

    def apply(
        self,
        params: Parameters,
        X: Array,
        neurons: int,
        units: int,
        outputs: int,
        key: Array | None = None,
    ) -> Array:
        return self.user_apply(params, X)

    def has_dropout(self, neurons: int, units: int, outputs: int) -> bool:
        return False


def _mlp(widths: tuple[int, ...], *tail: Layer) -> Stack:
    """Linear layers with GELU between them."""
    layers: list[Layer] = [FLATTEN]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [Linear(inputs, outputs), GELU]
    return (*layers[:-1], *tail)


def _offset1(n: int, h: int, d: int) -> Stack:
    return _mlp((n, h, h, h // 2, d), NORMALIZE)


def _offset1_v2(n: int, h: int, d: int) -> Stack:
    return _mlp((n, h, h, h, d), NORMALIZE)


def _offset1_skip(blocks: int, gelu_inside: bool, n: int, h: int, d: int) -> Stack:
    layers: list[Layer] = [FLATTEN, Linear(n, h), GELU]
    for _ in range(blocks):
        layers += [Skip((Linear(h, h), GELU))] if gelu_inside else [Skip((Linear(h, h),)), GELU]
    return (*layers, Linear(h, d), NORMALIZE)


def _mse(tail: tuple[Layer, ...], n: int, h: int, d: int) -> Stack:
    return _mlp((n, 30 * d, 30 * d, 10 * d, d), *tail)


def _mse_tied(
    blocks: int, residual: bool, tail: tuple[Layer, ...], n: int, h: int, d: int
) -> Stack:
    wrap: Callable[[Linear], Layer] = SkipLinear if residual else lambda linear: linear
    tied = wrap(Linear(h, h)), GELU
    head = FLATTEN, wrap(Linear(n, h)), GELU
    return (*head, *tied * blocks, wrap(Linear(h, h // 2)), GELU, Linear(h // 2, d), *tail)


def _convolutional(
    blocks: int, last: int, tail: tuple[Layer, ...], n: int, h: int, d: int
) -> Stack:
    skips = (Skip((Conv(h, h, 3), GELU), crop=1) for _ in range(blocks))
    return (Conv(n, h, 2), GELU, *skips, Conv(h, d, last), *tail)


def _offset36_dropout(in_blocks: bool, n: int, h: int, d: int) -> Stack:
    before = (Dropout(0.1),) if in_blocks else ()
    skips = (Skip((*before, Conv(h, h, 3), GELU), crop=1) for _ in range(16))
    return (Conv(n, h, 2), Dropout(0.1), GELU, *skips, Conv(h, d, 3), NORMALIZE)


def _subsampling(blocks: int, last: int, n: int, h: int, d: int) -> Stack:
    """Strides of 2 and 2, so that what follows looks at every fourth step: dilated, not strided.

    So every time step has the embedding that its own window gives.
    """
    skips = (Skip((Conv(h, h, 3, dilation=4), GELU), crop=4) for _ in range(blocks))
    head = Beside(Conv(n, h, 4)), Conv(n + h, h, 3, dilation=2), GELU
    return (*head, *skips, Conv(h, d, last, dilation=4), NORMALIZE)


def _subsampling_mlp(n: int, h: int, d: int) -> Stack:
    return (Beside(Conv(n, h, 4)), *_mlp((n + h, h, h, h // 2, d), NORMALIZE))


def _cebra_architectures() -> dict[str, Architecture]:
    partial = functools.partial
    one = partial(_Layered, (0, 1))
    table: dict[str, Architecture] = {
        "offset1-model": one(_offset1, 2),
        "offset1-model-v2": one(_offset1_v2, 2),
        "offset1-model-v3": one(partial(_offset1_skip, 2, False), 2),
        "offset1-model-v4": one(partial(_offset1_skip, 4, True), 2),
        "offset1-model-v5": one(partial(_offset1_skip, 4, False), 2),
        "offset1-model-mse": one(partial(_mse, ())),
        "offset1-model-mse-tanh": one(partial(_mse, (TANH,))),
    }
    limits = (1000, 100, 50, 25, 20, 15, 10, 5, 1)
    for lower in limits:
        for upper in limits:
            table[f"offset1-model-mse-clip-{lower}-{upper}"] = one(
                partial(_mse, (clamp(-lower, upper),))
            )
    for kind, residual in (("v2", False), ("resnet", True)):
        for blocks in range(1, 11):
            for suffix, tail in (("", ()), ("-tanh", (TANH,))):
                table[f"offset1-model-mse-{kind}-{blocks}layers{suffix}"] = one(
                    partial(_mse_tied, blocks, residual, tail), 2
                )
    for size, offset, blocks, last in (
        (5, (2, 3), 1, 2),
        (10, (5, 5), 3, 3),
        (15, (7, 8), 6, 2),
        (20, (10, 10), 8, 3),
        (36, (18, 18), 16, 3),
        (40, (20, 20), 18, 3),
        (50, (25, 25), 23, 3),
    ):
        stack = partial(_convolutional, blocks, last)
        table[f"offset{size}-model"] = _Layered(offset, partial(stack, (NORMALIZE,)))
        if size == 10:
            table["offset10-model-mse"] = _Layered(offset, partial(stack, ()))
            table["offset10-model-mse-tanh"] = _Layered(offset, partial(stack, (TANH,)))
    for name, in_blocks in (("dropout", False), ("more-dropout", True)):
        table[f"offset36-model-{name}"] = _Layered((18, 18), partial(_offset36_dropout, in_blocks))
    for name, old_name, side, architecture in (
        ("offset40-model-4x-subsample", "resample-model", 20, partial(_subsampling, 3, 3)),
        ("offset20-model-4x-subsample", "resample5-model", 10, partial(_subsampling, 1, 2)),
        ("offset4-model-2x-subsample", "resample1-model", 2, _subsampling_mlp),
    ):
        min_units = 2 if architecture is _subsampling_mlp else 1
        table[name] = table[old_name] = _Layered((side, side), architecture, min_units)
    return table


_ARCHITECTURES = _cebra_architectures()
_BUILT_IN = frozenset(_ARCHITECTURES)
# What CEBRA has besides, and why it is not here.
_REFUSED = {
    r"supervised\d+-model": "supervised models predict labels, InfoNCE says nothing of them",
}


def architecture_names() -> list[str]:
    """Names of all known architectures.

    Returns:
        CEBRA's and registered ones, sorted.
    """
    return sorted(_ARCHITECTURES)


def get_architecture(name: str) -> Architecture:
    """Return the architecture of that name.

    Raises:
        ValueError: The name is unknown, or names a kind of model that is not supported.
    """
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    for pattern, reason in _REFUSED.items():
        if re.fullmatch(pattern, str(name)):
            raise ValueError(f"Architecture {name!r} cannot be used here: {reason}.")
    close = difflib.get_close_matches(str(name), _ARCHITECTURES)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"Unknown architecture {name!r}.{hint} A custom one has to be registered first: "
        f"register_architecture({name!r}, init=..., apply=..., offset=(left, right))."
    )


def register_architecture(
    name: str, *, init: Init, apply: Apply, offset: tuple[int, int], replace: bool = False
) -> None:
    """Make a custom encoder known by name.

    Args:
        name: The name that ``Encoder.architecture`` and saved files refer to.
        init: ``(key, num_neurons, num_hidden_units, output_dimension) -> params``, a dictionary of
            arrays.
        apply: ``(params, X) -> embedding`` of ``(time, neurons)`` as ``(time - sum(offset) + 1,
            output_dimension)``; pure, since it is traced by JAX.
        offset: ``(left, right)``, right at least 1: an embedding depends on the steps from
            ``t - left`` to ``t + right - 1``.
        replace: Allow registering the same name again.

    Raises:
        ValueError: The name is taken, or the offset is not valid.
        TypeError: ``init`` or ``apply`` is not callable.

    >>> import jax
    >>> register_architecture(
    ...     "linear", init=lambda key, n, h, d: {"w": jax.random.normal(key, (n, d))},
    ...     apply=lambda params, X: X @ params["w"], offset=(0, 1), replace=True)
    >>> "linear" in architecture_names()
    True
    """
    if name in _BUILT_IN or (name in _ARCHITECTURES and not replace):
        raise ValueError(f"Architecture {name!r} exists already; choose another name.")
    if not callable(init) or not callable(apply):
        raise TypeError("init and apply have to be functions.")
    left, right = offset
    offset = as_integer("offset[0]", left, at_least=0), as_integer("offset[1]", right, at_least=1)
    if name in _ARCHITECTURES:
        jax.clear_caches()  # compiled functions know an architecture by its name
    _ARCHITECTURES[name] = _Registered(offset, init, apply)
