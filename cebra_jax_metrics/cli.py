"""The command ``cebra-jax-metrics``."""

import argparse
import functools
import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import numpy as np

from cebra_jax_metrics.checkpoints import load, save
from cebra_jax_metrics.demo import describe_demo
from cebra_jax_metrics.estimation import Method
from cebra_jax_metrics.metrics import (
    NULL_QUANTILES,
    Consistency,
    ConsistencyTest,
    consistency_score,
    consistency_test,
    goodness_of_fit_history,
    score,
)
from cebra_jax_metrics.model import Checkpoint, select_encoder
from cebra_jax_metrics.plotting import plot_consistency

SCHEMA_VERSION = 1
BATCHES_PER_TICK = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a mistake in what was asked."""
    arguments = _parser().parse_args(argv)
    if arguments.cache:
        _use_compilation_cache()
    try:
        print(arguments.run(arguments), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, RuntimeError, KeyError, OSError, ImportError) as error:
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        print(f"cebra-jax-metrics: error: {message}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        self.exit(2, f"cebra-jax-metrics: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cebra-jax-metrics",
        description="Score CEBRA models: InfoNCE, goodness of fit, consistency; with error bars.",
    )
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="do not keep compiled functions in the cache directory of the user",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("score", help="goodness of fit of a model on a recording")
    command.add_argument("model", metavar="MODEL", help="file of cebra.CEBRA.save, or our own")
    command.add_argument("data", metavar="DATA.npz", help="file of numpy.savez")
    command.add_argument(
        "--data",
        dest="data_name",
        metavar="NAME",
        help="array of the recording (time, neurons); default: the only one of the model's width",
    )
    command.add_argument(
        "--labels",
        nargs="*",
        metavar="NAME",
        help="arrays of labels, in the order of fitting; default: those that fit the model's",
    )
    command.add_argument(
        "--rows",
        metavar="A:B",
        type=_rows,
        help="use time steps A to B-1 only (from the end: --rows=-60:)",
    )
    command.add_argument(
        "--session", type=int, metavar="I", help="session of the recording, from 0"
    )
    command.add_argument("--num-batches", type=int, default=500, metavar="N", help="default: 500")
    command.add_argument(
        "--method",
        choices=get_args(Method),
        default="plain",
        help="control_variates: smaller standard errors from as many batches; default: plain",
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_score)

    command = commands.add_parser("consistency", help="R² between embeddings, with a null")
    command.add_argument(
        "embeddings", nargs="+", metavar="EMB.npy", help="files of numpy.save: (time, features)"
    )
    command.add_argument(
        "--between",
        choices=("runs", "datasets"),
        required=True,
        help="runs: rows are the same time steps; datasets: rows are aligned on labels",
    )
    command.add_argument(
        "--labels", nargs="+", metavar="LABELS.npy", help="datasets: labels (time,) of each"
    )
    command.add_argument(
        "--ids", nargs="+", metavar="ID", help="datasets: what each belongs to; default: its file"
    )
    command.add_argument(
        "--bins", type=int, default=100, metavar="N", help="edges for float labels; default: 100"
    )
    command.add_argument(
        "--cv", type=int, metavar="K", help="R² of held-out rows, in K contiguous folds"
    )
    command.add_argument(
        "--test", action="store_true", help="p-values from shifts in time (in-sample R²)"
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", metavar="OUT.png", help="draw the scores as a heat map")
    command.set_defaults(run=_consistency)

    command = commands.add_parser("info", help="what a checkpoint holds")
    command.add_argument("model", metavar="MODEL", help="file of cebra.CEBRA.save, or our own")
    command.set_defaults(run=_info)

    command = commands.add_parser("convert", help="convert CEBRA's file into a safetensors file")
    command.add_argument("model", metavar="MODEL.pt", help="file of cebra.CEBRA.save")
    command.add_argument("out", metavar="OUT.safetensors", help="file to write")
    command.set_defaults(run=_convert)

    command = commands.add_parser("demo", help="score a model that comes with the package")
    command.set_defaults(run=lambda arguments: describe_demo())
    return parser


def _use_compilation_cache() -> None:
    """Keep what XLA compiles in the user's cache directory, unless JAX was told of another."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cebra_jax_metrics"
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # it works without
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _score(arguments: argparse.Namespace) -> str:
    from tqdm import tqdm  # takes its time to import

    checkpoint = load(arguments.model)
    X, labels = _arrays(checkpoint, arguments)
    rows = arguments.rows or slice(None)
    terminal = shutil.get_terminal_size()  # of some size even where the terminal does not say
    progress = functools.partial(
        tqdm,
        unit="batches",
        unit_scale=BATCHES_PER_TICK,
        delay=1,
        disable=None,  # unless stderr is a terminal
        leave=False,
        ncols=terminal.columns,
        nrows=terminal.lines,
    )
    estimate = score(
        checkpoint,
        X[rows],
        *(label[rows] for label in labels),
        session_id=arguments.session,
        num_batches=arguments.num_batches,
        method=arguments.method,
        key=jax.random.key(arguments.seed),
        chunk_size=BATCHES_PER_TICK,
        progress=progress,
    )
    result = {
        "schema_version": SCHEMA_VERSION,
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
        "num_steps": len(X[rows]),
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
    if arguments.json:
        return json.dumps(_without_nan(result | ({"parts": parts} if parts else {})))
    text = (
        "goodness of fit  {goodness_of_fit_bits:.4f} ± {goodness_of_fit_stderr_bits:.4f} bits\n"
        "InfoNCE          {infonce_nats:.4f} ± {infonce_stderr_nats:.4f} nats "
        "(align {align_nats:.4f}, uniform {uniform_nats:.4f}, chance {chance_nats:.4f})\n"
        "from             {num_batches} batches of {num_negatives} on {num_steps} time steps"
    ).format(**result)
    line = "\n{:17}{goodness_of_fit_bits:.4f} ± {goodness_of_fit_stderr_bits:.4f} bits"
    return text + "".join(line.format(name, **part) for name, part in parts.items())


def _without_nan(value: Any) -> Any:
    """NaN as ``None``, since JSON has none."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _consistency(arguments: argparse.Namespace) -> str:
    if arguments.plot and not Path(arguments.plot).parent.is_dir():
        raise ValueError(f"There is no folder {str(Path(arguments.plot).parent)!r} for the plot.")
    embeddings = [_read_npy(path) for path in arguments.embeddings]
    labels = arguments.labels and [_read_npy(path) for path in arguments.labels]
    is_runs = arguments.between == "runs"
    names = _file_names(arguments.embeddings)
    ids = arguments.ids if is_runs else arguments.ids or names
    question = (embeddings, arguments.between, labels, ids, arguments.bins)
    result = consistency_score(*question, cv=arguments.cv)
    test = consistency_test(jax.random.key(arguments.seed), *question) if arguments.test else None
    if is_runs:
        result = Consistency(result.scores, np.array(names)[result.pairs], np.array(names))
    if arguments.plot:
        _draw(result, arguments)
    if arguments.json:
        return json.dumps(_without_nan(_consistency_record(result, test, arguments)))
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


def _draw(result: Consistency, arguments: argparse.Namespace) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")
    label = "Consistency score (%)" if arguments.cv is None else "Held-out consistency (%)"
    plot_consistency(result, ax=figure.subplots(), colorbar_label=label)
    figure.savefig(arguments.plot)


def _file_names(paths: Sequence[str]) -> list[str]:
    """Names of files without folder and ending, if that tells them apart."""
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names)]
    return names


def _read_npy(path: str) -> np.ndarray:
    with Path(path).open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # whatever NumPy stumbles over in a damaged file
            raise ValueError(
                f"Cannot read {path!r}: expected an .npy file, as numpy.save writes ({error})."
            ) from error


def _info(arguments: argparse.Namespace) -> str:
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


def _convert(arguments: argparse.Namespace) -> str:
    source, target = Path(arguments.model), Path(arguments.out)
    if target.exists() and target.samefile(source):
        raise ValueError("The file to write is the one to read; choose another name.")
    checkpoint = load(source)
    save(checkpoint, target)
    return f"{target}: {checkpoint!r}"


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _rows(text: str) -> slice:
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected A:B, A: or :B, got {text!r}") from None


def _arrays(
    checkpoint: Checkpoint, arguments: argparse.Namespace
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The recording and its labels, chosen by name or because they alone fit the model."""
    arrays = _read_npz(arguments.data)
    neurons = select_encoder(checkpoint, arguments.session).num_neurons
    name = arguments.data_name or _only(
        [n for n, x in arrays.items() if x.ndim == 2 and x.shape[1] == neurons],
        f"recording with {neurons} neurons",
        "--data",
        arrays,
    )
    X = _named(arrays, name)
    if X.ndim != 2:
        raise ValueError(
            f"The recording {name!r} has to be of shape (time, neurons), got {X.shape}."
        )
    if arguments.labels is not None:
        return X, [_named(arrays, label) for label in arguments.labels]
    candidates = {
        n: x
        for n, x in arrays.items()
        if n != name and x.ndim in (1, 2) and len(x) == len(X) and x.dtype.kind in "iuf"
    }
    fitted = checkpoint.settings.get("label_types")
    if fitted is None:
        raise ValueError("The checkpoint does not say what labels it needs: name them (--labels).")
    labels = []
    for entry in fitted:
        entry = entry[arguments.session or 0] if isinstance(entry, list) else entry
        fits = [n for n, x in candidates.items() if _kind(x.dtype, x.shape) == _kind(**entry)]
        chosen = _only(fits, f"{entry['dtype']} labels like {entry['shape']}", "--labels", arrays)
        labels.append(candidates.pop(chosen))
    return X, labels


def _kind(dtype: Any, shape: Sequence[int]) -> tuple[bool, int]:
    """Whether labels are continuous, and their width."""
    return "float" in str(dtype), int(shape[1]) if len(shape) > 1 else 1


def _read_npz(path: str) -> dict[str, np.ndarray]:
    with Path(path).open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"Cannot read {path!r}: expected an .npz file, as numpy.savez writes.")
        try:
            with np.load(file, allow_pickle=False) as data:
                return dict(_readable(data))
        except Exception as error:  # whatever NumPy stumbles over in a damaged file
            raise ValueError(f"Cannot read {path!r} as an .npz file ({error}).") from error


def _readable(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a file without those of pickled objects, which are never loaded."""
    for name in data.files:
        try:
            yield name, data[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise


def _named(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"There is no array {name!r} in the file; it has {_listed(arrays)}.")
    if not arrays[name].ndim:
        raise ValueError(f"The array {name!r} is a single value.")
    return arrays[name]


def _only(names: list[str], what: str, option: str, arrays: dict[str, np.ndarray]) -> str:
    if len(names) != 1:
        found = "no" if not names else "more than one"
        raise ValueError(
            f"Found {found} array for the {what}: choose with {option}; the file has "
            f"{_listed(arrays)}."
        )
    return names[0]


def _listed(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {x.dtype}{x.shape}" for name, x in arrays.items())
