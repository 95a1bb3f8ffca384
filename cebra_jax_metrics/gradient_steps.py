"""Steps of gradient descent: a piece of a training in one jitted loop over batches."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import is_traced
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.evaluation import losses_of, subspaces
from cebra_jax_metrics.infonce import InfoNCE
from cebra_jax_metrics.model import Model, Windows
from cebra_jax_metrics.samplers import HybridBatch, MultisessionBatch, Sampler
from cebra_jax_metrics.samplers.drawing import draw
from cebra_jax_metrics.sharding import placed, spread

Optimizer = Any  # optax.GradientTransformation, or a function of the learning rate that makes one
LOGGED = ("total", "pos", "neg", "temperature")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where training stands: with it ``fit`` goes on as if it had never stopped. A pytree.

    Of several models trained at once, every array has a leading axis for them.

    Attributes:
        model: The model as it is now.
        optimizer_state: That of the optimizer.
        step: Number of steps taken.
        history: Per step, arrays ``(steps,)``: ``total`` (the loss, nats), ``pos`` and ``neg`` (its
            align and uniform part) before it, ``temperature`` after it.
    """

    model: Model
    optimizer_state: Any
    step: ArrayLike
    history: dict[str, Array] = field(default_factory=dict)


@contextlib.contextmanager
def updating(optimizer: Optimizer, rate: Array | None) -> Iterator[Any]:
    """The optimizer, and the rules of promotion that optax counts on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield optimizer if rate is None else optimizer(rate)


def trained_part(model: Model) -> dict[str, Any]:
    """What is trained of a model: parameters, and the temperature as CEBRA parametrises it."""
    trained: dict[str, Any] = {"encoders": [encoder.params for encoder in model.encoders]}
    if model.criterion.learned:
        trained["log_inverse_temperature"] = -jnp.log(jnp.asarray(model.criterion.temperature))
    return trained


def with_trained(model: Model, trained: dict[str, Any]) -> Model:
    """The model with what was trained put in its place."""
    encoders = tuple(
        replace(encoder, params=params)
        for encoder, params in zip(model.encoders, trained["encoders"], strict=True)
    )
    if not model.criterion.learned:
        return Model(encoders, model.criterion)
    temperature = jnp.exp(-trained["log_inverse_temperature"])
    return Model(encoders, replace(model.criterion, temperature=temperature))


def draws(keys: Array, samplers: list[Sampler], batch_size: int, number: int, start: int) -> Any:
    """Batches of all models ``(models, number, ...)``; those that are the same are drawn once."""
    drawn: dict[Any, Any] = {}
    names = []
    for model, sampler in enumerate(samplers):
        data = jax.random.key_data(keys[model])
        names.append((id(sampler), model if is_traced(data) else np.asarray(data).tobytes()))
        if names[-1] not in drawn:
            drawn[names[-1]] = draw(keys[model], sampler, batch_size, number, start=start)
    return jax.tree.map(lambda *x: jnp.stack(x), *(drawn[name] for name in names))


class Bad(NamedTuple):
    """The first step whose loss or gradient is not finite, and what to say of it."""

    step: int
    message: str


def advance(
    state: TrainingState,
    recordings: tuple[Array, ...],
    runs: tuple[Array, Array | None, Any],
    first: int,
    stop: int,
    *,
    optimizer: Optimizer,
    whole: bool,
    mesh: Mesh | None,
    axis_name: str | None,
) -> tuple[TrainingState, Bad | None]:
    """Take steps ``[first, stop)``, and say whether something was no longer finite."""
    model, optimizer_state, log, is_finite = spread(
        _train,
        (recordings, np.int32(first), np.int32(stop)),
        (state.model, state.optimizer_state, *runs),
        mesh=mesh,
        axis_name=axis_name,
        optimizer=optimizer,
        whole=whole,
        in_turn=jax.default_backend() == "cpu",
    )
    xp: Any = np  # without compiling for each number of steps
    if is_traced(is_finite):
        xp = jnp
    elif mesh is not None:
        log, is_finite = placed((log, is_finite), mesh, PartitionSpec())
    log, is_finite = jax.tree.map(lambda x: xp.asarray(x)[:, : stop - first], (log, is_finite))
    history = {
        name: xp.concatenate([state.history[name], values], axis=1) for name, values in log.items()
    }
    after = TrainingState(model, optimizer_state, state.step + (stop - first), history)
    if is_traced(is_finite) or is_finite.all():
        return after, None
    step = int(np.argmin(is_finite.all(axis=0)))
    which = "" if len(is_finite) == 1 else f" of model {int(np.argmin(is_finite[:, step]))}"
    return after, Bad(
        first + step,
        f"At step {first + step} the loss{which} or its gradient is not finite: the state before "
        "it is in the checkpoint of this error. Lower the learning rate or raise the temperature, "
        "and look for outliers in the recording.",
    )


@partial(jax.jit, static_argnames=("optimizer", "whole", "in_turn"))
def _train(
    recordings: tuple[Array, ...],
    first: Array,
    stop: Array,
    runs: tuple[Model, Any, Array, Array | None, Any],
    *,
    optimizer: Optimizer,
    whole: bool,
    in_turn: bool,
) -> tuple[Model, Any, dict[str, Array], Array]:
    """Train models, on a CPU one after the other, for as many steps as there are batches or less.

    Returns:
        Models, states of their optimizers, what is logged ``(models, batches)``, and whether loss
        and gradient were finite.
    """

    def train(run: tuple[Model, Any, Array, Array | None, Any]) -> Any:
        model, optimizer_state, key, rate, batches = run

        def take(carry: Any, number: Array, batch: Any) -> Any:
            trained, optimizer_state = carry
            gradient, losses = jax.grad(_objective, has_aux=True)(
                trained, model, recordings, batch, jax.random.fold_in(key, number), whole
            )
            with updating(optimizer, rate) as update:
                changes, optimizer_state = update.update(gradient, optimizer_state, trained)
            trained = jax.tree.map(lambda x, change: x + change.astype(x.dtype), trained, changes)
            finite = [jnp.isfinite(x).all() for x in (losses.loss, *jax.tree.leaves(gradient))]
            temperature = with_trained(model, trained).criterion.effective_temperature
            log = dict(zip(LOGGED, (*losses, temperature), strict=True))
            return (trained, optimizer_state), (log, jnp.stack(finite).all())

        def step(carry: Any, item: tuple[Array, Any]) -> Any:
            number, batch = item
            shapes = jax.eval_shape(take, carry, number, batch)[1]
            skipped = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return lax.cond(number < stop, take, lambda *_: (carry, skipped), carry, number, batch)

        numbers = first + jnp.arange(len(jax.tree.leaves(batches)[0]), dtype=jnp.int32)
        start = trained_part(model), optimizer_state
        (trained, optimizer_state), (log, is_finite) = lax.scan(step, start, (numbers, batches))
        return with_trained(model, trained), optimizer_state, log, is_finite

    return lax.map(train, runs) if in_turn else jax.vmap(train)(runs)


def _objective(
    trained: dict[str, Any],
    model: Model,
    recordings: tuple[Array, ...],
    batch: Any,
    key: Array,
    whole: bool,
) -> tuple[Array, InfoNCE]:
    """The loss of one batch, and its parts."""
    model = with_trained(model, trained)
    if whole:
        windows = tuple(
            Windows(encoder.encode_windows(x), len(x) - encoder.receptive_field + 1)
            for encoder, x in zip(model.encoders, recordings, strict=True)
        )
    else:
        windows, batch = _needed(model.encoders, recordings, batch, key)
    spaces = subspaces(windows, None, False, isinstance(batch, HybridBatch))
    one = jax.tree.map(lambda x: x[None], batch)
    losses = jax.tree.map(lambda x: x[0], losses_of(model.criterion, model.encoders, spaces, one))
    return losses.loss, losses


def _needed(
    encoders: tuple[Encoder, ...], recordings: tuple[Array, ...], batch: Any, key: Array
) -> tuple[tuple[Windows, ...], Any]:
    """The windows of a batch and no others, and where in them the batch is."""
    is_joint = isinstance(batch, MultisessionBatch)
    steps = jnp.stack(batch[:3] if is_joint else batch)  # (kinds, [sessions,] batch)
    windows = []
    for session, (encoder, x) in enumerate(zip(encoders, recordings, strict=True)):
        own = (steps[:, session] if is_joint else steps).reshape(-1)
        dropout = jax.random.fold_in(key, session) if encoder.has_dropout else None
        windows.append(Windows(encoder.encode_steps(x, own, dropout), len(own)))
    kinds, size = steps.shape[0], steps.shape[-1]
    left, _ = encoders[0].offset  # row i is what a recording has for time step i + left
    places = left + jnp.arange(kinds * size, dtype=jnp.int32).reshape(kinds, size)
    if not is_joint:
        return tuple(windows), type(batch)(*places)
    reference, positive, negative = jnp.broadcast_to(places[:, None], steps.shape)
    return tuple(windows), MultisessionBatch(reference, positive, negative, batch.order)
