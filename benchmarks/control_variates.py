"""Standard error against wall time: plain batches, control variates, and CEBRA's 500 batches."""

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from benchmarks.data import fitted
from benchmarks.infonce import MAIN, PEER
from benchmarks.measure import Comparison, compare, warm
from cebra_jax_metrics import Estimate, from_cebra, infonce_loss

CASES = (MAIN, ("offset10-model", "time"))
BATCHES = 500  # as CEBRA's default
KEYS = 8
PAGE = Path(__file__).parent.parent / "docs" / "control_variates.md"
FIGURE = PAGE.with_suffix(".png")


@dataclass(frozen=True)
class Precision:
    """Standard errors, and the times that they take, of a growing number of batches."""

    case: str
    method: str
    batches: list[int]
    seconds: list[float]
    stderr: list[float]
    headline: bool = True

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return asdict(self)


def run(quick: bool) -> list[Comparison | Precision]:
    """The cases of issue and README on 10 000 steps of 120 neurons with 3-D labels."""
    return list(itertools.chain.from_iterable(_rows(*case, quick) for case in CASES))


def _rows(architecture: str, kind: str, quick: bool) -> list[Comparison | Precision]:
    import cebra

    estimator, X, labels = fitted(architecture, kind)
    checkpoint = from_cebra(estimator)
    batches = 20 if quick else BATCHES

    def ours(number: int, method: str, seed: int = 0) -> Estimate:
        options = {"num_batches": number, "method": method, "key": jax.random.key(seed)}
        return infonce_loss(checkpoint, X, *labels, **options, return_estimate=True)

    def theirs() -> float:
        metrics = cebra.sklearn.metrics
        return metrics.infonce_loss(estimator, X, *labels, num_batches=batches)

    def stderr(number: int, method: str) -> float:
        each = [ours(number, method, seed).stderr for seed in range(KEYS)]
        return float(np.sqrt(np.mean(np.square(each))))

    wanted = stderr(batches, "plain")
    least = next(n for n in range(16, 10**4, 2) if stderr(n, "control_variates") <= wanted)
    case = f"{architecture}, {kind}, {least} batches as precise as {batches}"
    rows: list[Comparison | Precision] = [
        compare(case, PEER, lambda: ours(least, "control_variates"), theirs, 1 if quick else 3)
    ]
    for method in ("plain", "control_variates"):
        numbers = [16, 32] if quick else [16, 24, 40, 64, 100, 200, 500, 1000, 2000]
        times = [warm(lambda n=n, m=method: ours(n, m), 5) for n in numbers]
        errors = [stderr(number, method) for number in numbers]
        rows.append(Precision(f"{architecture}, {kind}", method, numbers, times, errors))
    return rows


def page(results: Path) -> str:
    """The figure, and the same as a table."""
    rows = json.loads(results.read_text())["rows"]
    lines = [
        "![Standard error against wall time](control_variates.png)",
        "",
        "| case | method | batches | seconds | standard error (nats) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "batches" in row:
            every = zip(row["batches"], row["seconds"], row["stderr"], strict=True)
            lines += [
                f"| {row['case']} | {row['method']} | {number} | {time:.3f} | {error:.2g} |"
                for number, time, error in every
            ]
    return "\n".join(lines)


def draw(results: Path) -> None:
    """Draw the figure of the page."""
    from matplotlib.figure import Figure

    rows = json.loads(results.read_text())["rows"]
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(CASES), sharey=True)
    for ax, (architecture, kind) in zip(axes, CASES, strict=True):
        for row in rows:
            if row["case"] == f"{architecture}, {kind}":
                ax.plot(row["seconds"], row["stderr"], "o-", label=row["method"])
                if row["method"] == "plain":
                    error = row["stderr"][row["batches"].index(BATCHES)]
        (peer,) = (r for r in rows if r["case"].startswith(f"{architecture}, {kind}, "))
        ax.plot(np.median(peer["theirs"]), error, "k*", markersize=12, label=peer["peer"])
        ax.set(xscale="log", yscale="log", xlabel="Wall time (s)", title=f"{architecture}, {kind}")
        ax.legend()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("Standard error of the loss (nats)")
    figure.savefig(FIGURE)
