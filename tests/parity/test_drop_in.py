"""A program written for CEBRA gives the same with our functions in place of CEBRA's."""

import inspect
import re
import textwrap
import types
from pathlib import Path

import cebra
import numpy as np
import pytest
from cebra.integrations.sklearn.helpers import align_embeddings

import cebra_jax_metrics
from cebra_jax_metrics.encoders import get_architecture

from . import peer

PAGE = (Path(__file__).parents[2] / "docs" / "from_cebra.md").read_text()
FIRST = peer.simulate(1, num_steps=400, num_neurons=6)
SECOND = peer.simulate(2, num_steps=350, num_neurons=4)
TRAINED = {"max_iterations": 40, "learning_rate": 3e-3, "batch_size": 64}

PROGRAM = textwrap.dedent("""
    import numpy as np

    metrics = cebra.sklearn.metrics
    single, labels = models["single"], (first.position,)

    loss = metrics.infonce_loss(single, first.X, *labels)
    few = metrics.infonce_loss(single, first.X, *labels, num_batches=100)
    corrected = metrics.infonce_loss(single, first.X, *labels, correct_by_batchsize=True)
    named = metrics.infonce_loss(single, first.X[:300], first.position[:300], session_id=None,
                                 num_batches=100, correct_by_batchsize=False)
    per_neuron = loss / first.X.shape[1]

    bits = metrics.goodness_of_fit_score(single, first.X, first.position)
    of_session = [
        metrics.infonce_loss(models["multi"], recording.X, recording.position, session_id=i)
        for i, recording in enumerate((first, second))
    ]
    of_time = metrics.goodness_of_fit_score(models["time"], first.X, num_batches=300)
    of_classes = metrics.goodness_of_fit_score(models["discrete"], first.X, first.direction)

    history = metrics.goodness_of_fit_history(single)
    best_step = int(history.argmax())
    smooth = np.convolve(history, np.ones(5) / 5, mode="valid")
    joint_history = metrics.goodness_of_fit_history(models["multi"])

    converted = metrics.infonce_to_goodness_of_fit(loss, model=single)
    two = np.array([3.0, 4.0])
    by_numbers = metrics.infonce_to_goodness_of_fit(two, batch_size=64, num_sessions=2)
    scalar = metrics.infonce_to_goodness_of_fit(3.0, batch_size=64, num_sessions=1)

    embeddings = [single.transform(first.X), models["time"].transform(first.X)]
    scores, pairs, runs = metrics.consistency_score(embeddings=embeddings, between="runs")
    mean_consistency = scores.mean()
    by_pair = {tuple(pair): score for pair, score in zip(pairs, scores)}

    across = [single.transform(first.X), models["multi"].transform(second.X, session_id=1)]
    heights = [first.height, second.height]
    dataset_scores, dataset_pairs, names = metrics.consistency_score(
        embeddings=across, labels=heights, dataset_ids=["a", "b"], between="datasets",
        num_discretization_bins=20)
    order = [list(names).index(pair[0]) for pair in dataset_pairs]

    aligned = align_embeddings(across, heights, n_bins=20)
    raw = align_embeddings(across, heights, normalize=False, n_bins=20)
    stacked = np.concatenate(aligned, axis=1)

    message = ""
    try:
        metrics.infonce_loss(single, first.X, first.position, first.position)
    except ValueError as error:
        message = str(error)[:40]
""")
# Estimates: of these only the kind and, within its noise, the value.
DRAWN = {"loss": 0.02, "few": 0.03, "corrected": 0.02, "named": 0.04, "per_neuron": 0.01}
DRAWN |= {"bits": 0.03, "of_session": 0.05, "of_time": 0.05, "of_classes": 0.04, "converted": 0.03}


@pytest.fixture(scope="module")
def models():
    return {
        "single": peer.fit(FIRST.X, FIRST.position, **TRAINED, time_offsets=5),
        "time": peer.fit(FIRST.X, **TRAINED, time_offsets=5),
        "discrete": peer.fit(FIRST.X, FIRST.direction, **TRAINED),
        "multi": peer.fit(
            [FIRST.X, SECOND.X], [FIRST.position, SECOND.position], **TRAINED, time_offsets=5
        ),
    }


def execute(models, module, align):
    """Run the program with a module in place of ``cebra.sklearn.metrics``."""
    names = {
        "cebra": types.SimpleNamespace(sklearn=types.SimpleNamespace(metrics=module)),
        "align_embeddings": align,
        "models": models,
        "first": FIRST,
        "second": SECOND,
    }
    given = set(names)
    exec(PROGRAM, names)  # (the program above)
    return {k: v for k, v in names.items() if k not in given | {"np", "metrics", "__builtins__"}}


@pytest.mark.usefixtures("exact_index")
def test_program(models):
    peer.seed(1)
    theirs = execute(models, cebra.sklearn.metrics, align_embeddings)
    ours = execute(models, cebra_jax_metrics, cebra_jax_metrics.align_embeddings)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert isinstance(found, type(expected)) or isinstance(expected, np.generic), name
        if name in DRAWN:
            np.testing.assert_allclose(found, expected, rtol=0, atol=DRAWN[name], err_msg=name)
        elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=name)
        elif isinstance(expected, list) and np.ndim(expected[0]):  # rows of arrays, or of lists
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, np.array(b), atol=1e-5, err_msg=name)
        elif isinstance(expected, float | dict):
            assert found == pytest.approx(expected, abs=1e-6), name
        elif isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype.kind == expected.dtype.kind, name
        elif not inspect.ismodule(expected) and name not in ("single", "labels", "recording"):
            assert found == expected, name


@pytest.mark.parametrize(
    "name",
    [
        "infonce_loss",
        "goodness_of_fit_score",
        "goodness_of_fit_history",
        "infonce_to_goodness_of_fit",
        "consistency_score",
    ],
)
def test_signatures(name):
    """CEBRA's arguments come first, in its order, with its names and defaults."""
    ours, theirs = (
        list(inspect.signature(getattr(module, name)).parameters.values())
        for module in (cebra_jax_metrics, cebra.sklearn.metrics)
    )
    for a, b in zip(ours, theirs, strict=False):
        assert (a.name, a.default) == (b.name, b.default)
    for more in ours[len(theirs) :]:
        assert more.kind in (more.KEYWORD_ONLY, more.VAR_KEYWORD)


def table(mark):
    """The names in the first column of a table of the page, and what the second says of them."""
    section = PAGE.split(f"<!-- {mark}: begin -->")[1].split(f"<!-- {mark}: end -->")[0]
    rows = [line.split("|") for line in section.strip().splitlines()[2:]]
    return {name: row[2].strip() for row in rows for name in re.findall(r"`([^`]+)`", row[1])}


def test_every_setting_is_documented():
    parameters = set(inspect.signature(cebra.CEBRA.__init__).parameters) - {"self"}
    assert set(table("settings")) == parameters


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_documented():
    entries = table("architectures")
    patterns = {re.escape(name).replace(r"\{n\}", r"\d+"): said for name, said in entries.items()}
    found = set()
    names = set(cebra.models.get_options()) | set(cebra.models.get_options("*"))
    assert len(names) == 147
    for name in names:
        (pattern,) = [p for p in patterns if re.fullmatch(p, name)]
        found.add(pattern)
        if patterns[pattern].startswith("supported"):
            get_architecture(name)
        else:
            assert patterns[pattern].startswith("refused")
            with pytest.raises(ValueError, match="cannot be used here"):
                get_architecture(name)
    assert found == set(patterns)
