"""From CEBRA's estimators, files and state dicts to a checkpoint, and back to a state dict."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.utils.validation import check_is_fitted

from cebra_jax_metrics.arrays import as_numpy
from cebra_jax_metrics.checkpoints.torch_zip import CheckpointError, DType, read_torch_zip
from cebra_jax_metrics.encoders import Encoder, get_architecture
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
    if not hasattr(estimator, "get_params") or not hasattr(estimator, "fit"):
        raise TypeError(f"Expected a fitted cebra.CEBRA, got {type(estimator).__name__}.")
    check_is_fitted(estimator, "n_features_")
    names = ("label_types_", "n_features_", "n_features_in_", "num_sessions_", "solver_name_")
    state = {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}
    state_dict = estimator.state_dict_
    payload = {
        "args": estimator.get_params(),
        "state": state,
        "state_dict": state_dict,
        "metadata": {"cebra_version": state_dict.get("version", "unknown")},
    }
    return _from_payload(payload)


def read_cebra_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file that ``cebra.CEBRA.save`` wrote, without torch, CEBRA or executing any of it."""
    payload = read_torch_zip(path)
    try:
        return _from_payload(payload)
    except CheckpointError as error:
        raise CheckpointError(f"Cannot use {str(path)!r}: {error}") from None
    except (AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"Cannot use {str(path)!r}: it is not laid out as CEBRA's files are "
            f"({type(error).__name__}: {error})."
        ) from error


def from_state_dict(
    state_dict: Mapping[str, Any], *, model_architecture: str, **settings: Any
) -> Checkpoint:
    """Make a checkpoint of a bare state dict of CEBRA's torch model.

    Args:
        state_dict: Names to arrays (NumPy, JAX or torch), ``net.0.weight`` and so on; with a prefix
            ``0.``, ``1.``, ... per session for several sessions. It may hold the criterion's
            ``log_inverse_temperature``.
        model_architecture: Name of the architecture.
        **settings: Further constructor arguments of ``cebra.CEBRA`` that are not at their defaults,
            above all ``num_hidden_units``, ``output_dimension``, ``batch_size``, ``distance``,
            ``temperature`` and ``temperature_mode``.

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
    parameters = dict(state_dict)
    criterion = {
        name: parameters.pop(name) for name in (_LOG_INVERSE_TEMPERATURE,) if name in parameters
    }
    settings = _settings({"model_architecture": model_architecture, **settings})
    model = _model(parameters, criterion, settings)
    settings |= {"num_sessions": _num_sessions(parameters), "label_types": None}
    return Checkpoint(model, settings)


def to_state_dict(model: Model | Checkpoint) -> dict[str, np.ndarray]:
    """Return the parameters of all encoders as CEBRA's torch model names them.

    Tied parameters are repeated under all their names; parameters of several sessions are prefixed
    ``0.``, ``1.``, ... The values become tensors with ``torch.from_numpy``.
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
    if not re.fullmatch(r"(single-session(-full|-hybrid)?|multi-session)", str(solver)):
        raise CheckpointError(f"models trained by the solver {solver!r} are not supported.")
    parameters = {
        str(name).removeprefix("module."): value for name, value in state_dict["model"].items()
    }
    model = _model(parameters, state_dict.get("criterion", {}), settings)
    settings |= {
        "num_sessions": _num_sessions(parameters),
        "label_types": _label_types(state.get("label_types_")),
    }
    metadata = {str(k): str(v) for k, v in payload.get("metadata", {}).items()}
    return Checkpoint(model, settings, _history(state_dict), metadata)


def _settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """CEBRA's arguments as plain values: missing ones at their defaults, used ones checked."""
    settings = {**SETTINGS, **{str(name): _plain(value) for name, value in args.items()}}
    expected: dict[str, tuple[type, ...]] = {
        "model_architecture": (str,),
        "num_hidden_units": (int,),
        "output_dimension": (int,),
        "batch_size": (int, type(None)),
        "temperature": (int, float),
        "min_temperature": (int, float, type(None)),
        "delta": (int, float, type(None)),
        "conditional": (str, type(None)),
        "hybrid": (bool,),
        "pad_before_transform": (bool,),
    }
    for name, types in expected.items():
        value = settings[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(
                f"setting {name} has to be of type {' or '.join(t.__name__ for t in types)}, "
                f"got {value!r}."
            )
    for name, known in (
        ("criterion", ("infonce",)),
        ("distance", ("cosine", "euclidean")),
        ("temperature_mode", ("constant", "auto")),
    ):
        if settings[name] not in known:
            raise CheckpointError(
                f"setting {name} has to be one of {known}, got {settings[name]!r}."
            )
    if not settings["temperature"] > 0:
        raise CheckpointError(f"temperature has to be above 0, got {settings['temperature']!r}.")
    return settings


def _plain(value: Any, depth: int = 4) -> Any:
    """A setting as JSON can hold it; what it cannot hold becomes its text."""
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == 0:
        return "..."
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    return str(value)


def _num_sessions(parameters: Mapping[str, Any]) -> int | None:
    """Number of sessions that the names of the parameters tell of; ``None`` for a single one."""
    sessions = {match[1] for name in parameters if (match := re.match(r"(\d+)\.", name))}
    return len(sessions) or None


def _model(
    parameters: Mapping[str, Any], criterion: Mapping[str, Any], settings: Mapping[str, Any]
) -> Model:
    """Encoders and criterion of a torch state dict."""
    num_sessions = _num_sessions(parameters)
    prefixes = [""] if num_sessions is None else [f"{i}." for i in range(num_sessions)]
    encoders = []
    for prefix in prefixes:
        own = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
        encoders.append(_encoder(own, prefix, settings))
    counted = sum(k.startswith(tuple(prefixes)) for k in parameters)
    if counted != len(parameters):
        raise CheckpointError(
            f"the names of the parameters are mixed up: {sorted(parameters)[:8]}."
        )
    learned = settings["temperature_mode"] == "auto"
    if learned and _LOG_INVERSE_TEMPERATURE not in criterion:
        raise CheckpointError(
            f"the temperature was learned, but there is no {_LOG_INVERSE_TEMPERATURE} in the state "
            "of the criterion."
        )
    temperature = (
        np.exp(-_number(criterion[_LOG_INVERSE_TEMPERATURE]))
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


def _encoder(parameters: dict[str, Any], prefix: str, settings: Mapping[str, Any]) -> Encoder:
    """One encoder, its parameters checked against the architecture."""
    arrays = {name: as_numpy(value) for name, value in parameters.items()}
    first = next(iter(arrays.values()), np.zeros(0))
    neurons = first.shape[1] if first.ndim > 1 else 0
    sizes = neurons, settings["num_hidden_units"], settings["output_dimension"]
    architecture = get_architecture(settings["model_architecture"])
    aliases = architecture.aliases(*sizes) if neurons else {}
    expected = architecture.shapes(*sizes) if neurons else {}
    if expected is None:  # a registered architecture knows its parameters only when it draws them
        expected = {name: array.shape for name, array in arrays.items()}
    expected = {**expected, **{name: expected[owner] for name, owner in aliases.items()}}
    problems = [f"{prefix}{name} is missing" for name in expected if name not in arrays]
    for name, array in arrays.items():
        if name not in expected:
            problems.append(f"{prefix}{name} is not a parameter of it")
        elif array.shape != expected[name]:
            problems.append(f"{prefix}{name} has shape {array.shape}, not {expected[name]}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{prefix}{name} is of dtype {array.dtype}, not of floats")
        elif name in aliases and not np.array_equal(
            array, arrays.get(aliases[name], array), equal_nan=True
        ):
            problems.append(f"{prefix}{name} differs from {prefix}{aliases[name]}, its other name")
    if problems or not neurons:
        raise CheckpointError(
            f"the parameters do not fit {settings['model_architecture']!r} with {neurons} neurons, "
            f"{sizes[1]} hidden units and {sizes[2]} output dimensions: "
            f"{'; '.join(problems) or 'there are none'}."
        )
    params = {
        name: jnp.asarray(array.astype(np.float32))
        for name, array in arrays.items()
        if name not in aliases
    }
    return Encoder(params, settings["model_architecture"], *sizes)


def _label_types(value: Any) -> list[Any] | None:
    """CEBRA's ``label_types_`` as dictionaries of dtype and shape."""

    def one(entry: Any) -> Any:
        if isinstance(entry, list):
            return [one(session) for session in entry]
        kind, shape = entry
        kind = kind.dtype if isinstance(kind, DType) else kind
        return {
            "dtype": str(kind).removeprefix("torch.").lstrip("<>|="),
            "shape": [int(n) for n in shape],
        }

    try:
        return None if value is None else [one(entry) for entry in value]
    except (TypeError, ValueError):
        raise CheckpointError("its label_types_ are not laid out as CEBRA's are.") from None


def _history(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The recorded losses; solvers that keep no log keep the total under ``loss``."""
    log = state_dict.get("log", {})
    history = {name: _numbers(log[name]) for name in _HISTORY if len(log.get(name, ()))}
    if "total" not in history and "loss" in state_dict:
        history["total"] = _numbers(state_dict["loss"])
    return history


def _numbers(values: Any) -> np.ndarray:
    array = as_numpy(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.number):
        raise CheckpointError("its training history is no list of numbers.")
    return array.astype(np.float64)


def _number(value: Any) -> float:
    array = as_numpy(value)
    if array.size != 1:
        raise CheckpointError(f"expected one number, got an array of shape {array.shape}.")
    return float(array.reshape(()))
