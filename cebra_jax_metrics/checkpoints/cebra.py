"""From CEBRA's estimators, files and state dicts to a checkpoint, and back to a state dict."""

import hashlib
import os
import re
import reprlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cebra_jax_metrics.arrays import as_numpy
from cebra_jax_metrics.checkpoints.torch_zip import CheckpointError, DType, Record, read_torch_zip
from cebra_jax_metrics.encoders import Encoder, get_architecture
from cebra_jax_metrics.encoders.layers import Shapes
from cebra_jax_metrics.model import Checkpoint, Criterion, Model, as_model

# Constructor arguments of CEBRA 0.6.1 with their defaults. Older files lack some.
SETTINGS: dict[str, Any] = {
    "model_architecture": "offset1-model",
    "device": "cuda_if_available",
    "criterion": "infonce",
    "distance": "cosine",
    "conditional": None,
    "temperature": 1.0,
    "temperature_mode": "constant",
    "min_temperature": 0.1,
    "time_offsets": 1,
    "delta": None,
    "max_iterations": 10000,
    "max_adapt_iterations": 500,
    "batch_size": None,
    "learning_rate": 3e-4,
    "optimizer": "adam",
    "output_dimension": 8,
    "verbose": False,
    "num_hidden_units": 32,
    "pad_before_transform": True,
    "hybrid": False,
    "optimizer_kwargs": [
        ["betas", [0.9, 0.999]],
        ["eps", 1e-8],
        ["weight_decay", 0],
        ["amsgrad", False],
    ],
    "masking_kwargs": None,
}
_KINDS: dict[str, tuple[type, ...]] = {
    "model_architecture": (str,),
    "num_hidden_units": (int,),
    "output_dimension": (int,),
    "batch_size": (int, type(None)),
    "temperature": (int, float),
    "min_temperature": (int, float, type(None)),
    "delta": (int, float, type(None)),
    "conditional": (str, type(None)),
    "prior": (str, type(None)),
    "hybrid": (bool,),
    "pad_before_transform": (bool,),
    "num_sessions": (int, type(None)),
}
_SOLVERS = ("single-session", "single-session-full", "single-session-hybrid", "multi-session")
_STATE = ("label_types_", "n_features_", "n_features_in_", "num_sessions_", "solver_name_")
_MOST_MODULES = 20_000  # in a pickled model, those in it and their parameters counted
_LONGEST_NAME = 1000
_HISTORY = ("total", "pos", "neg", "temperature")
_LOG_INVERSE_TEMPERATURE = "log_inverse_temperature"


def from_cebra(estimator: Any) -> Checkpoint:
    """Import a fitted ``cebra.CEBRA``; the estimator is read, never changed.

    Args:
        estimator: A fitted estimator, single- or multi-session, trained in any way.

    Returns:
        Its model (parameters as float32), settings, training history and metadata.

    Raises:
        sklearn.exceptions.NotFittedError: The estimator is not fitted.
        TypeError: The object is no CEBRA estimator.
        ValueError: Its architecture is unknown here, or its parameters do not fit it.
    """
    from sklearn.utils.validation import check_is_fitted  # takes its time to import

    if not hasattr(estimator, "get_params") or not hasattr(estimator, "fit"):
        raise TypeError(f"Expected a fitted cebra.CEBRA, got {type(estimator).__name__}.")
    check_is_fitted(estimator, "n_features_")
    state = {name: getattr(estimator, name) for name in _STATE if hasattr(estimator, name)}
    state_dict = estimator.state_dict_
    payload = {
        "args": estimator.get_params(),
        "state": state,
        "state_dict": state_dict,
        "metadata": {"cebra_version": state_dict.get("version", "unknown")},
    }
    return _from_payload(payload)


# Estimators that were imported before: their solver, what marked its state, the checkpoint.
_imported: weakref.WeakKeyDictionary[Any, tuple[weakref.ref, Any, Checkpoint]] = (
    weakref.WeakKeyDictionary()
)


def import_once(estimator: Any) -> Checkpoint:
    """As :func:`from_cebra`, but an estimator that has not changed is not converted again.

    Fitting again, further or to other data, moving to a device and other settings are noticed.
    """
    solver = getattr(estimator, "solver_", None)
    modules: list[Any] = [getattr(solver, name, None) for name in ("model", "criterion")]
    if not all(hasattr(module, "parameters") for module in modules):
        return from_cebra(estimator)
    digest = hashlib.blake2b()
    for tensor in (tensor for module in modules for tensor in module.parameters()):
        digest.update(as_numpy(tensor).tobytes())
    steps = len(getattr(solver, "history", ())), len(getattr(solver, "log", {}).get("total", ()))
    mark = (
        digest.digest(),
        steps,
        repr(estimator.get_params()),
        repr(vars(estimator).get("label_types_")),
    )
    known = _imported.get(estimator)
    if known is not None and known[0]() is solver and known[1] == mark:
        return known[2]
    checkpoint = from_cebra(estimator)
    _imported[estimator] = weakref.ref(solver), mark, checkpoint
    return checkpoint


def read_cebra_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file that ``cebra.CEBRA.save`` wrote, without torch, CEBRA or executing any of it."""
    payload = read_torch_zip(path)
    try:
        payload = _payload_of(payload) if isinstance(payload, Record) else payload
        _check_extent(payload, os.stat(path).st_size)
        return _from_payload(payload)
    except ValueError as error:
        raise CheckpointError(f"Cannot use {str(path)!r}: {error}") from None
    except Exception as error:  # whatever a damaged file makes the code below stumble over
        raise CheckpointError(
            f"Cannot use {str(path)!r}: it is not laid out as CEBRA's files are "
            f"({type(error).__name__})."
        ) from error


def from_state_dict(
    state_dict: Mapping[str, Any],
    *,
    model_architecture: str,
    num_neurons: int | Sequence[int] | None = None,
    **settings: Any,
) -> Checkpoint:
    """Make a checkpoint of a bare state dict of CEBRA's torch model.

    Args:
        state_dict: Names to arrays (NumPy, JAX or torch), ``net.0.weight`` and so on; with a prefix
            ``0.``, ``1.``, ... per session for several sessions. It may hold the criterion's
            ``log_inverse_temperature``.
        model_architecture: Name of the architecture.
        num_neurons: Features of the recording, one number or one per session. Needed for registered
            architectures only; the parameters of CEBRA's own tell it.
        **settings: Further constructor arguments of ``cebra.CEBRA`` that are not at their defaults,
            above all ``num_hidden_units``, ``output_dimension``, ``batch_size`` (CEBRA's default,
            ``None``, is scored on all time steps at once), ``distance``, ``temperature`` and
            ``temperature_mode``.

    Returns:
        A checkpoint without history, which does not know the labels it was trained with.

    Raises:
        TypeError: CEBRA has no such setting.
        ValueError: The architecture is unknown, or parameters are missing, left over or of the
            wrong shape; the message lists them.
    """
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise TypeError(
            f"Unknown settings {sorted(unknown)}: expected constructor arguments of cebra.CEBRA, "
            f"{sorted(SETTINGS)}."
        )
    parameters = _without_module({name: as_numpy(value) for name, value in state_dict.items()})
    criterion = {
        name: parameters.pop(name) for name in (_LOG_INVERSE_TEMPERATURE,) if name in parameters
    }
    settings = _settings({"model_architecture": model_architecture, **settings})
    model = _model(parameters, criterion, settings, num_neurons)
    settings |= {"num_sessions": _num_sessions(parameters, num_neurons), "label_types": None}
    return Checkpoint(model, settings)


def to_state_dict(model: Model | Checkpoint) -> dict[str, np.ndarray]:
    """Return the parameters of all encoders as CEBRA's torch model names them.

    Tied parameters are repeated under all their names; parameters of several sessions are prefixed
    ``0.``, ``1.``, ... The values become tensors with ``torch.from_numpy``.

    Args:
        model: A model or a checkpoint.

    Returns:
        Arrays by the names of ``cebra.CEBRA.solver_.model.state_dict()``.
    """
    encoders = as_model(model).encoders
    is_multi = len(encoders) > 1 or (isinstance(model, Checkpoint) and model.is_multisession)
    state: dict[str, np.ndarray] = {}
    for session, encoder in enumerate(encoders):
        prefix = f"{session}." if is_multi else ""
        aliases = get_architecture(encoder.architecture).aliases(*encoder.sizes)
        names = {**{name: name for name in encoder.params}, **aliases}
        state.update(
            (prefix + name, np.array(encoder.params[owner])) for name, owner in names.items()
        )
    return state


def _payload_of(estimator: Record) -> dict[str, Any]:
    """What CEBRA would have saved of an estimator that was pickled whole."""
    if estimator.kind != "CEBRA":
        raise CheckpointError(f"it holds an object of class {estimator.kind}, no CEBRA estimator.")
    attributes = estimator.attributes
    solver = attributes.get("solver_")
    if not isinstance(solver, Record):
        raise CheckpointError("the estimator that it holds is not fitted.")
    model, criterion = (solver.attributes.get(name) for name in ("model", "criterion"))
    return {
        "args": {name: attributes[name] for name in SETTINGS if name in attributes},
        "state": {name: attributes[name] for name in _STATE if name in attributes},
        "state_dict": {
            "model": dict(_named_parameters(model)),
            "criterion": dict(_named_parameters(criterion)),
            "log": solver.attributes.get("log", {}),
            "loss": solver.attributes.get("history", []),
        },
    }


def _check_extent(payload: Any, size: int) -> None:
    """Refuse a payload that is far larger than its file, which it is by naming parts repeatedly.

    What comes after takes memory and time for every such name.
    """
    left, extent, most = [payload], 0, 4 * size + 2**20
    while left:
        value = left.pop()
        if isinstance(value, np.ndarray):
            extent += value.nbytes
        elif isinstance(value, str | list | tuple | dict):
            extent += len(value)
        if extent > most:
            raise CheckpointError(
                "it repeats its parts again and again, to far more than the file holds."
            )
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value


def _named_parameters(root: Any) -> Iterator[tuple[str, Any]]:
    """Parameters of a pickled torch module and of those in it, by torch's names."""
    left, number = [("", root)], 1
    while left:
        prefix, module = left.pop()
        if not isinstance(module, Record):
            raise CheckpointError("its modules are not laid out as torch's are.")
        parameters, inner = (module.attributes.get(key, {}) for key in ("_parameters", "_modules"))
        number += len(parameters) + len(inner)
        longest = max((len(prefix) + len(name) for name in (*parameters, *inner)), default=0)
        if number > _MOST_MODULES or longest > _LONGEST_NAME:
            raise CheckpointError("its modules are not laid out as torch's are.")
        yield from ((f"{prefix}{n}", value) for n, value in parameters.items() if value is not None)
        left += [(f"{prefix}{n}.", m) for n, m in reversed(inner.items()) if m is not None]


def _from_payload(payload: Any) -> Checkpoint:
    """A checkpoint of the dictionary that CEBRA saves."""
    if not isinstance(payload, dict):
        raise CheckpointError(f"expected a dictionary, got {type(payload).__name__}.")
    missing = [key for key in ("args", "state", "state_dict") if key not in payload]
    if missing:
        raise CheckpointError(f"Missing keys in data dictionary: {', '.join(missing)}.")
    args, state, state_dict = payload["args"], payload["state"], payload["state_dict"]
    settings = _settings(args)
    solver = state.get("solver_name_", "single-session")
    if not isinstance(solver, str) or solver not in _SOLVERS:
        raise CheckpointError(
            f"models trained by the solver {_text(solver)} are not supported, only by {_SOLVERS}."
        )
    parameters = _without_module(state_dict["model"])
    num_neurons = state.get("n_features_in_", state.get("n_features_"))
    model = _model(parameters, state_dict.get("criterion", {}), settings, num_neurons)
    settings |= {
        "num_sessions": _num_sessions(parameters, num_neurons),
        "label_types": _label_types(state.get("label_types_")),
    }
    metadata = {str(k): _text(v) for k, v in payload.get("metadata", {}).items()}
    return Checkpoint(model, settings, _history(state_dict), metadata)


def _settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """CEBRA's arguments as plain values: missing ones at their defaults, used ones checked."""
    settings = {**SETTINGS, **{str(name): _plain(value) for name, value in args.items()}}
    check_kinds(settings)
    for name, known in (
        ("criterion", ("infonce",)),
        ("distance", ("cosine", "euclidean")),
        ("temperature_mode", ("constant", "auto")),
    ):
        if settings[name] not in known:
            raise CheckpointError(
                f"setting {name} has to be one of {known}, got {reprlib.repr(settings[name])}."
            )
    largest = float(np.finfo(np.float32).max)
    if not 0 < settings["temperature"] < largest:
        raise CheckpointError("temperature has to be a finite number above 0.")
    if not 0 <= (settings["min_temperature"] or 0) < largest:
        raise CheckpointError("min_temperature has to be None or a finite number of at least 0.")
    return settings


def check_kinds(settings: Mapping[str, Any]) -> None:
    """Check the kinds of those settings that others count on, where they are given."""
    for name in _KINDS.keys() & settings.keys():
        types, value = _KINDS[name], settings[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(
                f"setting {name} has to be of type {' or '.join(t.__name__ for t in types)}, "
                f"got {reprlib.repr(value)}."
            )
        if isinstance(value, int) and float not in types and value.bit_length() > 31:
            raise CheckpointError(f"setting {name} is too large: {reprlib.repr(value)}.")


def _without_module(state: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a hybrid model are those of the encoder that it wraps."""
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _plain(value: Any, depth: int = 3) -> Any:
    """A setting as JSON can hold it; of what it cannot hold, or is too large, the kind."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.size <= 32:
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | dict) and depth and len(value) <= 32:
        if isinstance(value, dict):
            return {str(key): _plain(item, depth - 1) for key, item in value.items()}
        return [_plain(item, depth - 1) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    """Text as it is; of anything else its kind, since a file's objects may be endless to print."""
    return value[:200] if isinstance(value, str) else f"({type(value).__name__})"


def _num_sessions(
    parameters: Mapping[str, Any], num_neurons: int | Sequence[int] | None
) -> int | None:
    """Number of sessions that the names of the parameters tell of; ``None`` for a single one."""
    if isinstance(num_neurons, int):
        return None
    sessions = {match[1] for name in parameters if (match := re.match(r"(\d+)\.", name))}
    return len(sessions) or None


def _model(
    parameters: Mapping[str, Any],
    criterion: Mapping[str, Any],
    settings: Mapping[str, Any],
    num_neurons: int | Sequence[int] | None,
) -> Model:
    """Encoders and criterion of a torch state dict."""
    num_sessions = _num_sessions(parameters, num_neurons)
    prefixes = [""] if num_sessions is None else [f"{i}." for i in range(num_sessions)]
    neurons = (
        num_neurons if isinstance(num_neurons, list | tuple) else [num_neurons] * len(prefixes)
    )
    if len(neurons) != len(prefixes):
        raise CheckpointError(
            f"there are {len(prefixes)} encoders, but {len(neurons)} num_neurons."
        )
    parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for name, value in parameters.items():
        prefix = "" if num_sessions is None else name[: name.find(".") + 1]
        if prefix not in parts:
            raise CheckpointError(
                f"the names of the parameters are mixed up: {sorted(parameters)[:8]}."
            )
        parts[prefix][name.removeprefix(prefix)] = value
    encoders = [
        _encoder(parts[prefix], prefix, settings, count)
        for prefix, count in zip(prefixes, neurons, strict=True)
    ]
    learned = settings["temperature_mode"] == "auto"
    if not learned and _LOG_INVERSE_TEMPERATURE in criterion:
        raise CheckpointError(
            f"there is a {_LOG_INVERSE_TEMPERATURE}, but temperature_mode is not 'auto'."
        )
    if learned and _LOG_INVERSE_TEMPERATURE not in criterion:
        raise CheckpointError(
            f"the temperature was learned, but there is no {_LOG_INVERSE_TEMPERATURE} in the state "
            "of the criterion."
        )
    temperature = (
        np.exp(-_number(criterion[_LOG_INVERSE_TEMPERATURE], _LOG_INVERSE_TEMPERATURE))
        if learned
        else settings["temperature"]
    )
    return Model(
        tuple(encoders),
        Criterion(
            similarity=settings["distance"],
            temperature=jnp.asarray(temperature, jnp.float32),
            learned=learned,
            min_temperature=jnp.asarray(settings["min_temperature"] or 0.0, jnp.float32),
        ),
    )


def _encoder(
    parameters: dict[str, Any], prefix: str, settings: Mapping[str, Any], num_neurons: int | None
) -> Encoder:
    """One encoder, its parameters checked against the architecture."""
    arrays = {name: _array(value, prefix + name) for name, value in parameters.items()}
    name, units, outputs = (
        settings[key] for key in ("model_architecture", "num_hidden_units", "output_dimension")
    )
    architecture = get_architecture(name)
    shapes = architecture.shapes(1, units, outputs)
    if shapes is not None:  # the weights of the first layer tell the number of neurons
        first = arrays.get(next(iter(shapes)), np.zeros(0))
        num_neurons = first.shape[1] if first.ndim > 1 and first.shape[1] else 1
        shapes = architecture.shapes(num_neurons, units, outputs)
    if not isinstance(num_neurons, int):
        raise CheckpointError(f"the architecture {name!r} is a registered one: give num_neurons.")
    sizes = num_neurons, units, outputs
    aliases = architecture.aliases(*sizes)
    expected = {n: array.shape for n, array in arrays.items()} if shapes is None else shapes
    expected = {**expected, **{alias: expected[owner] for alias, owner in aliases.items()}}
    problems = list(_problems(arrays, expected, aliases))
    if problems:
        raise CheckpointError(
            f"the parameters do not fit {name!r} with {units} hidden units and {outputs} output "
            f"dimensions: {'; '.join(prefix + problem for problem in problems)}."
        )
    params = {
        n: jnp.asarray(array.astype(np.float32)) for n, array in arrays.items() if n not in aliases
    }
    return Encoder(params, name, *sizes)


def _problems(
    arrays: Mapping[str, np.ndarray], expected: Shapes, aliases: Mapping[str, str]
) -> Iterator[str]:
    """What is wrong with the parameters of an encoder."""
    yield from (f"{name} is missing" for name in expected if name not in arrays)
    for name, array in arrays.items():
        if name not in expected:
            yield f"{name} is not a parameter of it"
        elif array.shape != expected[name]:
            yield f"{name} has shape {array.shape}, not {expected[name]}"
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            yield f"{name} is of dtype {array.dtype}, not of floats"
        elif name in aliases and not np.array_equal(
            array, arrays.get(aliases[name], array), equal_nan=True
        ):
            yield f"{name} differs from {aliases[name]}, its other name"


def _label_types(value: Any) -> list[Any] | None:
    """CEBRA's ``label_types_`` as dictionaries of dtype and shape, per array and session."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise CheckpointError("its label_types_ are not laid out as CEBRA's are.")
    return [
        [_label_type(session) for session in entry]
        if isinstance(entry, list)
        else _label_type(entry)
        for entry in value
    ]


def _label_type(entry: Any) -> dict[str, Any]:
    match entry:
        case (DType(dtype), shape) | (dtype, shape):
            if (isinstance(dtype, str) or hasattr(dtype, "itemsize")) and all(
                type(n) is int for n in shape
            ):
                name = str(dtype).removeprefix("torch.").lstrip("<>|=")
                return {"dtype": name, "shape": list(shape)}
    raise CheckpointError("its label_types_ are not laid out as CEBRA's are.")


def _history(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The recorded losses; solvers that keep no log keep the total under ``loss``."""
    log = state_dict.get("log", {})
    history = {name: _numbers(log[name]) for name in _HISTORY if len(log.get(name, ()))}
    if "total" not in history and "loss" in state_dict:
        history["total"] = _numbers(state_dict["loss"])
    return history


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, list) and all(isinstance(x, int | float) for x in values):
        return np.asarray(values, np.float64)
    array = _array(values, "the training history")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.number):
        raise CheckpointError("the training history is no list of numbers.")
    return array.astype(np.float64)


def _number(value: Any, name: str) -> float:
    array = _array(value, name)
    if array.size != 1:
        raise CheckpointError(f"{name} has to be one number, its shape is {array.shape}.")
    return float(array.reshape(()))


def _array(value: Any, name: str) -> np.ndarray:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise CheckpointError(f"{name} has to be an array, it is of kind {type(value).__name__}.")
    return as_numpy(value)
