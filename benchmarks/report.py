"""Results as JSON, and as the Markdown table that README shows."""

import json
import statistics
from pathlib import Path

from benchmarks.measure import spread

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def table(result: dict, only_headlines: bool = False) -> str:
    """A Markdown table of comparisons: medians with their range, and peak memory."""
    rows = [
        "| case | here | peer | peer's time | times faster | memory here | peer's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["comparisons"]:
        if only_headlines and not row["headline"]:
            continue
        cells = [
            row["case"],
            spread(row["ours"]),
            row["peer"],
            spread(row["theirs"]),
            _digits(statistics.median(row["theirs"]) / statistics.median(row["ours"])),
            _megabytes(row["our_memory"]),
            _megabytes(row["their_memory"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    note = f"Medians (and ranges) of alternating runs; peak memory above imports; {versions}."
    return "\n".join(rows) + f"\n\n{note}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} MB"


def _digits(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def stored_table() -> str:
    """The table of all stored results."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(
        f"`{file.stem}`:\n\n{table(json.loads(file.read_text()), only_headlines=True)}"
        for file in files
    )


def update_readme() -> None:
    """Put the table of the stored results between README's marks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{stored_table()}\n{END}{after}")
