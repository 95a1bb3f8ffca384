"""What bounds each stage: counts of work over peaks, of machines that are here or are not.

The page ``docs/roofline.md`` is made from it. Peaks of this machine are measured, by bare
operations of the same kind; those of accelerators are their makers' figures.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import BATCH_SIZE, LABELS, NEURONS, STEPS, recording
from benchmarks.measure import Comparison, warm
from cebra_jax_metrics import Encoder, Model, draw, evaluation, samplers
from cebra_jax_metrics.encoders import get_architecture
from cebra_jax_metrics.model import Criterion, encode_recording

PAGE = Path(__file__).parent.parent / "docs" / "roofline.md"
BATCHES, TAU, WIDTH, UNITS, ARCHITECTURE = 500, 10, 3, 32, "offset10-model"
KEY = jax.random.key(0)


@dataclass(frozen=True)
class Machine:
    """Peaks, per second; ``queries`` of a k-d tree, where the host searches."""

    name: str
    products: float  # float32 operations in matrix products of the highest precision
    exponentials: float
    bandwidth: float  # bytes
    queries: float = math.inf


@dataclass(frozen=True)
class Stage:
    """Counts of work of one stage."""

    name: str
    operations: float = 0
    exponentials: float = 0
    traffic: float = 0  # bytes to and from memory
    queries: float = 0

    def seconds(self, machine: Machine) -> float:
        """The time that the scarcest of the machine's peaks allows."""
        return max(
            self.operations / machine.products,
            self.exponentials / machine.exponentials,
            self.traffic / machine.bandwidth,
            self.queries / machine.queries,
        )

    def bound(self, machine: Machine) -> str:
        """Which of the peaks that is."""
        shares = {
            "products": self.operations / machine.products,
            "exponentials": self.exponentials / machine.exponentials,
            "memory": self.traffic / machine.bandwidth,
            "tree queries": self.queries / machine.queries,
        }
        return max(shares, key=lambda name: shares[name])


# H100 SXM: 67 teraflops in float32 outside tensor cores, 3.35 TB/s; 132 multiprocessors with 16
# special functions per cycle of 1.83 GHz. TPU v5e, per chip: 197 teraflops in bfloat16, of which
# the highest precision of float32 takes 6 passes; 819 GB/s; 1024 vector lanes at 1.5 GHz.
H100 = Machine("one H100", 67e12, 132 * 16 * 1.83e9, 3.35e12)
CHIP = Machine("one TPU v5e chip", 197e12 / 6, 1024 * 1.5e9, 819e9)
SLICE_CHIPS = 8
SLICE = Machine(
    f"TPU v5e slice of {SLICE_CHIPS} chips",
    *(SLICE_CHIPS * x for x in (CHIP.products, CHIP.exponentials, CHIP.bandwidth)),
)


def encoding() -> Stage:
    """All windows of a recording, once."""
    shapes = (get_architecture(ARCHITECTURE).shapes(NEURONS, UNITS, WIDTH) or {}).values()
    weights = [shape for shape in shapes if len(shape) > 1]
    values = sum(shape[1] + 2 * math.prod(shape) / shape[1] for shape in weights)
    return Stage(
        "encode the recording once",
        operations=2 * STEPS * sum(map(math.prod, weights)),
        traffic=4 * STEPS * values,
    )


def search(on_host: bool) -> Stage:
    """The positives of all batches: a query of the tree each, or all labels compared with each."""
    queries = BATCHES * BATCH_SIZE
    if on_host:
        return Stage("find the positives (k-d tree)", queries=queries)
    compared = 2 * (LABELS + 1) + 5  # the product, and what is asked of each distance
    return Stage("find the positives (matrix product)", operations=queries * STEPS * compared)


def losses() -> Stage:
    """InfoNCE of all batches, fused: similarities do not go through memory."""
    pairs, rows = BATCHES * BATCH_SIZE**2, 3 * BATCHES * BATCH_SIZE
    return Stage(
        "InfoNCE of all batches",
        operations=2 * WIDTH * pairs,
        exponentials=pairs,
        traffic=rows * (4 + 2 * 4 * WIDTH),
    )


def align_only() -> Stage:
    """The align part alone, of labels shifted against the recording."""
    rows = 2 * BATCHES * BATCH_SIZE
    return Stage("align part", operations=rows * WIDTH, traffic=rows * (4 + 4 * WIDTH))


def one_score(machine: Machine) -> float:
    """A recording from its rows to its bits."""
    return sum(stage.seconds(machine) for stage in (encoding(), search(False), losses()))


def many_shifts(machine: Machine) -> float:
    """1000 shifts of each of 1000 recordings, each a score of its own but for the encoder."""
    each = search(False).seconds(machine) + losses().seconds(machine)
    return 1000 * (encoding().seconds(machine) + 1000 * each)


def shared_uniform(machine: Machine) -> float:
    """The same, with one uniform part per recording."""
    each = search(False).seconds(machine) + align_only().seconds(machine)
    return 1000 * (encoding().seconds(machine) + losses().seconds(machine) + 1000 * each)


def shared_pairs(machine: Machine) -> float:
    """The same, with pairs that are found once per recording, and shifted."""
    return 1000 * (one_score(machine) + 1000 * align_only().seconds(machine))


MANY = "1000 recordings x 1000 shifts"
SCENARIOS = {
    "one score": one_score,
    f"{MANY}, each a score of its own": many_shifts,
    f"{MANY}, on 100 such hosts": lambda machine: many_shifts(machine) / 100,
    f"{MANY}, one uniform part per recording": shared_uniform,
    f"{MANY}, and its pairs found once and shifted": shared_pairs,
    f"{MANY}, the latter on 100 such hosts": lambda machine: shared_pairs(machine) / 100,
}


def this_machine() -> Machine:
    """Peaks of the CPU, by bare operations."""
    from scipy.spatial import cKDTree

    size, many = 2_000, 2**24
    square, line = (jax.random.normal(KEY, shape) for shape in ((size, size), (many,)))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    exponential = jax.jit(lambda x: jnp.sum(jnp.exp(x)))
    copy = jax.jit(lambda x: x + 1)
    _, labels = recording()
    tree, queries = cKDTree(labels.astype(float)), np.roll(labels, 1, axis=0) + 0.01
    seconds = [
        warm(lambda function=function, x=x: jax.block_until_ready(function(x)), 5)
        for function, x in ((product, square), (exponential, line), (copy, line))
    ]
    return Machine(
        "this CPU",
        2 * size**3 / seconds[0],
        many / seconds[1],
        2 * line.nbytes / seconds[2],
        len(queries) / warm(lambda: tree.query(queries, workers=-1), 5),
    )


def measured() -> dict[str, float]:
    """Seconds that the stages take here, by their names."""
    X, labels = recording()
    encoder = Encoder.init(KEY, ARCHITECTURE, NEURONS, UNITS, WIDTH)
    model = Model((encoder,), Criterion())
    sampler = samplers.TimeDelta(labels, TAU)
    batch = draw(KEY, sampler, BATCH_SIZE, BATCHES)
    windows = encode_recording(encoder, X)

    def ours() -> object:
        return jax.block_until_ready(
            evaluation.plain_losses(model.criterion, (encoder,), (windows,), None, batch)
        )

    return {
        encoding().name: warm(lambda: jax.block_until_ready(encode_recording(encoder, X)), 5),
        search(True).name: warm(lambda: draw(KEY, sampler, BATCH_SIZE, BATCHES), 5),
        losses().name: warm(ours, 5),
    }


@dataclass(frozen=True)
class Peaks(Comparison):
    """The peaks that a comparison was made with, for the page."""

    machine: dict | None = None


def run(quick: bool) -> list[Comparison]:
    """Measured times of the stages here, and those that the counts allow."""
    machine = this_machine()
    times = measured()
    rows: list[Comparison] = [
        Comparison(
            stage.name, "what the counts allow", [times[stage.name]], [stage.seconds(machine)]
        )
        for stage in (encoding(), search(True), losses())
    ]
    return [*rows, Peaks("peaks", "", [], [], headline=False, machine=vars(machine))]


def page(results: Path) -> str:
    """The tables of the page: computed for accelerators, computed and measured for this CPU."""
    rows = json.loads(results.read_text())["rows"]
    here = Machine(**rows[-1]["machine"])
    lines = [
        "| stage | operations | exponentials | bytes | tree queries |",
        "|---|---|---|---|---|",
        *(
            f"| {s.name} | {s.operations:.2g} | {s.exponentials:.2g} | {s.traffic:.2g} | "
            f"{s.queries:.2g} |"
            for s in (encoding(), search(True), search(False), losses(), align_only())
        ),
        "",
        "Measured, against what the counts allow on this CPU (2 cores):",
        "",
        "| stage | computed | bound by | measured | measured / computed |",
        "|---|---|---|---|---|",
    ]
    for stage, row in zip((encoding(), search(True), losses()), rows, strict=False):
        allowed, taken = row["theirs"][0], row["ours"][0]
        lines.append(
            f"| {stage.name} | {_time(allowed)} | {stage.bound(here)} | {_time(taken)} | "
            f"{taken / allowed:.1f} |"
        )
    lines += [
        "",
        "Computed, not measured, for machines that are not here:",
        "",
        "| | one H100 | bound by | " + f"{SLICE.name} | bound by |",
        "|---|---|---|---|---|",
    ]
    stages = (encoding(), search(False), losses())
    for stage in stages:
        cells = [f"{_time(stage.seconds(m))} | {stage.bound(m)}" for m in (H100, SLICE)]
        lines.append(f"| {stage.name} | {' | '.join(cells)} |")
    for name, seconds in SCENARIOS.items():
        cells = " | | ".join(_time(seconds(machine)) for machine in (H100, SLICE))
        lines.append(f"| {name} | {cells} | |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
