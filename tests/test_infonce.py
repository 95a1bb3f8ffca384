"""The loss against a float64 reference, its invariants, and its range."""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import logsumexp

from cebra_jax_metrics import chance_level, dot_similarity, euclidean_similarity, goodness_of_fit
from cebra_jax_metrics import infonce as infonce_function
from cebra_jax_metrics.infonce import InfoNCE

SIMILARITIES = ("cosine", "euclidean")


def embeddings(seed, batch=16, negatives=24, features=3, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, features), (batch, features), (negatives, features))
    return tuple((scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes)


def reference_infonce(ref, pos, neg, similarity, temperature):
    ref, pos, neg = (np.asarray(x, np.float64) for x in (ref, pos, neg))
    if similarity == "cosine":
        paired, crossed = (ref * pos).sum(1), ref @ neg.T
    else:
        paired = -((ref - pos) ** 2).sum(1)
        crossed = -((ref[:, None] - neg[None]) ** 2).sum(-1)
    align = -(paired / temperature).mean()
    uniform = logsumexp(crossed / temperature, axis=1).mean()
    return InfoNCE(align + uniform, align, uniform)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equals_float64_reference(similarity, temperature, scale):
    batch = embeddings(0, scale=scale)
    ours = infonce_function(*batch, similarity=similarity, temperature=temperature)
    expected = reference_infonce(*batch, similarity, temperature)
    largest = max(np.abs(expected))
    for ours_part, expected_part in zip(ours, expected, strict=True):
        assert abs(float(ours_part) - expected_part) <= 5e-6 * (1 + largest)


def test_euclidean_far_from_the_origin_keeps_its_digits():
    batch = [x + np.float32(1000.0) for x in embeddings(1)]
    ours = infonce_function(*batch, similarity="euclidean")
    expected = reference_infonce(*batch, "euclidean", 1.0)
    np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_value_and_gradient_are_finite(similarity, dtype, temperature):
    batch = tuple(jnp.asarray(x, dtype) for x in embeddings(2))

    def loss(batch, temperature):
        out = infonce_function(*batch, similarity=similarity, temperature=temperature)
        return out.loss, out

    (value, parts), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        batch, temperature
    )
    chex.assert_tree_all_finite((value, parts, gradients))
    assert value.dtype == jnp.float32
    expected = reference_infonce(*batch, similarity, temperature)
    largest = max(np.abs(expected))
    assert abs(float(value) - expected.loss) <= 5e-6 * (1 + largest)


@pytest.mark.heavy
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradient_against_finite_differences(similarity):
    with jax.enable_x64(True):
        batch = tuple(jnp.asarray(x, jnp.float64) for x in embeddings(3, 5, 6, 2))

        def loss(batch, temperature):
            return infonce_function(*batch, similarity=similarity, temperature=temperature).loss

        check_grads(loss, (batch, jnp.asarray(0.7)), order=2, modes=("fwd", "rev"), rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_blocks_change_neither_value_nor_gradient(similarity, block_size):
    batch = embeddings(4)

    def loss(batch, block_size):
        return infonce_function(*batch, similarity=similarity, block_size=block_size).loss

    dense = jax.value_and_grad(loss)(batch, 1024)
    blocked = jax.value_and_grad(loss)(batch, block_size)
    chex.assert_trees_all_close(dense, blocked, rtol=1e-5, atol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("temperature", [10.0, 0.3])  # without and with the search for the peak
def test_large_batches_in_blocks(similarity, temperature):
    batch = embeddings(5, 2500, 2300)
    norm = max(float(np.linalg.norm(x, axis=1).max()) for x in (batch[0], batch[2]))
    assert (norm**2 / temperature > 30) == (temperature < 1)

    def loss(batch, block_size):
        return infonce_function(
            *batch, similarity=similarity, temperature=temperature, block_size=block_size
        ).loss

    dense, gradient = jax.value_and_grad(loss)(batch, 2500)
    default, found = jax.value_and_grad(
        lambda batch: infonce_function(*batch, similarity=similarity, temperature=temperature).loss
    )(batch)
    assert abs(default - dense) <= 5e-6 * (1 + abs(dense))
    for ours, theirs in zip(found, gradient, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6 * np.abs(theirs).max())


def test_the_search_for_the_peak_is_decided_for_all_under_vmap():
    batch = jax.tree.map(lambda x: jnp.stack([x, 100 * x]), embeddings(6))
    found = jax.vmap(partial(infonce_function, temperature=0.05))(*batch)
    each = [infonce_function(*(x[i] for x in batch), temperature=0.05) for i in range(2)]
    chex.assert_trees_all_close(found, jax.tree.map(lambda *x: jnp.stack(x), *each), rtol=1e-6)
    text = str(jax.make_jaxpr(jax.vmap(infonce_function))(*batch))
    assert " cond[" in text  # and no select that would compute both


seeds = st.integers(0, 2**31)
fixed = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)


@fixed
@hypothesis.given(seeds, st.sampled_from(SIMILARITIES))
def test_invariant_under_permutation_and_rotation(seed, similarity):
    ref, pos, neg = embeddings(seed)
    rng = np.random.default_rng(seed)
    pairs, negatives = rng.permutation(len(ref)), rng.permutation(len(neg))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
    permuted = [x @ rotation for x in (ref[pairs], pos[pairs], neg[negatives])]
    chex.assert_trees_all_close(
        infonce_function(ref, pos, neg, similarity=similarity),
        infonce_function(*permuted, similarity=similarity),
        rtol=1e-5,
        atol=1e-5,
    )


@fixed
@hypothesis.given(seeds, st.floats(-50, 50))
def test_shifting_similarities_moves_only_the_parts(seed, shift):
    def shifted(ref, pos, neg):
        paired, crossed = dot_similarity(ref, pos, neg)
        return paired + shift, crossed + shift

    batch = embeddings(seed)
    plain = infonce_function(*batch)
    moved = infonce_function(*batch, similarity=shifted)
    np.testing.assert_allclose(moved.loss, plain.loss, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(moved.align, plain.align - shift, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(moved.uniform, plain.uniform + shift, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("num_negatives", [1, 7, 512])
def test_collapsed_embedding_is_at_chance(similarity, num_negatives):
    one = jnp.full((4, 3), 3**-0.5)
    negative = jnp.full((num_negatives, 3), 3**-0.5)
    loss = infonce_function(one, one, negative, similarity=similarity, temperature=0.1).loss
    assert abs(float(goodness_of_fit(loss, num_negatives))) < 1e-5
    np.testing.assert_allclose(loss, chance_level(num_negatives), rtol=1e-6, atol=1e-6)


def test_vmap_is_a_loop():
    batches = [embeddings(seed) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*batches, strict=True)]
    one_by_one = [infonce_function(*batch) for batch in batches]
    chex.assert_trees_all_close(
        jax.vmap(infonce_function)(*stacked),
        jax.tree.map(lambda *x: jnp.stack(x), *one_by_one),
        rtol=1e-6,
    )


def test_similarities_of_pairs_are_those_of_the_matrix():
    ref, pos, _ = embeddings(5)
    for similarity in (dot_similarity, euclidean_similarity):
        paired, crossed = similarity(ref, pos, pos)
        np.testing.assert_allclose(paired, jnp.diagonal(crossed), rtol=1e-5, atol=1e-5)


def test_bits():
    np.testing.assert_allclose(goodness_of_fit(np.log(512.0) - np.log(2.0), 512), 1.0, rtol=1e-6)
    np.testing.assert_allclose(goodness_of_fit(jnp.zeros(2), jnp.asarray([2, 4])), [1.0, 2.0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (5, 3), (6, 3)), r"got \(4, 3\), \(5, 3\)"),
        (((4, 3), (4, 3), (6, 2)), r"\(6, 2\)"),
        (((4,), (4,), (6,)), "Expected reference"),
        (((2, 4, 3), (2, 4, 3), (2, 4, 3)), "jax.vmap"),
        (((4, 3), (4, 3), (0, 3)), "Expected reference"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        infonce_function(*(jnp.zeros(shape) for shape in shapes))


def test_unknown_similarity():
    with pytest.raises(ValueError, match=r"'manhattan'.*cosine"):
        infonce_function(*embeddings(0), similarity="manhattan")
