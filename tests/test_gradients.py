"""Goodness of fit as an objective: derivatives of every order against finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from cebra_jax_metrics import (
    Criterion,
    Encoder,
    Model,
    draw,
    estimate_infonce,
    evaluate,
    infonce,
    samplers,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4))
LABELS = RNG.normal(size=(40, 2)).cumsum(0)
SAMPLER = samplers.TimeDelta(LABELS, 3)
CASES = {
    f"{kind} {similarity} {'learned' if learned else 'fixed'}": (name, similarity, learned)
    for kind, name in (("conv", "offset5-model"), ("mlp", "offset1-model"))
    for similarity in ("cosine", "euclidean")
    for learned in (False, True)
}
each = pytest.mark.parametrize("name", CASES)


def make(name, dtype):
    architecture, similarity, learned = CASES[name]
    encoder = Encoder.init(KEY, architecture, 4, 5, 3)
    criterion = Criterion(similarity, jnp.asarray(0.6, dtype), learned, jnp.asarray(0.01, dtype))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), Model((encoder,), criterion))


def bits(model, X):
    return estimate_infonce(KEY, model, X, SAMPLER, batch_size=8, num_batches=3).bits


@pytest.mark.heavy
@each
def test_first_derivatives_against_finite_differences(name):
    """Of parameters, temperature and recording together, along random directions."""
    with jax.enable_x64(True):
        model, recording = make(name, jnp.float64), jnp.asarray(X)
        check_grads(bits, (model, recording), order=1, atol=1e-6, rtol=1e-6, eps=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_hessian_against_finite_differences(similarity):
    """Of the embeddings of a small batch, and the temperature."""
    with jax.enable_x64(True):
        rows = jnp.asarray(RNG.normal(size=(3, 4, 2)))

        def loss(rows, temperature):
            return infonce(*rows, similarity=similarity, temperature=temperature).loss

        hessian = jax.jit(jax.hessian(loss))(rows, 0.7)
        gradient = jax.jit(jax.grad(loss))
        step = 1e-6
        for index in np.ndindex(rows.shape):
            change = jnp.zeros_like(rows).at[index].set(step)
            expected = (gradient(rows + change, 0.7) - gradient(rows - change, 0.7)) / (2 * step)
            np.testing.assert_allclose(hessian[index], expected, atol=1e-6)
        check_grads(partial(loss, rows), (0.7,), order=2, atol=1e-6, rtol=1e-6, eps=1e-4)


@pytest.mark.heavy
@each
def test_hessian_of_a_model(name):
    """Of the first few parameters and the temperature, symmetric and as differences say."""
    with jax.enable_x64(True):
        model, batch = make(name, jnp.float64), draw(KEY, SAMPLER, 6, 1)
        flat, restore = ravel_pytree(model)

        def loss(few):
            return evaluate(restore(flat.at[:5].add(few)), X, batch).loss[0]

        hessian = jax.jit(jax.hessian(loss))(jnp.zeros(5))
        gradient = jax.jit(jax.grad(loss))
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)
        step = 1e-5
        for i, change in enumerate(step * jnp.eye(5)):
            expected = (gradient(change) - gradient(-change)) / (2 * step)
            np.testing.assert_allclose(hessian[i], expected, atol=1e-6)


@pytest.mark.heavy
@each
def test_under_jit_and_vmap_and_forward(name):
    model, recording = make(name, jnp.float32), jnp.asarray(X, jnp.float32)
    value, gradient = jax.value_and_grad(bits, argnums=(0, 1))(model, recording)
    jitted = jax.jit(jax.value_and_grad(bits, argnums=(0, 1)))(model, recording)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (model, recording))
    mapped = jax.vmap(jax.value_and_grad(bits, argnums=(0, 1)))(*stacked)

    def close(found, expected):
        # Similarities of order 1 nearly cancel: rounding is that of float32 at 1.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-7)

    jax.tree.map(close, jitted, (value, gradient))
    jax.tree.map(lambda x, y: close(x[1], y), mapped, (value, gradient))
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size).reshape(x.shape)), recording)
    direction = direction.astype(jnp.float32)
    _, tangent = jax.jvp(lambda X: bits(model, X), (recording,), (direction,))
    np.testing.assert_allclose(tangent, jnp.sum(gradient[1] * direction), rtol=1e-3, atol=1e-5)


def test_indices_are_outside_the_gradient():
    """Labels decide which steps are compared; nothing flows through that choice."""
    model, recording = make("conv cosine fixed", jnp.float32), jnp.asarray(X, jnp.float32)

    def loss(labels):
        sampler = samplers.TimeDelta(labels, 3)
        return estimate_infonce(KEY, model, recording, sampler, batch_size=8, num_batches=2).loss

    gradient = jax.grad(loss)(jnp.asarray(LABELS, jnp.float32))
    np.testing.assert_array_equal(gradient, 0)
