"""Timing two ways of doing one thing, alternating, and what the run was made on."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Times of the project and of its peer, in seconds, taken in turns in one run."""

    case: str
    peer: str
    ours: list[float]
    theirs: list[float]  # none where it ran out of memory, or was not tried
    headline: bool = True  # belongs into README
    our_memory: float | None = None  # in MB above what imports take
    their_memory: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster the project is, by medians."""
        if not self.theirs or not self.ours:
            return None
        return statistics.median(self.theirs) / statistics.median(self.ours)

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True)
class Growth:
    """Times, and peak memory, of one thing at growing sizes."""

    case: str
    sizes: list[int]
    seconds: list[float]
    memory: list[float] = field(default_factory=list)
    headline: bool = True

    @property
    def exponent(self) -> float:
        """Of time as a power of size, over the larger half of the sizes."""
        half = min(len(self.sizes) // 2, len(self.sizes) - 2)
        return float(np.polyfit(np.log(self.sizes[half:]), np.log(self.seconds[half:]), 1)[0])

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return asdict(self) | {"exponent": self.exponent}


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    case: str,
    peer: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    **more: Any,
) -> Comparison:
    """Warm both up by one call, then time them in turns; what is short several times a turn."""
    expected = _warm_up(ours), _warm_up(theirs)
    calls = [int(np.clip(0.05 * sum(expected) / each, 1, 7)) for each in expected]
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for function, number, taken in zip((ours, theirs), calls, times, strict=True):
            taken += [seconds(function) for _ in range(number)]
    return Comparison(case, peer, *times, **more)


def _warm_up(function: Callable[[], object]) -> float:
    """Time of the first call, or of the second where that costs little."""
    first = seconds(function)
    return first if first > 5 else seconds(function)


def warm(function: Callable[[], object], repeats: int = 3) -> float:
    """Median time after one call."""
    function()
    return statistics.median(seconds(function) for _ in range(repeats))


def peak_memory(function: str, *arguments: object, also_import: str = "") -> float:
    """Peak memory of ``module:function`` in a process of its own, in MB above its imports.

    The function takes the arguments as text. What it imports itself is named, not to count.
    """
    module, _, name = function.partition(":")
    script = (
        f"import sys, {also_import or 'os'}; from {module} import {name}\n"
        f"from benchmarks.measure import high_water\n"
        f"before = high_water(); {name}(*sys.argv[1:]); print(high_water() - before)"
    )
    return float(run_python("-c", script, *arguments).split()[-1])


def run_python(*arguments: object, environment: dict[str, str] | None = None) -> str:
    """Run Python in a process of its own; what it prints."""
    command: Sequence[str] = [sys.executable, "-W", "ignore", *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout


def high_water() -> float:
    """The most memory that this process has ever held, in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def environment() -> dict[str, str]:
    """Versions and cores that the figures belong to."""
    names = ("jax", "numpy", "scipy", "scikit-learn", "cebra", "torch")
    return {
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        **{name: importlib.metadata.version(name) for name in names},
    }


def spread(values: list[float]) -> str:
    """Median and range, in seconds."""
    if not values:
        return ""
    return f"{statistics.median(values):.3g} s ({min(values):.3g} to {max(values):.3g})"
