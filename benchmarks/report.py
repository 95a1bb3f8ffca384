"""Results as JSON, and as the Markdown tables that README shows."""

import json
import statistics
from pathlib import Path

from benchmarks import control_variates, roofline
from benchmarks.measure import spread

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


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


def update_readme() -> None:
    """Put the tables of the stored results between README's marks, and the page's."""
    _put(README, "benchmarks", stored_tables())
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
