"""What the commands do: each takes its arguments and returns what is printed."""

import argparse
import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cebra_jax_metrics.checkpoints import load, save
from cebra_jax_metrics.cli.files import Recording, is_recording, read_npy, short_names
from cebra_jax_metrics.demo import describe_demo
from cebra_jax_metrics.estimation import Estimate
from cebra_jax_metrics.metrics import (
    NULL_QUANTILES,
    Consistency,
    ConsistencyTest,
    consistency_score,
    consistency_test,
    goodness_of_fit_history,
    sampler_for,
)
from cebra_jax_metrics.metrics import score as estimate_score
from cebra_jax_metrics.model import Checkpoint
from cebra_jax_metrics.nulls import goodness_of_fit_test
from cebra_jax_metrics.plotting import (
    plot_consistency,
    plot_distribution,
    plot_goodness_of_fit,
)
from cebra_jax_metrics.training import fit as train

SCHEMA_VERSION = 1  # of what --json prints; docs/command_line.md describes it
BATCHES_PER_TICK = 64


def score(arguments: argparse.Namespace) -> str:
    """Score every model on every recording."""
    _check_plot(arguments)
    models, recordings = _models_and_recordings(arguments.files)
    checkpoints = {path: load(path) for path in models}
    records, estimates = [], []
    for data in recordings:
        recording = Recording(data)
        for model, checkpoint in checkpoints.items():
            try:
                X, labels = recording.of_model(checkpoint, arguments)
                estimate = estimate_score(
                    checkpoint,
                    X,
                    *labels,
                    session_id=arguments.session,
                    num_batches=arguments.num_batches,
                    method=arguments.method,
                    key=jax.random.key(arguments.seed),
                    chunk_size=BATCHES_PER_TICK,
                    progress=_progress("batches", BATCHES_PER_TICK),
                )
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                if len(models) * len(recordings) == 1:
                    raise
                raise type(error)(f"{model} on {data}: {error}") from error
            records.append(_score_record(model, data, estimate, len(X), arguments))
            estimates.append(estimate)
    if arguments.plot:
        names = [f"{m} on {d}" for d in short_names(recordings) for m in short_names(models)]
        _draw(arguments.plot, plot_distribution, dict(zip(names, estimates, strict=True)))
    if arguments.json:
        several = {"schema_version": SCHEMA_VERSION, "scores": records}
        return _as_json(records[0] if len(records) == 1 else several)
    return _score_text(records[0]) if len(records) == 1 else _score_table(records)


def _models_and_recordings(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Models come first; of just two files the second is the recording, whatever its name."""
    models = [path for path in files if not is_recording(path)]
    if len(files) == 2:
        models = list(files[:1])
    recordings = list(files[len(models) :])
    if not models or not recordings or list(files[: len(models)]) != models:
        raise ValueError(
            "Expected models, then recordings (.npz, .npy or .csv files): score MODEL [MODEL ...] "
            f"DATA [DATA ...], got {' '.join(files)}."
        )
    return models, recordings


def _score_record(
    model: str, data: str, estimate: Estimate, num_steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "data": data,
        "goodness_of_fit_bits": float(estimate.bits),
        "goodness_of_fit_stderr_bits": float(estimate.bits_stderr),
        "infonce_nats": float(estimate.loss),
        "infonce_stderr_nats": float(estimate.stderr),
        "align_nats": float(estimate.align),
        "uniform_nats": float(estimate.uniform),
        "chance_nats": float(estimate.chance),
        "num_negatives": int(estimate.num_negatives),
        "num_batches": arguments.num_batches,
        "method": arguments.method,
        "gain": float(estimate.gain),
        "num_steps": num_steps,
        "session": arguments.session,
        "seed": arguments.seed,
    }
    parts = {
        name: {
            "goodness_of_fit_bits": float(part.bits),
            "goodness_of_fit_stderr_bits": float(part.bits_stderr),
        }
        for name, part in estimate.parts.items()
    }
    return record | ({"parts": parts} if parts else {})


def _score_text(record: dict[str, Any]) -> str:
    text = (
        "goodness of fit  {goodness_of_fit_bits:.4f} ± {goodness_of_fit_stderr_bits:.4f} bits\n"
        "InfoNCE          {infonce_nats:.4f} ± {infonce_stderr_nats:.4f} nats "
        "(align {align_nats:.4f}, uniform {uniform_nats:.4f}, chance {chance_nats:.4f})\n"
        "from             {num_batches} batches of {num_negatives} on {num_steps} time steps"
    ).format(**record)
    if record["method"] != "plain":
        text += "\nas precise as    {:.0f} plain batches".format(
            record["gain"] * record["num_batches"]
        )
    line = "\n{:17}{goodness_of_fit_bits:.4f} ± {goodness_of_fit_stderr_bits:.4f} bits"
    parts = record.get("parts", {}).items()
    return text + "".join(line.format(name, **part) for name, part in parts)


def _score_table(records: Sequence[dict[str, Any]]) -> str:
    fields = ("goodness_of_fit_bits", "goodness_of_fit_stderr_bits", "infonce_nats")
    head = ["model", "recording", "bits", "±", "nats", "steps"]
    rows = [
        [r["model"], r["data"], *(f"{r[f]:.4f}" for f in fields), str(r["num_steps"])]
        for r in records
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    sides = "<<>>>>"
    return "\n".join(
        "  ".join(f"{x:{side}{w}}" for x, side, w in zip(row, sides, widths, strict=True))
        for row in [head, *rows]
    )


def test(arguments: argparse.Namespace) -> str:
    """Test a goodness of fit against its null distribution."""
    _check_plot(arguments)
    is_refit = arguments.method == "refit"
    if not is_refit and arguments.held_out is None:
        raise ValueError(
            "The test by shifts holds on rows that the model was not fitted to: say which they are "
            "(--held-out A:B), or ':' if it was fitted to none of them."
        )
    if is_refit != (arguments.num_steps is not None):
        raise ValueError("--num-steps says how long models are trained: --method refit needs it.")
    checkpoint = load(arguments.model)
    X, labels = Recording(arguments.data).of_model(checkpoint, arguments)
    batch_size = checkpoint.settings.get("batch_size")
    if batch_size is None:
        raise ValueError("The model was trained without a batch size: its batches have no null.")
    result = goodness_of_fit_test(
        jax.random.key(arguments.seed),
        checkpoint,
        X,
        sampler_for(checkpoint.settings, len(X), labels),
        method=arguments.method,
        held_out=arguments.held_out,
        batch_size=batch_size,
        num_batches=arguments.num_batches,
        num_samples=arguments.num_samples,
        fit_options={"num_steps": arguments.num_steps} if is_refit else None,
        session_id=arguments.session,
        progress=_progress("chunks", 1) if is_refit else iter,
    )
    if arguments.plot:
        _draw(arguments.plot, plot_distribution, {short_names([arguments.model])[0]: result})
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": arguments.model,
        "data": arguments.data,
        "method": result.method,
        "goodness_of_fit_bits": result.observed,
        "effect_bits": result.effect,
        "p_value": result.p_value,
        "num_samples": len(result.null),
        "null_mean_bits": float(result.null.mean()),
        "null_quantile_levels": list(NULL_QUANTILES),
        "null_quantiles_bits": np.quantile(result.null, NULL_QUANTILES).tolist(),
        "session": arguments.session,
        "seed": arguments.seed,
    }
    if arguments.json:
        return _as_json(record)
    return (
        "goodness of fit  {goodness_of_fit_bits:.4f} bits\n"
        "by chance        {null_mean_bits:.4f} bits ({num_samples} samples by {method})\n"
        "effect           {effect_bits:.4f} bits\n"
        "p                {p_value:.4g}"
    ).format(**record)


def consistency(arguments: argparse.Namespace) -> str:
    """R² between embeddings."""
    _check_plot(arguments)
    embeddings = [read_npy(path) for path in arguments.embeddings]
    labels = arguments.labels and [read_npy(path) for path in arguments.labels]
    is_runs = arguments.between == "runs"
    names = short_names(arguments.embeddings)
    ids = arguments.ids if is_runs else arguments.ids or names
    question = (embeddings, arguments.between, labels, ids, arguments.bins)
    result = consistency_score(*question, cv=arguments.cv)
    test = consistency_test(jax.random.key(arguments.seed), *question) if arguments.test else None
    if is_runs:
        result = Consistency(result.scores, np.array(names)[result.pairs], np.array(names))
    if arguments.plot:
        label = "Consistency score (%)" if arguments.cv is None else "Held-out consistency (%)"
        heat_map = functools.partial(plot_consistency, colorbar_label=label)
        _draw(arguments.plot, heat_map, {"": result})
    if arguments.json:
        return _as_json(_consistency_record(result, test, arguments))
    return _consistency_table(result, test, arguments.cv)


def _consistency_record(
    result: Consistency, test: ConsistencyTest | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    record = {
        "schema_version": SCHEMA_VERSION,
        "between": arguments.between,
        "cv": arguments.cv,
        "ids": result.ids.tolist(),
        "pairs": result.pairs.tolist(),
        "scores": result.scores.tolist(),
        "mean_score": float(result.scores.mean()),
    }
    if test is not None:
        record["seed"] = arguments.seed
        record["null_quantile_levels"] = list(NULL_QUANTILES)
        record["test"] = {
            name: {field: value.tolist() for field, value in part._asdict().items()}
            for name, part in (("pairwise", test.pairwise), ("overall", test.overall))
        }
    return record


def _consistency_table(result: Consistency, test: ConsistencyTest | None, cv: int | None) -> str:
    columns = {"R²" if cv is None else f"R² in {cv} folds": [*result.scores, result.scores.mean()]}
    if test is not None:
        each, overall = test.pairwise, test.overall
        if cv is not None:
            columns["R² in sample"] = [*each.observed, overall.observed]
        columns["by chance"] = [*each.null_mean, overall.null_mean]
        columns["p"] = [*each.p_value, overall.p_value]
    pairs = [*result.pairs.tolist(), ("mean", "")]
    width = max(len(name) for pair in (("predicting", "predicted"), *pairs) for name in pair)
    widths = [max(len(name), 7) for name in columns]
    head = (f"{name:>{w}}" for name, w in zip(columns, widths, strict=True))
    lines = ["  ".join([f"{'predicting':{width}}", f"{'predicted':{width}}", *head])]
    for (source, target), *values in zip(pairs, *columns.values(), strict=True):
        cells = (f"{x:>{w}.4f}" for x, w in zip(values, widths, strict=True))
        lines.append("  ".join([f"{source:{width}}", f"{target:{width}}", *cells]))
    return "\n".join(lines)


def fit(arguments: argparse.Namespace) -> str:
    """Train a model and save it."""
    _check_plot(arguments)
    _check_folder(arguments.out)
    X, labels = Recording(arguments.data).of_training(arguments)
    settings = {
        "batch_size": arguments.batch_size,
        "time_offsets": arguments.time_offset,
        "conditional": arguments.conditional,
        "delta": arguments.delta,
    }
    checkpoint = train(
        jax.random.key(arguments.seed),
        X,
        sampler_for(settings, len(X), labels),
        architecture=arguments.architecture,
        output_dimension=arguments.output_dimension,
        num_hidden_units=arguments.num_hidden_units,
        batch_size=arguments.batch_size,
        num_steps=arguments.num_steps,
        learning_rate=arguments.learning_rate,
        temperature=arguments.temperature,
        progress=_progress("chunks", 1),
    )
    save(checkpoint, arguments.out)
    if arguments.plot:
        _draw(arguments.plot, plot_goodness_of_fit, {"": checkpoint})
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": arguments.out,
        "data": arguments.data,
        "num_steps": arguments.num_steps,
        "last_goodness_of_fit_bits": float(goodness_of_fit_history(checkpoint)[-1]),
        "last_infonce_nats": float(checkpoint.history["total"][-1]),
        "seed": arguments.seed,
    }
    if arguments.json:
        return _as_json(record)
    last = "at the last step {last_goodness_of_fit_bits:.4f} bits".format(**record)
    return f"{arguments.out}: {checkpoint!r}, {last}"


def info(arguments: argparse.Namespace) -> str:
    """What a checkpoint holds."""
    _check_plot(arguments)
    checkpoint = load(arguments.model)
    encoders, criterion = checkpoint.model.encoders, checkpoint.model.criterion
    first = encoders[0]
    kind = "learned" if criterion.learned else "fixed"
    lines = [
        ("architecture", f"{first.architecture}, window of {first.receptive_field} time steps"),
        ("sizes", f"{first.num_hidden_units} hidden units, {first.output_dimension} dimensions"),
        (
            "sessions",
            f"{len(encoders)}, neurons: {', '.join(str(e.num_neurons) for e in encoders)}",
        ),
        ("similarity", criterion.similarity),
        ("temperature", f"{float(criterion.effective_temperature):g}, {kind}"),
    ]
    names = ("batch_size", "conditional", "time_offsets", "delta", "hybrid")
    settings = {name: checkpoint.settings.get(name) for name in names}
    lines.append(("settings", ", ".join(f"{name} {value}" for name, value in settings.items())))
    for i, fitted in enumerate(checkpoint.settings.get("label_types") or ()):
        sessions = fitted if isinstance(fitted, list) else [fitted]
        shapes = ", ".join(f"{one['dtype']} {tuple(one['shape'])}" for one in sessions)
        lines.append((f"labels {i}", shapes))
    lines.append(("history", _history(checkpoint)))
    versions = (f"{name.removesuffix('_version')} {v}" for name, v in checkpoint.metadata.items())
    lines.append(("written by", ", ".join(versions) or "unknown"))
    if arguments.plot:
        _draw(arguments.plot, plot_goodness_of_fit, {"": checkpoint})
    return "\n".join(f"{name:13}{text}" for name, text in lines)


def _history(checkpoint: Checkpoint) -> str:
    try:
        bits = goodness_of_fit_history(checkpoint)
    except (ValueError, NotImplementedError) as error:
        steps = len(checkpoint.history.get("total", ()))
        return f"{steps} steps; no bits: {error}"
    marks = sorted({0, len(bits) // 4, len(bits) // 2, 3 * len(bits) // 4, len(bits) - 1})
    values = ", ".join(f"{bits[i]:.3f} (step {i + 1})" for i in marks)
    return f"{len(bits)} steps; bits: {values}"


def convert(arguments: argparse.Namespace) -> str:
    """Write a checkpoint as a safetensors file."""
    source, target = Path(arguments.model), Path(arguments.out)
    if target.exists() and target.samefile(source):
        raise ValueError("The file to write is the one to read; choose another name.")
    checkpoint = load(source)
    save(checkpoint, target)
    return f"{target}: {checkpoint!r}"


def demo(arguments: argparse.Namespace) -> str:
    """Score the model of the demo."""
    return describe_demo()


def _progress(unit: str, scale: int) -> Callable[..., Any]:
    """A bar on standard error, if that is a terminal and it takes more than a second."""
    from tqdm import tqdm  # takes its time to import

    terminal = shutil.get_terminal_size()  # of some size even where the terminal does not say
    return functools.partial(
        tqdm,
        unit=unit,
        unit_scale=scale,
        delay=1,
        disable=None,  # unless stderr is a terminal
        leave=False,
        ncols=terminal.columns,
        nrows=terminal.lines,
    )


def _check_plot(arguments: argparse.Namespace) -> None:
    """Refuse early what would fail after all the work."""
    if not arguments.plot:
        return
    _check_folder(arguments.plot)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib: pip install 'cebra-jax-metrics[plot]'."
        ) from error


def _check_folder(path: str) -> None:
    if not Path(path).parent.is_dir():
        raise ValueError(f"There is no folder {str(Path(path).parent)!r} for {Path(path).name!r}.")


def _draw(path: str, plot: Callable[..., Any], results: dict[str, Any]) -> None:
    """Draw results one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5 * len(results)), dpi=150, layout="constrained")
    axes = figure.subplots(len(results), squeeze=False)[:, 0]
    for ax, (name, result) in zip(axes, results.items(), strict=True):
        plot(result, ax=ax)
        if name:
            ax.set_title(name)
    figure.savefig(path)


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(_without_nan(record))


def _without_nan(value: Any) -> Any:
    """NaN as ``None``, since JSON has none."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
