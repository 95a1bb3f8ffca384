"""The command ``cebra-jax-metrics``."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cebra_jax_metrics.cli.parser import PROGRAM, make_parser

OK, MISTAKE, INTERRUPTED = 0, 2, 130  # as docs/command_line.md says


def program() -> int:
    """:func:`main` as a program of its own, which Ctrl-C ends at once.

    A KeyboardInterrupt may come up inside of JAX, where it is ignored or turned into other errors.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else someone ignores it
        signal.signal(signal.SIGINT, _end)
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; those of the process by default.

    Returns:
        The exit code: 0; 2 for a mistake in what was asked, which one line on standard error
        explains; 130 after Ctrl-C. A reader of the output that has seen enough is no mistake.
    """
    arguments = make_parser().parse_args(argv)
    if arguments.cache:
        _use_compilation_cache()
    shown = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        print(arguments.run(arguments), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, TypeError, RuntimeError, KeyError, OSError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        _say(f"error: {message}")
        return MISTAKE
    finally:
        warnings.showwarning = shown
    return OK


def _end(*_: Any) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\n")  # below a progress bar
    os._exit(INTERRUPTED)


def _say(message: str) -> None:
    """One line on standard error."""
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {message}")


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
