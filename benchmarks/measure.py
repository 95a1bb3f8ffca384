"""Timing two ways of doing one thing, alternating, and what the run was made on."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Comparison:
    """Times of the project and of its peer, in seconds, taken in turns in one run."""

    case: str
    peer: str
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster the project is, by medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return asdict(self) | {"ratio": self.ratio}


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    case: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> Comparison:
    """Warm both up by one call, then time them in turns."""
    ours()
    theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return Comparison(case, peer, [a for a, _ in times], [b for _, b in times])


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
    return f"{statistics.median(values):.3g} s ({min(values):.3g} to {max(values):.3g})"
