"""Consistency and alignment against CEBRA's own."""

import cebra
import numpy as np
import pytest
import torch
from cebra.integrations.sklearn.helpers import align_embeddings as cebra_align_embeddings

from cebra_jax_metrics import align_embeddings, consistency_score


def recordings(rows, widths, seed=0):
    """Embeddings of recordings of different lengths that share a label, some rows missing."""
    rng = np.random.default_rng(seed)
    labels = [rng.uniform(size=rows + 20 * i) for i in range(len(widths))]
    curves = [np.stack([np.sin(k * x) for k in range(1, 5)], axis=1) for x in labels]
    embeddings = [
        curve @ rng.normal(size=(4, width)) + 0.5 * rng.normal(size=(len(curve), width))
        for curve, width in zip(curves, widths, strict=True)
    ]
    embeddings[0][5:9, 0] = np.nan
    return embeddings, labels


@pytest.mark.parametrize("bins", [2, 20, 100, 300])
@pytest.mark.parametrize("normalize", [True, False])
def test_alignment(bins, normalize):
    """With 300 bins many are empty, and take those beside them."""
    embeddings, labels = recordings(500, (3, 5, 2))
    theirs = cebra_align_embeddings(embeddings, labels, normalize, bins)
    ours = align_embeddings(embeddings, labels, normalize, bins)
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(np.array(a), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bins", [10, 100, 300])
@pytest.mark.parametrize("ids", [None, ["a", "b", "c"], [2, 0, 1]])
def test_between_datasets(bins, ids):
    arguments = (*(recordings(600, (3, 8, 3))), ids, bins)
    theirs = cebra.sklearn.metrics.consistency_score(arguments[0], "datasets", *arguments[1:])
    ours = consistency_score(arguments[0], "datasets", *arguments[1:])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[2], theirs[2])


@pytest.mark.parametrize("widths", [(3, 3), (2, 8, 5), (48, 40, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_between_runs(widths, dtype):
    rng = np.random.default_rng(1)
    embeddings = [rng.normal(size=(50, width)).astype(dtype) for width in widths]
    theirs = cebra.sklearn.metrics.consistency_score(embeddings, "runs")
    ours = consistency_score(embeddings, "runs")
    bound = 1e-9 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=bound)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[2], theirs[2])


def test_torch_tensors_with_and_without_gradient():
    rng = np.random.default_rng(2)
    embeddings = [rng.normal(size=(50, 3)) for _ in range(2)]
    expected = consistency_score(embeddings, "runs")[0]
    tensors = [torch.from_numpy(x) for x in embeddings]
    tensors[0].requires_grad_()
    np.testing.assert_allclose(consistency_score(tensors, "runs")[0], expected, atol=1e-12)


ONE = np.random.default_rng(3).normal(size=(30, 2))
LABEL = np.linspace(0, 1, 30)
MISTAKES = {
    "one embedding": ([ONE], "runs"),
    "no between": ([ONE, ONE],),
    "unknown between": ([ONE, ONE], "all"),
    "labels for runs": ([ONE, ONE], "runs", [LABEL, LABEL]),
    "ids for runs": ([ONE, ONE], "runs", None, [0, 1]),
    "lengths of runs": ([ONE, ONE[1:]], "runs"),
    "no labels": ([ONE, ONE], "datasets"),
    "too few labels": ([ONE, ONE], "datasets", [LABEL]),
    "labels of two dimensions": ([ONE, ONE], "datasets", [ONE, ONE]),
    "labels of another length": ([ONE, ONE], "datasets", [LABEL, LABEL[1:]]),
    "one dataset": ([ONE, ONE], "datasets", [LABEL, LABEL], ["a", "a"]),
    "no bins": ([ONE, ONE], "datasets", [LABEL, LABEL], None, 0),
    "text as labels": ([ONE, ONE], "datasets", [["a"] * 30, ["b"] * 30]),
    "bins without steps": ([ONE, ONE], "datasets", [LABEL**9, LABEL]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors(name):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever CEBRA raises)
        cebra.sklearn.metrics.consistency_score(*MISTAKES[name])
    with pytest.raises(theirs.type) as ours:
        consistency_score(*MISTAKES[name])
    assert str(ours.value)[:30] == str(theirs.value)[:30]
