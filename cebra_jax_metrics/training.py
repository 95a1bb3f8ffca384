"""Training of encoders in JAX: jitted loops over batches that are drawn ahead of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import (
    as_integer,
    as_key,
    as_numpy,
    as_rows,
    check_dimensions,
    check_finite,
    is_traced,
    wide,
)
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.evaluation import check_lengths
from cebra_jax_metrics.gradient_steps import (
    LOGGED,
    Optimizer,
    TrainingState,
    advance,
    draws,
    trained_part,
    updating,
)
from cebra_jax_metrics.infonce import SIMILARITIES
from cebra_jax_metrics.model import Checkpoint, Criterion, Model, as_model, as_recording
from cebra_jax_metrics.samplers import (
    DeltaNormal,
    Discrete,
    DiscreteMultisession,
    FullBatch,
    Hybrid,
    Multisession,
    Sampler,
    Soft,
    Time,
)
from cebra_jax_metrics.samplers.drawing import MAX_QUERIES_AT_ONCE, check_batch_size

LEARNING_RATE = 3e-4  # CEBRA's default
MAX_STEPS_AT_ONCE = 512
INITIAL = 2**32 - 1


class TrainingError(RuntimeError):
    """The loss or a gradient is no longer finite.

    Attributes:
        step: The first step at which that was so.
        checkpoint: All as it was before it, with ``training`` to go on from.
    """

    def __init__(self, message: str, step: int, checkpoint: Checkpoint) -> None:
        super().__init__(message)
        self.step, self.checkpoint = step, checkpoint


def fit(
    key: ArrayLike,
    X: Any,
    sampler: Sampler | Sequence[Sampler],
    *,
    architecture: str = "offset10-model",
    num_hidden_units: int = 32,
    output_dimension: int = 8,
    model: Model | Checkpoint | None = None,
    optimizer: Optimizer = None,
    learning_rate: ArrayLike | None = None,
    num_steps: int,
    batch_size: int | None = None,
    similarity: str = "cosine",
    temperature: ArrayLike = 1.0,
    learn_temperature: bool = False,
    min_temperature: float = 0.0,
    state: TrainingState | None = None,
    callback: Callable[[TrainingState], object] | None = None,
    callback_every: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Checkpoint:
    """Train an encoder, or one per session, to minimise InfoNCE on batches of a sampler.

    Step i takes batch i of :func:`draw`, so that with the same key the result is the same, however
    the steps are cut. Encoders start from torch's default distribution.

    Several models are trained in one call where ``key``, ``learning_rate`` or ``temperature`` are
    arrays ``(models,)``, or ``sampler`` is a list, such as one for each shift of the labels. What
    is no array is shared. The model of the result is then a stack of models, for ``jax.vmap`` and
    :func:`spread`.

    Args:
        key: A JAX PRNG key, or several.
        X: The recording ``(time, neurons)``; a list of one per session with a sampler of several.
        sampler: One of ``cebra_jax_metrics.samplers``, or a list of one for each model.
        architecture: Its name, see :func:`architecture_names`.
        num_hidden_units: Width of the hidden layers.
        output_dimension: Features of the embedding.
        model: Train this one further, instead of a new one; its own architecture, similarity and
            temperature are kept.
        optimizer: One of optax, by default Adam; or a function that makes one of a learning rate,
            such as ``optax.adam``, which is compiled once for all rates.
        learning_rate: For such a function; 3e-4 by default.
        num_steps: Number of steps in all, those of ``state`` included.
        batch_size: References, positives and negatives per batch (and session); needed unless the
            sampler is ``samplers.FullBatch``.
        similarity: ``"cosine"`` or ``"euclidean"``.
        temperature: What similarities are divided by, or where learning it starts.
        learn_temperature: Train the log of the temperature too.
        min_temperature: Lower limit of a learned temperature.
        state: Go on from here: the ``training`` of an earlier result, or what a callback was given.
            The other arguments have to be the same.
        callback: Called with the state every ``callback_every`` steps and at the end; what it
            returns ends the training if it is true.
        callback_every: Steps between its calls.
        progress: Wraps the loop over chunks of steps, such as ``tqdm.tqdm``.
        mesh: Devices to spread several models over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        The model with settings under CEBRA's names, so that it can be scored and saved, and its
        history; ``training`` is the state to go on from.

    Raises:
        ImportError: optax is not installed.
        TrainingError: The loss is no longer finite; it says since when and holds what was before.
        ValueError: The recording, sampler, architecture, optimizer or state do not fit together, or
            a number is out of range.
        TypeError: The key is no JAX key, the optimizer none of optax, or the sampler ``Soft``.

    Source: CEBRA 0.6.1 ``cebra.CEBRA.fit``, ``cebra.solver``.

    >>> import jax, numpy as np
    >>> from cebra_jax_metrics import samplers
    >>> X = np.random.default_rng(0).normal(size=(200, 5))
    >>> result = fit(jax.random.key(0), X, samplers.Time(200), architecture="offset1-model",
    ...              num_steps=3, batch_size=32)
    >>> result.history["total"].shape
    (3,)
    """
    num_steps = as_integer("num_steps", num_steps, at_least=1)
    every = num_steps if callback_every is None else callback_every
    every = as_integer("callback_every", every, at_least=1)
    optimizer, learning_rate = _checked_optimizer(optimizer, learning_rate)
    if model is None:
        criterion = _checked_criterion(similarity, temperature, learn_temperature, min_temperature)
    else:
        criterion = as_model(model).criterion
    keys, samplers, rates, temperatures, is_stack = _stacked(
        as_key(key), sampler, learning_rate, criterion.temperature
    )
    batch_size = check_batch_size(samplers[0], batch_size)
    recordings = _by_session(X, samplers[0])
    if model is None:
        sizes = architecture, num_hidden_units, output_dimension
        make = partial(_new_encoders, tuple(map(_width, recordings)), sizes)
    else:
        make = partial(_same_encoders, as_model(model).encoders)
    initial = partial(
        jax.vmap(partial(_initial, make, criterion, optimizer)), keys, temperatures, rates
    )
    expected = jax.eval_shape(initial)
    encoders = expected.model.encoders
    values = _checked_recordings(recordings, encoders)
    for each in samplers:
        check_lengths(each, encoders, [len(x) for x in values])
    if state is None:
        state = initial()
    else:
        if not isinstance(state, TrainingState):
            raise TypeError(f"state has to be a TrainingState, got {type(state).__name__}.")
        state = state if is_stack else jax.tree.map(lambda x: x[None], state)
        _check_state(state, expected, num_steps)
    settings = {
        "model_architecture": encoders[0].architecture,
        "num_hidden_units": encoders[0].num_hidden_units,
        "output_dimension": encoders[0].output_dimension,
        "distance": criterion.similarity,
        "temperature_mode": "auto" if criterion.learned else "constant",
        "max_iterations": num_steps,
        "batch_size": None if isinstance(samplers[0], FullBatch) else batch_size,
        **_sampling_settings(samplers[0]),
    }
    if not is_stack and not is_traced(rates, temperatures):
        settings["temperature"] = float(temperatures[0])
        settings |= {} if rates is None else {"learning_rate": float(rates[0])}
    needs = 3 * batch_size * encoders[0].receptive_field
    take = partial(
        advance,
        optimizer=optimizer,
        whole=len(values[0]) <= needs and not encoders[0].has_dropout,
        mesh=mesh,
        axis_name=axis_name,
    )

    def result(state: TrainingState) -> Checkpoint:
        state = state if is_stack else jax.tree.map(lambda x: x[0], state)
        history: Any = state.history
        return Checkpoint(state.model, settings, history, _versions(), state)

    most = min(every, MAX_STEPS_AT_ONCE, max(1, MAX_QUERIES_AT_ONCE // batch_size))
    capacity = 2 ** math.ceil(math.log2(most))
    pieces = _pieces(_step(state), num_steps, every, capacity)
    for number in progress(range(len(pieces))):
        first, stop = pieces[number]
        batches = draws(keys, samplers, batch_size, capacity, first)
        runs = keys, rates, batches
        after, bad = take(state, values, runs, first, stop)
        if bad is not None:
            if bad.step > first:
                state, _ = take(state, values, runs, first, bad.step)
            raise TrainingError(bad.message, bad.step, result(state))
        state = after
        is_due = stop % every == 0 or stop == num_steps
        if callback is not None and is_due and callback(result(state).training):
            break
    return result(state)


def _stacked(
    key: Array, sampler: Any, rate: ArrayLike | None, temperature: ArrayLike
) -> tuple[Array, list[Sampler], Array | None, Array, bool]:
    """What differs between models, each with an axis for them, and whether it was asked for."""
    several = isinstance(sampler, list | tuple)
    shapes = {
        "key": key.shape,
        "learning_rate": np.shape(rate) if rate is not None else (),
        "temperature": np.shape(temperature),
        "sampler": (len(sampler),) if several else (),
    }
    numbers = {shape for shape in shapes.values() if shape}
    if len(numbers) > 1 or any(len(shape) > 1 or 0 in shape for shape in numbers):
        raise ValueError(
            "What differs between models has to have one axis, of one length for all, got the "
            f"shapes {shapes}."
        )
    (number,) = numbers or {(1,)}
    samplers = list(sampler) if several else [sampler] * number[0]
    if any(isinstance(each, Soft) for each in samplers):
        raise TypeError(
            "Encoders are trained on positives that are time steps: pass the sampler of the Soft "
            "one, or differentiate evaluate(model, X, batch)."
        )
    if len({type(each) for each in samplers}) > 1:
        raise ValueError(f"The samplers have to be of one kind, got {samplers}.")
    keys, temperatures = jnp.broadcast_to(key, number), _floats(temperature, number)
    rates = None if rate is None else _floats(rate, number)
    return keys, samplers, rates, temperatures, bool(numbers)


def _floats(x: ArrayLike, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)


def _new_encoders(
    widths: tuple[int, ...], sizes: tuple[str, int, int], key: Array
) -> tuple[Encoder, ...]:
    architecture, units, outputs = sizes
    keys = jax.random.split(key, len(widths))
    return tuple(
        Encoder.init(key, architecture, width, units, outputs)
        for key, width in zip(keys, widths, strict=True)
    )


def _same_encoders(encoders: tuple[Encoder, ...], key: Array) -> tuple[Encoder, ...]:
    return encoders


def _initial(
    make: Callable[[Array], tuple[Encoder, ...]],
    criterion: Criterion,
    optimizer: Optimizer,
    key: Array,
    temperature: Array,
    rate: Array | None,
) -> TrainingState:
    """A model, and the state of its optimizer, before the first step."""
    lowest = jnp.asarray(criterion.min_temperature, jnp.float32)
    criterion = replace(criterion, temperature=temperature, min_temperature=lowest)
    # Batches take the keys 0, 1, ... of ``fold_in``: the last of all is far from them.
    model = Model(make(jax.random.fold_in(key, INITIAL)), criterion)
    with updating(optimizer, rate) as update:
        start = update.init(trained_part(model))
    nothing = jnp.zeros(0, jnp.float32)
    return TrainingState(model, start, jnp.int32(0), dict.fromkeys(LOGGED, nothing))


def _by_session(X: Any, sampler: Sampler) -> tuple[Any, ...]:
    if not isinstance(sampler, Multisession | DiscreteMultisession):
        return (X,)
    sessions = len(sampler.labels)
    if not isinstance(X, list | tuple) or len(X) != sessions:
        raise ValueError(
            f"A sampler of {sessions} sessions takes a list of one recording for each of them."
        )
    return tuple(X)


def _width(X: Any) -> int:
    X = as_rows(X)
    check_dimensions(X, least=2)
    return X.shape[1]


def _checked_recordings(
    recordings: tuple[Any, ...], encoders: tuple[Encoder, ...]
) -> tuple[Array, ...]:
    """All rows on the device, which batches are taken from."""
    if len(recordings) != len(encoders):
        raise ValueError(
            f"There are {len(recordings)} recordings for a model of {len(encoders)} sessions."
        )
    values = []
    for session, (X, encoder) in enumerate(zip(recordings, encoders, strict=True)):
        X = as_recording(X, encoder, session)
        X = X if isinstance(X, Array) else jnp.asarray(as_numpy(X[0 : X.shape[0]]))
        check_finite(X, "X")
        values.append(X.astype(wide(X.dtype)))
    return tuple(values)


def _pieces(start: int, stop: int, every: int, capacity: int) -> list[tuple[int, int]]:
    """First step of every piece, and the one after its last: none is across a multiple."""
    ends = sorted({*range(start - start % every + every, stop, every), stop})
    pieces = []
    for end in ends:
        pieces += [(i, min(i + capacity, end)) for i in range(start, end, capacity)]
        start = end
    return pieces


def _checked_optimizer(
    optimizer: Optimizer, rate: ArrayLike | None
) -> tuple[Optimizer, ArrayLike | None]:
    try:
        import optax
    except ImportError:
        raise ImportError("Training needs optax: pip install 'cebra-jax-metrics[fit]'.") from None
    optimizer = optax.adam if optimizer is None else optimizer
    if isinstance(optimizer, optax.GradientTransformation):
        if rate is not None:
            raise ValueError(
                "The optimizer has its learning rate already: leave learning_rate out, or pass a "
                "function of the learning rate as optimizer, such as optax.adam."
            )
        return optimizer, None
    if not callable(optimizer):
        raise TypeError(
            "optimizer has to be one of optax, such as optax.adam(3e-4), or a function of the "
            f"learning rate such as optax.adam, got {optimizer!r}."
        )
    rate = LEARNING_RATE if rate is None else rate
    _check_positive("learning_rate", rate)
    return optimizer, rate


def _checked_criterion(
    similarity: str, temperature: ArrayLike, learned: bool, min_temperature: float
) -> Criterion:
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"Unknown similarity {similarity!r}: expected one of {sorted(SIMILARITIES)}."
        )
    _check_positive("temperature", temperature)
    if not 0 <= min_temperature < math.inf:
        raise ValueError(f"min_temperature has to be at least 0, got {min_temperature!r}.")
    return Criterion(similarity, temperature, bool(learned), min_temperature)


def _check_positive(name: str, value: ArrayLike) -> None:
    if is_traced(value):
        return
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" or not ((numbers > 0) & np.isfinite(numbers)).all():
        raise ValueError(f"{name} has to be finite and above 0, got {value!r}.")


def _check_state(state: TrainingState, expected: TrainingState, num_steps: int) -> None:
    for name in ("model", "optimizer_state", "step"):
        found, wanted = (getattr(x, name) for x in (state, expected))
        structures = [str(jax.tree.structure(tree)) for tree in (found, wanted)]
        if structures[0] != structures[1]:
            raise ValueError(
                f"The {name} of the state is another than that of these arguments: "
                f"{structures[0]} instead of {structures[1]}."
            )
        shapes = [[np.shape(x) for x in jax.tree.leaves(tree)] for tree in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The {name} of the state has arrays of the shapes {shapes[0]}, with these "
                f"arguments they are {shapes[1]}."
            )
    if _step(state) >= num_steps:
        raise ValueError(
            f"The state has taken {_step(state)} steps already: num_steps, which counts them, has "
            f"to be larger, got {num_steps}."
        )


def _step(state: TrainingState) -> int:
    return 0 if is_traced(state.step) else int(np.max(np.asarray(state.step)))


def _sampling_settings(sampler: Any) -> dict[str, Any]:
    """What CEBRA calls what a sampler does."""
    if isinstance(sampler, FullBatch):
        return _sampling_settings(sampler.conditional)
    if isinstance(sampler, Hybrid):
        return {**_sampling_settings(sampler.behavior), "hybrid": True, **_offset(sampler)}
    if isinstance(sampler, Multisession | DiscreteMultisession):
        return {
            "conditional": "time_delta",
            "num_sessions": len(sampler.labels),
            "label_types": [[_label_type(labels) for labels in sampler.labels]],
            **_offset(sampler),
        }
    by_name = {"labels": None, "continuous": None, "discrete": None}
    labels = [getattr(sampler, name) for name in by_name if hasattr(sampler, name)]
    settings = {
        "conditional": {Time: "time", DeltaNormal: "delta_normal"}.get(type(sampler), "time_delta"),
        "label_types": [_label_type(label) for label in labels],
        **_offset(sampler),
    }
    if isinstance(sampler, DeltaNormal):
        settings["delta"] = _number(sampler.delta)
    if isinstance(sampler, Discrete):
        settings["prior"] = sampler.prior
    return settings


def _offset(sampler: Any) -> dict[str, Any]:
    has_offset = hasattr(sampler, "time_offset")
    return {"time_offsets": _number(sampler.time_offset)} if has_offset else {}


def _number(x: Any) -> Any:
    return None if is_traced(x) else np.asarray(x).item()


def _label_type(labels: Any) -> dict[str, Any]:
    is_discrete = jnp.issubdtype(labels.dtype, jnp.integer)
    return {"dtype": "int64" if is_discrete else "float32", "shape": list(labels.shape)}


def _versions() -> dict[str, str]:
    import optax

    return {"jax": jax.__version__, "optax": optax.__version__}
