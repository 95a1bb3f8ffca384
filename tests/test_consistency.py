"""Consistency and alignment against scikit-learn, and their invariants."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from cebra_jax_metrics import align_embeddings, consistency_matrix, consistency_score

RNG = np.random.default_rng(0)


def noise(*widths, rows=200, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, width)) for width in widths]


def with_condition(condition, rows=500, width=6):
    """Columns whose singular values fall to 1 / condition, turned and shifted."""
    left, right = (np.linalg.qr(RNG.normal(size=(n, width)))[0] for n in (rows, width))
    return 10 * (left * np.geomspace(1, 1 / condition, width)) @ right.T + 3


def fitted(embeddings):
    """The matrix by scikit-learn, one fit per pair."""
    return np.array(
        [[LinearRegression().fit(x, y).score(x, y) for y in embeddings] for x in embeddings]
    )


def matrix(embeddings, **options):
    with jax.enable_x64(True):
        return np.asarray(consistency_matrix(embeddings, **options))


CASES = {
    "equal widths": noise(3, 3, 3),
    "different widths": noise(1, 8, 3),
    "two rows": noise(1, 2, rows=2),
    "width close to length": noise(18, 15, 19, rows=20),
    "duplicated columns": [noise(3)[0][:, [0, 1, 1]], *noise(3, 2, seed=1)],
    "constant column": [np.insert(noise(2)[0], 1, 0.0, axis=1), *noise(2, seed=1)],
    "all constant": [np.zeros((50, 2)), *noise(2, rows=50)],
    "scales": [noise(3)[0] * [1e-4, 1, 1e2], *noise(3, seed=2)],
    **{
        f"condition {c:g}": [with_condition(c), with_condition(c), with_condition(10)]
        for c in (1e2, 1e4, 1e5, 1e7, 1e8, 1e10)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_equals_scikit_learn(name):
    bound = 1e-6 if name.startswith("condition") else 1e-9
    np.testing.assert_allclose(matrix(CASES[name]), fitted(CASES[name]), rtol=0, atol=bound)


def test_in_float32():
    embeddings = [x.astype(np.float32) for x in (*noise(3, 8), with_condition(100, rows=200))]
    found = consistency_matrix([jnp.asarray(x) for x in embeddings])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, fitted([x.astype(float) for x in embeddings]), atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 7, 100, 199, 200, 1000])
@pytest.mark.parametrize("name", ["different widths", "condition 10000"])
def test_blocks_change_nothing(block_size, name):
    embeddings = [x[:200] for x in CASES[name]]
    found = matrix(embeddings, block_size=block_size)
    np.testing.assert_allclose(found, matrix(embeddings), rtol=1e-9, atol=1e-12)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**31))
def test_invariants(seed):
    rng = np.random.default_rng(seed)
    source, target = noise(3, 4, rows=60, seed=seed)
    target = target + source @ rng.normal(size=(3, 4))
    expected = matrix([source, target])
    affine = source @ (np.eye(3) + 0.3 * rng.normal(size=(3, 3))) + rng.normal(size=3)
    np.testing.assert_allclose(matrix([affine, target])[0, 1], expected[0, 1], atol=1e-9)
    scaled = target * rng.uniform(0.1, 10, 4) + rng.normal(size=4)
    np.testing.assert_allclose(matrix([source, scaled])[0, 1], expected[0, 1], atol=1e-9)
    rows = rng.permutation(60)
    permuted = matrix([target[rows], source[rows]])
    np.testing.assert_allclose(permuted, expected[::-1, ::-1], atol=1e-9)


def test_pairs_and_ids():
    scores, pairs, ids = consistency_score(noise(2, 3, 4), between="runs")
    expected = fitted(noise(2, 3, 4))
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    np.testing.assert_allclose(scores, [expected[i, j] for i, j in pairs], atol=1e-12)
    assert ids.tolist() == [0, 1, 2]


LABELS = [RNG.uniform(size=200) for _ in range(3)]


@pytest.mark.parametrize(
    "ids", [["a", "b", "a"], [1, "1", 1], [(0, "x"), (0, "y"), (0, "x")], [0.5, 2.0, 0.5]]
)
def test_repeated_ids_are_averaged_and_kept_apart(ids):
    scores, pairs, unique = consistency_score(noise(2, 3, 2), "datasets", LABELS, ids, 20)
    each, _, _ = consistency_score(noise(2, 3, 2), "datasets", LABELS, None, 20)
    by_pair = dict(zip([(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], each, strict=True))
    expected = [
        (by_pair[0, 1] + by_pair[2, 1]) / 2,
        (by_pair[1, 0] + by_pair[1, 2]) / 2,
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    assert [tuple(pair) for pair in pairs] == [(ids[0], ids[1]), (ids[1], ids[0])]
    assert list(unique) == ids[:2]


def test_identical_embeddings_are_consistent():
    for between, labels in (("runs", None), ("datasets", [LABELS[0]] * 2)):
        scores, _, _ = consistency_score(noise(3) * 2, between, labels)
        np.testing.assert_allclose(scores, 1, atol=1e-9)


def test_any_array_and_nothing_modified():
    embeddings, labels = noise(2, 3), [x.copy() for x in LABELS[:2]]
    embeddings[0][3, 1] = np.nan
    expected, _, _ = consistency_score(embeddings, "datasets", labels)
    before = [x.copy() for x in (*embeddings, *labels)]
    as_lists = [x.tolist() for x in embeddings], [x.tolist() for x in labels]
    scores, _, _ = consistency_score(as_lists[0], "datasets", as_lists[1])
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    assert all(isinstance(x, list) for x in (*as_lists[0], *as_lists[1]))
    in_jax, _, _ = consistency_score([jnp.asarray(x) for x in embeddings], "datasets", labels)
    np.testing.assert_allclose(in_jax, expected, atol=1e-4)
    for array, old in zip((*embeddings, *labels), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_integer_labels_give_a_row_per_value():
    embedding = noise(2, rows=6)[0]
    labels = np.array([3, -1, 3, 7, -1, 7])
    (aligned,) = align_embeddings([embedding], [labels], normalize=False)
    expected = [embedding[labels == value].mean(0) for value in (-1, 3, 7)]
    np.testing.assert_allclose(aligned, expected)
    other = np.array([3, -1, 3, 9, -1, -1])
    with pytest.raises(ValueError, match=r"label values \[7, 9\].*on_missing='drop'"):
        align_embeddings([embedding, embedding], [labels, other])
    with pytest.warns(UserWarning, match=r"\[7, 9\]"):
        dropped = align_embeddings([embedding, embedding], [labels, other], on_missing="drop")
    assert [x.shape for x in dropped] == [(2, 2), (2, 2)]


def test_rows_are_normalised():
    for rows in align_embeddings(noise(2, 3), LABELS[:2]):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)


GAP = np.concatenate([np.linspace(0, 0.2, 100), np.linspace(0.8, 1, 100)])
BAD = {
    "one": (lambda: consistency_score(noise(2), "runs"), ValueError, "at least 2 embeddings"),
    "between": (lambda: consistency_score(noise(2, 2)), ValueError, "Missing between"),
    "all": (lambda: consistency_score(noise(2, 2), "all"), NotImplementedError, "between=all"),
    "labels": (
        lambda: consistency_score(noise(2, 2), "runs", LABELS),
        ValueError,
        "No labels should be provided",
    ),
    "ids": (
        lambda: consistency_score(noise(2, 2), "runs", None, [0, 1]),
        ValueError,
        "No dataset ID should be provided",
    ),
    "rows": (
        lambda: consistency_score([*noise(2), *noise(2, rows=9)], "runs"),
        ValueError,
        r"same shape.*\[200, 9\]",
    ),
    "nan": (
        lambda: consistency_score([x * np.nan for x in noise(2, 2)], "runs"),
        ValueError,
        "contains NaN",
    ),
    "no_labels": (lambda: consistency_score(noise(2, 2), "datasets"), ValueError, "Missing labels"),
    "few_labels": (
        lambda: consistency_score(noise(2, 2), "datasets", LABELS[:1]),
        ValueError,
        "2 embeddings and 1",
    ),
    "label_kind": (
        lambda: consistency_score(noise(2, 2), "datasets", [1.0, 2.0]),
        ValueError,
        "Invalid labels, expect",
    ),
    "label_dimensions": (
        lambda: consistency_score(noise(2, 2), "datasets", noise(2, 2)),
        NotImplementedError,
        "expect 1D labels only, got 2D",
    ),
    "one_dataset": (
        lambda: consistency_score(noise(2, 2), "datasets", LABELS[:2], ["a", "a"]),
        ValueError,
        "more than one dataset",
    ),
    "few_ids": (
        lambda: consistency_score(noise(2, 2, 2), "datasets", LABELS, ["a", "b"]),
        ValueError,
        "3 embeddings, but 2 dataset_ids",
    ),
    "bins": (lambda: align_embeddings(noise(2), LABELS[:1], n_bins=0), ValueError, "n_bins"),
    "length": (
        lambda: align_embeddings(noise(2), [LABELS[0][1:]]),
        ValueError,
        "200 samples in embedding and 199",
    ),
    "text": (lambda: align_embeddings(noise(2), [["a"] * 200]), ValueError, "got string"),
    "nan_label": (lambda: align_embeddings(noise(2), [GAP * np.nan]), ValueError, "NaN"),
    "gap": (
        lambda: align_embeddings(noise(2), [GAP]),
        ValueError,
        r"close enough to bin index 23 \(labels 0.222222 to 0.232323\) in embedding 0",
    ),
    "shapes": (
        lambda: consistency_matrix([np.zeros((3, 1)), np.zeros((4, 1))]),
        ValueError,
        "equal",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
