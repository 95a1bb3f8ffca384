"""What the command line accepts, and its help."""

import argparse
import importlib.metadata
from typing import Any, NoReturn, get_args

from cebra_jax_metrics.cli import commands
from cebra_jax_metrics.estimation import Method

PROGRAM = "cebra-jax-metrics"
EXIT_CODES = "exit codes: 0; 2 for a mistake, which one line on stderr explains; 130 after Ctrl-C"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        self.exit(2, f"{PROGRAM}: error: {message}\n")


class _Version(argparse.Action):
    """Versions are looked up when asked for."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        ours, jax, numpy = map(importlib.metadata.version, (PROGRAM, "jax", "numpy"))
        print(f"{PROGRAM} {ours} (jax {jax}, numpy {numpy})")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command; ``run`` is what to do with the arguments it returns."""
    parser = _Parser(
        prog=PROGRAM,
        description="Score CEBRA models: InfoNCE, goodness of fit, consistency; with error bars.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--version", action=_Version, help="show the versions of this program and of JAX"
    )
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="do not keep compiled functions in the cache directory of the user",
    )
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_score, _test, _consistency, _fit, _info, _convert, _demo):
        add(added)
    return parser


def _add(added: Any, name: str, summary: str, examples: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = added.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}\n{EXIT_CODES}" if examples else EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=getattr(commands, name))
    return command


def _score(added: Any) -> None:
    command = _add(
        added,
        "score",
        "goodness of fit of models on recordings",
        "  cebra-jax-metrics score model.pt recording.npz\n"
        "  cebra-jax-metrics score model.pt spikes.npy --labels position.npy --rows 0:8000\n"
        "  cebra-jax-metrics score model.pt table.csv --labels x,y\n"
        "  cebra-jax-metrics score models/*.pt rats/*.npz --method control_variates --json\n",
    )
    command.usage = "%(prog)s [options] MODEL [MODEL ...] DATA [DATA ...]"
    command.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="models (files of cebra.CEBRA.save, or our own), then recordings (.npz of "
        "numpy.savez, .npy or .csv); every model is scored on every recording",
    )
    _choose_data(command)
    command.add_argument("--num-batches", type=int, default=500, metavar="N", help="default: 500")
    command.add_argument(
        "--method",
        choices=get_args(Method),
        default="plain",
        help="control_variates: smaller standard errors from as many batches; default: plain",
    )
    _common(command, "draw the losses of the batches")


def _test(added: Any) -> None:
    command = _add(
        added,
        "test",
        "test a goodness of fit against labels that are shifted in time",
        "  cebra-jax-metrics test model.pt recording.npz --held-out 8000:\n"
        "  cebra-jax-metrics test model.pt recording.npz --method refit --num-steps 2000\n",
    )
    command.add_argument("model", metavar="MODEL", help="file of cebra.CEBRA.save, or our own")
    command.add_argument("data", metavar="DATA", help=".npz, .npy or .csv file")
    _choose_data(command)
    command.add_argument(
        "--method",
        choices=("shift", "refit"),
        default="shift",
        help="shift the labels under the model (default), or train a model on each shift",
    )
    command.add_argument(
        "--held-out",
        metavar="A:B",
        type=rows,
        help="rows that the model was not fitted to, ':' if to none; refit: rows to score, by "
        "default the last quarter",
    )
    command.add_argument(
        "--num-samples", type=int, metavar="N", help="shifts; default: 200, refit 39"
    )
    command.add_argument("--num-batches", type=int, default=100, metavar="N", help="default: 100")
    command.add_argument("--num-steps", type=int, metavar="N", help="refit: steps of training")
    _common(command, "draw the null distribution")


def _consistency(added: Any) -> None:
    command = _add(
        added,
        "consistency",
        "R² between embeddings, with a null",
        "  cebra-jax-metrics consistency run_*.npy --between runs --cv 5\n"
        "  cebra-jax-metrics consistency a.npy b.npy --between datasets --labels ya.npy yb.npy\n",
    )
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
    _common(command, "draw the scores as a heat map")


def _fit(added: Any) -> None:
    command = _add(
        added,
        "fit",
        "train a model on a recording, in JAX",
        "  cebra-jax-metrics fit recording.npz model.safetensors --data spikes --labels position\n"
        "  cebra-jax-metrics fit spikes.npy model.safetensors --num-steps 5000\n",
    )
    command.add_argument("data", metavar="DATA", help=".npz, .npy or .csv file")
    command.add_argument("out", metavar="OUT.safetensors", help="file to write")
    _choose_data(command, session=False, default="none, positives are later in time")
    for name, kind, default, what in (
        ("--architecture", str, "offset10-model", "the encoder"),
        ("--output-dimension", int, 8, "features of the embedding"),
        ("--num-hidden-units", int, 32, "width of the hidden layers"),
        ("--batch-size", int, 512, "references, positives and negatives per batch"),
        ("--num-steps", int, 10_000, "steps of training"),
        ("--learning-rate", float, 3e-4, "of Adam"),
        ("--temperature", float, 1.0, "what similarities are divided by"),
        ("--time-offset", int, 10, "steps to a positive, or over which labels change"),
    ):
        command.add_argument(
            name, type=kind, default=default, metavar="X", help=f"{what}; default: {default}"
        )
    command.add_argument(
        "--conditional",
        choices=("time", "time_delta", "delta_normal"),
        default="time_delta",
        help="how continuous labels choose positives; default: time_delta",
    )
    command.add_argument("--delta", type=float, metavar="X", help="for delta_normal")
    _common(command, "draw the goodness of fit of every step")


def _info(added: Any) -> None:
    command = _add(added, "info", "what a checkpoint holds", "  cebra-jax-metrics info model.pt\n")
    command.add_argument("model", metavar="MODEL", help="file of cebra.CEBRA.save, or our own")
    command.add_argument(
        "--plot", metavar="OUT.png", help="draw the goodness of fit of every step of training"
    )


def _convert(added: Any) -> None:
    command = _add(
        added,
        "convert",
        "convert CEBRA's file into a safetensors file",
        "  cebra-jax-metrics convert model.pt model.safetensors\n",
    )
    command.add_argument("model", metavar="MODEL.pt", help="file of cebra.CEBRA.save")
    command.add_argument("out", metavar="OUT.safetensors", help="file to write")


def _demo(added: Any) -> None:
    _add(added, "demo", "score a model that comes with the package")


def _choose_data(
    command: argparse.ArgumentParser,
    session: bool = True,
    default: str = "those that fit the model's",
) -> None:
    command.add_argument(
        "--data",
        dest="data_name",
        metavar="NAME",
        help="array of the recording (time, neurons); default: the only one that fits",
    )
    command.add_argument(
        "--labels",
        nargs="*",
        metavar="NAME",
        help="arrays of labels, or .npy and .csv files of them, in the order of fitting; A,B puts "
        f"two side by side; default: {default}",
    )
    command.add_argument(
        "--rows",
        metavar="A:B",
        type=rows,
        help="use time steps A to B-1 only (from the end: --rows=-60:)",
    )
    if session:
        command.add_argument(
            "--session", type=int, metavar="I", help="session of the recording, from 0"
        )


def _common(command: argparse.ArgumentParser, plot: str) -> None:
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", metavar="OUT.png", help=plot)


def seed(text: str) -> int:
    """A seed that a JAX key can hold."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def rows(text: str) -> slice:
    """A range of rows."""
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected A:B, A: or :B, got {text!r}") from None
