"""The command ``consistency``."""

import json
import sys

import jax
import matplotlib.image
import numpy as np
import pytest

from cebra_jax_metrics import consistency_score, consistency_test

STEPS = 300
POSITION = np.linspace(0, 1, STEPS) ** 0.8


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(0)
    shared = np.stack([np.sin(3 * POSITION), np.cos(5 * POSITION), POSITION], axis=1)
    return {
        name: shared @ rng.normal(size=(3, width)) + 0.3 * rng.normal(size=(STEPS, width))
        for name, width in (("achilles", 3), ("buddy", 4), ("cicero", 3))
    }


@pytest.fixture
def folder(tmp_path, monkeypatch, embeddings):
    """A folder of embeddings and their labels, where the command runs."""
    for name, embedding in embeddings.items():
        np.save(tmp_path / f"{name}.npy", embedding)
        np.save(tmp_path / f"{name}_position.npy", POSITION)
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = ("achilles.npy", "buddy.npy", "cicero.npy")
LABELS = ("--labels", *(f"{name[:-4]}_position.npy" for name in FILES))
NAMES = ["achilles", "buddy", "cicero"]


def test_runs_as_json(run, folder, embeddings):
    code, out, err = run("consistency", *FILES, "--between", "runs", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    expected = consistency_score(list(embeddings.values()), "runs")
    np.testing.assert_allclose(result["scores"], expected.scores)
    np.testing.assert_allclose(result["mean_score"], expected.scores.mean())
    assert result["pairs"] == [[NAMES[i], NAMES[j]] for i, j in expected.pairs]
    assert result["ids"] == NAMES
    assert (result["between"], result["cv"], result["schema_version"]) == ("runs", None, 1)
    assert "test" not in result


def test_datasets_as_json(run, folder, embeddings):
    ids = ["rat", "rat", "mouse"]
    options = ("--ids", *ids, "--bins", 20, "--cv", 4, "--test", "--seed", 7, "--json")
    code, out, err = run("consistency", *FILES, "--between", "datasets", *LABELS, *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    question = (list(embeddings.values()), "datasets", [POSITION] * 3, ids, 20)
    np.testing.assert_allclose(result["scores"], consistency_score(*question, cv=4).scores)
    test = consistency_test(jax.random.key(7), *question)
    for part in ("pairwise", "overall"):
        for name, value in getattr(test, part)._asdict().items():
            np.testing.assert_allclose(result["test"][part][name], value)
    assert result["pairs"] == [["rat", "mouse"], ["mouse", "rat"]]
    assert (result["cv"], result["seed"]) == (4, 7)
    assert result["null_quantile_levels"] == [0.05, 0.5, 0.95]


def test_as_a_table(run, folder, embeddings):
    _, out, _ = run("consistency", *FILES, "--between", "runs")
    head, *lines = out.splitlines()
    assert head.split() == ["predicting", "predicted", "R²"]
    scores = consistency_score(list(embeddings.values()), "runs").scores
    assert lines[0].split() == ["achilles", "buddy", f"{scores[0]:.4f}"]
    assert lines[-1].split() == ["mean", f"{scores.mean():.4f}"]
    assert len(lines) == 7
    _, out, _ = run("consistency", *FILES, "--between", "runs", "--cv", 5, "--test")
    head, *lines = out.splitlines()
    assert (
        "  ".join(head.split())
        == "predicting  predicted  R²  in  5  folds  R²  in  sample  by  chance  p"
    )
    assert len({len(line) for line in (head, *lines)}) == 1
    test = consistency_test(jax.random.key(0), list(embeddings.values()), "runs").pairwise
    held_out = consistency_score(list(embeddings.values()), "runs", cv=5).scores
    values = (held_out[1], test.observed[1], test.null_mean[1], test.p_value[1])
    assert lines[1].split() == ["achilles", "cicero", *(f"{value:.4f}" for value in values)]


def test_plot(run, folder):
    code, _, err = run("consistency", *FILES, "--between", "runs", "--plot", "out.png")
    assert (code, err) == (0, "")
    picture = matplotlib.image.imread(folder / "out.png")
    assert picture.shape == (750, 900, 4)
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10


def test_files_of_the_same_name(run, folder, embeddings):
    (folder / "other").mkdir()
    np.save(folder / "other" / "buddy.npy", embeddings["buddy"])
    _, out, _ = run("consistency", "buddy.npy", "other/buddy.npy", "--between", "runs", "--json")
    assert json.loads(out)["ids"] == ["buddy.npy", "other/buddy.npy"]


MISTAKES = {
    "one": (("achilles.npy", "--between", "runs"), "expect at least 2 embeddings"),
    "no question": (FILES, "--between"),
    "unknown question": ((*FILES, "--between", "all"), "invalid choice: 'all'"),
    "no file": (("achilles.npy", "nothing.npy", "--between", "runs"), "nothing.npy"),
    "no array": (("achilles.npy", "text.npy", "--between", "runs"), "expected an .npy file"),
    "objects": (("achilles.npy", "objects.npy", "--between", "runs"), "expected an .npy file"),
    "no labels": ((*FILES, "--between", "datasets"), "Missing labels"),
    "labels of runs": ((*FILES, "--between", "runs", *LABELS), "No labels should be provided"),
    "ids of runs": ((*FILES, "--between", "runs", "--ids", "a", "b", "c"), "No dataset ID"),
    "ids": ((*FILES, "--between", "datasets", *LABELS, "--ids", "a", "b"), "2 dataset_ids"),
    "folds": ((*FILES, "--between", "runs", "--cv", "1"), "cv has to be at least 2"),
    "bins": ((*FILES, "--between", "datasets", *LABELS, "--bins", "0"), "n_bins"),
    "folder": ((*FILES, "--between", "runs", "--plot", "no/out.png"), "There is no folder 'no'"),
    "picture": ((*FILES, "--between", "runs", "--plot", "out.foo"), "'foo' is not supported"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(run, folder, mistake):
    arguments, message = MISTAKES[mistake]
    code, out, err = run("consistency", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_without_matplotlib(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("consistency", *FILES, "--between", "runs", "--plot", "out.png")
    assert (code, out) == (2, "")
    assert "pip install" in err
