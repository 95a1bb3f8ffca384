"""Encoders: names, shapes, tied weights, windows, custom architectures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cebra_jax_metrics import Checkpoint, Criterion, Encoder, Model, embed, to_state_dict
from cebra_jax_metrics.encoders import (
    architecture_names,
    architectures,
    get_architecture,
    register_architecture,
)

FAMILIES = (
    *("offset1-model", "offset1-model-v3", "offset1-model-v4", "offset1-model-mse-clip-5-1"),
    *("offset1-model-mse-v2-3layers-tanh", "offset1-model-mse-resnet-2layers"),
    *("offset5-model", "offset10-model-mse", "offset15-model", "offset36-model-more-dropout"),
)


@pytest.fixture
def registry(monkeypatch):
    """Registrations that are forgotten after the test."""
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))


def test_all_names_of_cebra():
    assert len(architectures._BUILT_IN) == 139 + 6  # those that subsample, by both names
    assert set(architecture_names()) >= architectures._BUILT_IN


@pytest.mark.parametrize("name", sorted(architectures._BUILT_IN))
def test_offset_is_what_the_layers_use_up(name):
    encoder = jax.eval_shape(lambda: Encoder.init(jax.random.key(0), name, 5, 4, 3))
    X = jax.ShapeDtypeStruct((encoder.receptive_field + 6, 5), jnp.float32)
    assert jax.eval_shape(Encoder.encode_windows, encoder, X).shape == (7, 3)
    assert jax.eval_shape(Encoder.encode, encoder, X).shape == (X.shape[0], 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_are_the_encoding_of_each_window(name):
    encoder = Encoder.init(jax.random.key(1), name, 5, 4, 3)
    X = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    encode = jax.jit(Encoder.encode_windows)
    windows = encode(encoder, X)
    left, right = encoder.offset
    for step in (0, left, 30, 60 - right, 59):
        center = min(max(step, left), 60 - right)
        alone = encode(encoder, X[center - left : center + right])
        row = windows[encoder.window_of(jnp.asarray(step), 60)]
        np.testing.assert_allclose(row, alone[0], rtol=1e-4, atol=1e-5)


def test_dtype_of_the_input_does_not_matter():
    model = Model((Encoder.init(jax.random.key(0), "offset5-model", 4, 6, 3),))
    counts = np.random.default_rng(0).integers(0, 2, (30, 4))
    expected = embed(model, counts.astype(np.float32))
    assert expected.dtype == jnp.float32
    for dtype in (bool, np.uint8, np.int64, np.uint16, np.float64, np.float16):
        np.testing.assert_array_equal(embed(model, counts.astype(dtype)), expected)
    np.testing.assert_array_equal(embed(model, counts.tolist()), expected)
    np.testing.assert_array_equal(embed(model, jnp.asarray(counts)), expected)


def test_padding_as_the_settings_say():
    model = Model((Encoder.init(jax.random.key(0), "offset10-model", 4, 6, 3),))
    X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    padded, whole = embed(model, X), embed(Checkpoint(model, {"pad_before_transform": False}), X)
    assert padded.shape == (30, 3)
    assert whole.shape == (21, 3)
    np.testing.assert_allclose(padded[5:26], whole, atol=1e-6)


def test_tied_weights_are_one_leaf_and_repeated_in_the_state_dict():
    encoder = Encoder.init(jax.random.key(0), "offset1-model-mse-v2-3layers", 5, 4, 2)
    state = to_state_dict(Model((encoder,)))
    assert {"net.3.weight", "net.5.weight", "net.7.weight"} <= set(state)
    assert "net.5.weight" not in encoder.params
    np.testing.assert_array_equal(state["net.3.weight"], state["net.7.weight"])


def test_initial_parameters_are_distributed_as_torchs():
    encoder = Encoder.init(jax.random.key(0), "offset10-model", 100, 64, 3)
    for name, fan_in in (("net.0", 200), ("net.2.module.0", 192)):
        weight = np.asarray(encoder.params[f"{name}.weight"]) * np.sqrt(fan_in)
        assert -1 <= weight.min() < -0.99 < 0.99 < weight.max() <= 1
        stderr = np.sqrt((1 / 5 - 1 / 9) / weight.size)
        assert abs((weight**2).mean() - 1 / 3) < 4 * stderr
        assert np.abs(encoder.params[f"{name}.bias"]).max() <= 1 / np.sqrt(fan_in)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("offset10-modle", "Did you mean 'offset10-model'.*register_architecture"),
        ("supervised1-model", "supervised"),
    ],
)
def test_unknown_and_refused_names(name, message):
    with pytest.raises(ValueError, match=message):
        get_architecture(name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 3), "neurons needs to be at least 1"),
        ((5, 1, 3), "hidden units needs to be at least 2"),
        ((5, 4, 0), "Output dimension needs to be at least 1"),
    ],
)
def test_sizes_too_small(sizes, message):
    with pytest.raises(ValueError, match=message):
        Encoder.init(jax.random.key(0), "offset1-model", *sizes)


@pytest.mark.usefixtures("registry")
def test_custom_architecture():
    def init(key, neurons, units, outputs):
        return {"weight": jax.random.normal(key, (2 * neurons, outputs))}

    def apply(params, X):
        return jnp.concatenate([X[:-1], X[1:]], axis=1) @ params["weight"]

    register_architecture("pairs", init=init, apply=apply, offset=(1, 1))
    model = Model((Encoder.init(jax.random.key(0), "pairs", 4, 1, 3),), Criterion("euclidean"))
    X = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    assert embed(model, X).shape == (20, 3)
    np.testing.assert_array_equal(
        to_state_dict(model)["weight"], model.encoders[0].params["weight"]
    )
    with pytest.raises(ValueError, match="exists already"):
        register_architecture("pairs", init=init, apply=apply, offset=(1, 1))

    def doubled(params, X):
        return 2 * apply(params, X)

    before = embed(model, X)
    register_architecture("pairs", init=init, apply=doubled, offset=(1, 1), replace=True)
    np.testing.assert_allclose(embed(model, X), 2 * before, rtol=1e-6)
    with pytest.raises(ValueError, match="exists already"):
        register_architecture("offset1-model", init=init, apply=apply, offset=(0, 1), replace=True)
    with pytest.raises(ValueError, match=r"offset\[1\]"):
        register_architecture("other", init=init, apply=apply, offset=(1, 0))
    with pytest.raises(TypeError, match="functions"):
        register_architecture("other", init=None, apply=apply, offset=(1, 1))


@pytest.mark.usefixtures("registry")
def test_shape_that_a_custom_architecture_returns_is_checked():
    register_architecture(
        "same", init=lambda *_: {}, apply=lambda params, X: X[:, :3], offset=(2, 3)
    )
    model = Model((Encoder.init(jax.random.key(0), "same", 4, 1, 3),))
    with pytest.raises(ValueError, match=r"'same'.*its offset or its apply is wrong"):
        embed(model, np.zeros((20, 4)))


@pytest.mark.usefixtures("registry")
def test_architecture_without_parameters():
    register_architecture("identity", init=lambda *_: {}, apply=lambda _, X: X, offset=(0, 1))
    model = Model((Encoder.init(jax.random.key(0), "identity", 4, 1, 4),))
    X = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    np.testing.assert_array_equal(embed(model, X), X)


def test_repr_is_short():
    encoders = tuple(Encoder.init(jax.random.key(0), "offset5-model", n, 4, 3) for n in (5, 7))
    single, several = Model(encoders[:1]), Model(encoders, Criterion("cosine", 0.5))
    assert "offset5-model" in repr(single)
    assert "5/7 neurons" in repr(several)
    assert max(len(repr(m)) for m in (single, several, Checkpoint(several))) < 200
    stacked = jax.tree.map(lambda *x: jnp.stack(x), single, single)
    assert "..." in repr(stacked)
