"""Results as JSON, and as the Markdown table that README shows."""

import json
import statistics
from pathlib import Path

from benchmarks.measure import spread

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def table(result: dict) -> str:
    """A Markdown table of comparisons, medians with their range."""
    rows = ["| case | here | peer | peer's time | times faster |", "|---|---|---|---|---|"]
    for row in result["comparisons"]:
        rows.append(
            f"| {row['case']} | {spread(row['ours'])} | {row['peer']} | {spread(row['theirs'])} "
            f"| {_digits(statistics.median(row['theirs']) / statistics.median(row['ours']))} |"
        )
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n".join(rows) + f"\n\nMedians (and ranges) of alternating runs; {versions}."


def _digits(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def stored_table() -> str:
    """The table of all stored results."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(table(json.loads(file.read_text())) for file in files)


def update_readme() -> None:
    """Put the table of the stored results between README's marks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{stored_table()}\n{END}{after}")
