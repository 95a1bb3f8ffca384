"""Consistency and alignment against CEBRA's and scikit-learn's, and their invariants."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict

from cebra_jax_metrics import align_embeddings, consistency, consistency_matrix, consistency_score

from .conftest import GOLDEN

RNG = np.random.default_rng(0)
CASE_FILES = sorted(path.stem for path in (GOLDEN / "consistency").glob("*.npz"))


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


def golden(name):
    """What to ask, and what CEBRA answered."""
    with np.load(GOLDEN / "consistency" / f"{name}.npz") as data:
        answer = dict(data)
    embeddings, labels = (
        [answer[key] for key in sorted(answer) if key.startswith(kind)]
        for kind in ("embedding", "label")
    )
    if not labels:
        return embeddings, ("runs",), answer
    return embeddings, ("datasets", labels, answer["ids"], int(answer["num_bins"])), answer


KINDS = {
    "float64": (lambda x: x, "float64", 1e-9),
    "list": (lambda x: x.tolist(), "float64", 1e-9),
    "float32": (lambda x: x.astype(np.float32), "float32", 1e-4),
    "jax": (lambda x: jnp.asarray(x, jnp.float32), "float32", 1e-4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASE_FILES)
def test_equals_cebra(name, kind):
    convert, dtype, bound = KINDS[kind]
    embeddings, question, answer = golden(name)
    scores, pairs, ids = consistency_score([convert(x) for x in embeddings], *question)
    np.testing.assert_allclose(scores, answer[f"scores_{dtype}"], rtol=0, atol=bound)
    np.testing.assert_array_equal(pairs, answer["pairs"])
    np.testing.assert_array_equal(ids, answer["found_ids"])


def test_there_are_cases_of_all_kinds():
    assert len(CASE_FILES) == 16
    _, _, rounding = golden("constant_column_that_rounds")
    _, _, exact = golden("constant_column")
    lost = exact["scores_float64"] - rounding["scores_float64"]
    np.testing.assert_allclose(lost, [0.25, 0, 0.25, 0, 0.25, 0.25], atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_equals_scikit_learn(name):
    bound = 1e-6 if name.startswith("condition") else 1e-9
    np.testing.assert_allclose(matrix(CASES[name]), fitted(CASES[name]), rtol=0, atol=bound)


def held_out(embeddings, cv):
    """The matrix of held-out scores by scikit-learn."""

    def score(x, y):
        return r2_score(y, cross_val_predict(LinearRegression(), x, y, cv=KFold(cv)))

    return np.array([[score(x, y) for y in embeddings] for x in embeddings])


# Of these a singular value lies at scikit-learn's cut-off, where each of its fits decides anew.
AT_CUT_OFF = ("scales", "condition 1e+10")


@pytest.mark.heavy
@pytest.mark.parametrize("cv", [2, 5, 20])
@pytest.mark.parametrize(
    "name", [name for name in CASES if len(CASES[name][0]) >= 20 and name not in AT_CUT_OFF]
)
def test_held_out_equals_scikit_learn(name, cv):
    expected = held_out(CASES[name], cv)
    found = matrix(CASES[name], cv=cv, block_size=64)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_noise_is_not_consistent_where_it_is_held_out():
    embeddings, question, _ = golden("independent_noise")
    assert 0.6 < consistency_score(embeddings, *question).scores.mean() < 0.7
    assert consistency_score(embeddings, *question, cv=5).scores.max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_bins(kind):
    convert, _, bound = KINDS[kind]
    embeddings, question, _ = golden("different_datasets")
    aligned = align_embeddings(embeddings, question[1], n_bins=question[3])
    expected = held_out(aligned, 3)[~np.eye(3, dtype=bool)]
    result = consistency_score([convert(x) for x in embeddings], *question, cv=3)
    np.testing.assert_allclose(result.scores, expected, rtol=10 * bound, atol=bound)


def test_gradients():
    """Also where singular values coincide: at padding and at duplicated columns."""
    weights = RNG.normal(size=(3, 3))

    def score(embeddings):
        return jnp.sum(weights * consistency_matrix(embeddings, block_size=16))

    with jax.enable_x64(True):
        embeddings = [jnp.asarray(x) for x in noise(3, 5, 1, rows=40)]
        check_grads(score, (embeddings,), order=1, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)
        embeddings[0] = embeddings[0][:, jnp.asarray([0, 1, 1])]
        assert all(bool(jnp.isfinite(x).all()) for x in jax.grad(score)(embeddings))


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_the_scale_does_not_matter(scale):
    expected = matrix(noise(3, 4))
    np.testing.assert_allclose(matrix([scale * x for x in noise(3, 4)]), expected, rtol=1e-12)


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 1e-5])
def test_small_directions_of_float32_are_kept(ratio):
    """Moments in float32 could not tell them from nothing."""
    one, two = (x.astype(np.float32) for x in noise(1, 1, rows=1000))
    source, target = jnp.asarray(np.hstack([one, np.float32(ratio) * two])), jnp.asarray(two)
    scores = consistency_score([source, target], "runs").scores
    assert scores.dtype == np.float32
    assert scores[0] > 0.999


@pytest.mark.parametrize("cv", [None, 3])
def test_what_is_not_finite_stays_nan(cv):
    first, second = noise(3, 2)
    second[5, 1] = np.nan
    found = matrix([first, second], cv=cv)
    assert np.isnan(found[0, 1])
    assert found[0, 0] == pytest.approx(1)


def test_integers_are_numbers():
    columns = jnp.arange(12).reshape(6, 2), jnp.arange(6)[:, None]
    np.testing.assert_allclose(consistency_matrix(columns), 1, atol=1e-5)


def test_other_embeddings_do_not_change_a_score():
    """Not even where there are fewer rows than columns, so that the coordinates matter."""
    rng = np.random.default_rng(0)
    pair = [rng.normal(size=(20, 30)) * np.geomspace(1, 1e-2, 30), rng.normal(size=(20, 2))]
    third = rng.normal(size=(20, 2)) * [1, 1e-4]
    expected = held_out(pair, 5)
    np.testing.assert_allclose(matrix(pair, cv=5), expected, rtol=1e-6)
    np.testing.assert_allclose(matrix([*pair, third], cv=5)[:2, :2], expected, rtol=1e-6)


def test_batches_of_pairs():
    first, second = (jnp.asarray(x, jnp.float32) for x in noise(3, 4))
    stacked = jnp.stack([first, first**2]), jnp.stack([second, second + first[:, :1]])
    found = jax.vmap(lambda x, y: consistency_matrix([x, y]))(*stacked)
    expected = [consistency_matrix([x, y]) for x, y in zip(*stacked, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_trace_per_shape():
    consistency._matrix.clear_cache()
    for seed in range(3):
        matrix(noise(3, 5, rows=70, seed=seed))
    assert consistency._matrix._cache_size() == 1


def test_as_a_square():
    result = consistency_score(noise(2, 3, 2), "datasets", LABELS, ["b", "a", "b"], 20)
    assert np.isnan(np.diag(result.matrix)).all()
    by_pair = dict(zip(map(tuple, result.pairs), result.scores, strict=True))
    assert result.ids.tolist() == ["b", "a"]
    assert result.matrix[0, 1] == by_pair["b", "a"]
    assert result.matrix[1, 0] == by_pair["a", "b"]
    result = consistency_score(noise(2, 3), "datasets", LABELS[:2], [("x", 1), ("y", 2)], 20)
    assert result.matrix[1, 0] == result.scores[1]


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
    "one_row": (
        lambda: consistency_score(noise(2, 2, rows=1), "runs"),
        ValueError,
        "at least two rows",
    ),
    "one_bin": (
        lambda: consistency_score(noise(2, 2), "datasets", LABELS[:2], None, 2),
        ValueError,
        "at least two rows",
    ),
    "no_column": (
        lambda: consistency_score([noise(2)[0], np.zeros((200, 0))], "runs"),
        ValueError,
        "one feature",
    ),
    "block_size": (
        lambda: consistency_matrix(noise(2, 2), block_size=0),
        ValueError,
        "block_size has to be at least 1",
    ),
    "folds": (lambda: consistency_score(noise(2, 2), "runs", cv=201), ValueError, "cv=201.*200"),
    "one_fold": (lambda: consistency_score(noise(2, 2), "runs", cv=1), ValueError, "at least 2"),
    "fold_kind": (lambda: consistency_score(noise(2, 2), "runs", cv=2.0), TypeError, "cv has to"),
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
