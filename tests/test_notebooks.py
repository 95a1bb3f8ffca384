"""Notebooks run from top to bottom as they are committed, and find what they say."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
each = pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.ipynb"))])


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook):
    """What the cells print, numbers aside, and which of them draw."""
    found = []
    for cell in code(notebook):
        texts = [x.get("text", x.get("data", {}).get("text/plain", "")) for x in cell.outputs]
        drawn = sum("image/png" in x.get("data", {}) for x in cell.outputs)
        found.append((re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", "".join(texts)), drawn))
    return [(re.sub(r" +", " ", text), drawn) for text, drawn in found]


@each
def test_committed_as_executed(name):
    cells = code(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(x.output_type in ("stream", "display_data", "execute_result") for x in outputs)
    assert not any(x.get("name") == "stderr" for x in outputs)
    assert any("image/png" in x.get("data", {}) for x in outputs)


# What a notebook says of its results, as a last cell.
CLAIMS = {
    "02_meta_optimisation": """
assert auc >= 0.95
assert difference.mean() > 3 * difference.std(ddof=1) / len(difference) ** 0.5
assert weights[3] <= 0.1
assert on_test[1] > on_test[0]
np.testing.assert_allclose(slope, (float(ends[0]) - float(ends[1])) / 0.04, rtol=0.02)
"""
}


@pytest.mark.heavy
@each
def test_runs_from_top_to_bottom(name, tmp_path):
    notebook = read(name)
    expected = shown(notebook)
    if name in CLAIMS:
        notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS[name]))
        expected.append(("", 0))
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert shown(notebook) == expected
