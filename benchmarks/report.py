"""Results as JSON, and as the Markdown tables that README shows."""

import json
import statistics
from pathlib import Path

from benchmarks import control_variates, roofline
from benchmarks.infonce import PEER
from benchmarks.measure import spread

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PAGE = README.parent / "docs" / "benchmarks.md"

# README's rows: results, the beginning of the case, what it is.
SPEED = (
    ("infonce", "offset10-model, time-delta", "goodness of fit by 3-D labels"),
    (
        "control_variates",
        "offset10-model, time-delta",
        'the same precision by `method="control_variates"`',
    ),
    ("infonce", "offset10-model, time,", "goodness of fit without labels"),
    (
        "control_variates",
        "offset10-model, time,",
        'the same precision by `method="control_variates"`',
    ),
    ("infonce", "offset10-model, discrete", "goodness of fit by discrete labels"),
    ("consistency", "40 embeddings, 10000 x 8", "consistency of 40 embeddings of 10 000 x 8"),
    ("cold", "whole process, no cache", "a whole process by 3-D labels, compilation included"),
    ("fit", "fit, 100 steps, offset10-model, time_delta", "training, 100 steps"),
)


def tables(result: dict, only_headlines: bool = False) -> str:
    """Markdown tables of comparisons and growths: medians with their range, and peak memory."""
    rows = [row for row in result["rows"] if row["headline"] or not only_headlines]
    compared = [row for row in rows if "peer" in row]
    growing = [row for row in rows if "sizes" in row]
    parts = []
    if compared:
        header = "| case | here | peer | peer's time | times faster | memory here | peer's |"
        parts.append(
            "\n".join([header, "|---|---|---|---|---|---|---|", *map(_compared, compared)])
        )
    if growing:
        header = "| case | sizes | seconds | memory | time grows with the power |"
        parts.append("\n".join([header, "|---|---|---|---|---|", *map(_growing, growing)]))
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    note = f"Medians (and ranges) of alternating runs; peak memory above imports; {versions}."
    return "\n\n".join([*parts, note])


def _compared(row: dict) -> str:
    cells = [
        row["case"],
        spread(row["ours"]),
        row["peer"],
        spread(row["theirs"]),
        _digits(row["ours"], row["theirs"]),
        _megabytes(row["our_memory"]),
        _megabytes(row["their_memory"]),
    ]
    return f"| {' | '.join(cells)} |"


def _growing(row: dict) -> str:
    cells = [
        row["case"],
        ", ".join(f"{size:,}".replace(",", " ") for size in row["sizes"]),
        ", ".join(f"{value:.2g}" for value in row["seconds"]),
        ", ".join(map(_megabytes, row["memory"])),
        f"{row['exponent']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} MB"


def _digits(ours: list[float], theirs: list[float]) -> str:
    if not ours or not theirs:
        return ""
    ratio = statistics.median(theirs) / statistics.median(ours)
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def stored_tables() -> str:
    """The tables of all stored results."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(
        f"`{file.stem}`:\n\n{tables(json.loads(file.read_text()), only_headlines=True)}"
        for file in files
    )


def speed_table() -> str:
    """The comparisons with CEBRA that README shows, and how many times faster."""
    lines = ["| 10 000 time steps, 500 batches of 512 | here | CEBRA 0.6.1 | times faster |"]
    lines += ["|---|---|---|---|"]
    for name, start, what in SPEED:
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        row = next(r for r in rows if r["case"].startswith(start) and r.get("peer") == PEER)
        ours, theirs = (statistics.median(row[who]) for who in ("ours", "theirs"))
        ratio = _digits(row["ours"], row["theirs"])
        lines.append(f"| {what} | {ours:.2g} s | {theirs:.2g} s | {ratio} |")
    return "\n".join(lines)


def update_readme() -> None:
    """Put tables of the stored results between the marks of README and of the pages."""
    _put(README, "speed", speed_table())
    _put(PAGE, "benchmarks", stored_tables())
    for part in (roofline, control_variates):
        results = RESULTS / f"{part.PAGE.stem}.json"
        if results.exists():
            _put(part.PAGE, part.PAGE.stem, part.page(results))
    if (RESULTS / "control_variates.json").exists():
        control_variates.draw(RESULTS / "control_variates.json")


def _put(file: Path, name: str, text: str) -> None:
    """Replace what is between the marks of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = file.read_text().partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")
