"""README says what is so: names, benchmark table, output of the demo."""

import re
from pathlib import Path

import numpy as np

import cebra_jax_metrics
from cebra_jax_metrics import samplers
from cebra_jax_metrics.demo import describe_demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_table_of_public_names():
    section = README.split("Public names")[1].split("## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[2] for row in rows)))
    assert named == set(cebra_jax_metrics.__all__) | set(samplers.__all__)


def test_drop_in_example_runs(recording, capsys):
    example = README.split("<!-- drop-in example -->\n```python\n")[1].split("```")[0]
    model = ROOT / "tests" / "golden" / "offset10-model.pt"
    exec(example, {"cebra_model": model, "X": recording["X"], "labels": recording["position"]})
    assert re.fullmatch(r"-?\d\.\d{3} ± \d\.\d{3} bits\n", capsys.readouterr().out)


def test_mesh_example_runs(recording):
    page = (ROOT / "docs" / "many_devices.md").read_text()
    example = page.split("<!-- mesh example -->\n```python\n")[1].split("```")[0]
    model = ROOT / "tests" / "golden" / "offset10-model.pt"
    names = {"cebra_model": model, "X": recording["X"], "labels": recording["position"]}
    exec(example, names)
    alone = cebra_jax_metrics.goodness_of_fit_score(
        *(names[x] for x in ("cebra_model", "X", "labels"))
    )
    np.testing.assert_allclose(names["bits"], alone, atol=1e-5)


def test_fit_example_runs(recording):
    page = (ROOT / "docs" / "guide.md").read_text()
    example = page.split("<!-- fit example -->\n```python\n")[1].split("```")[0]
    names = {"X": recording["X"], "labels": recording["position"]}
    exec(example, names)
    assert names["checkpoint"].history["total"].shape == (50,)
    assert names["stack"].history["total"].shape == (3, 50)


def test_everything_public_has_a_docstring():
    for module in (cebra_jax_metrics, samplers):
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_benchmark_table_is_that_of_the_stored_results():
    from benchmarks import control_variates, roofline
    from benchmarks.report import PAGE, RESULTS, speed_table, stored_tables

    def between(text, name):
        return text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()

    assert between(README, "speed") == speed_table()
    assert between(PAGE.read_text(), "benchmarks") == stored_tables().strip()
    for part in (roofline, control_variates):
        page = part.page(RESULTS / f"{part.PAGE.stem}.json")
        assert between(part.PAGE.read_text(), part.PAGE.stem) == page.strip()


def test_demo_output():
    shown = README.split("<!-- demo output -->\n```text\n")[1].split("```")[0].strip()
    found = describe_demo().strip()
    number = r"-?\d+\.\d{4}"
    assert re.sub(rf" *{number}", "#", shown) == re.sub(rf" *{number}", "#", found)
    values = [[float(x) for x in re.findall(number, text)] for text in (shown, found)]
    np.testing.assert_allclose(*values, atol=2e-4)
