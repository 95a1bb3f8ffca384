"""Training: what a step is, several models at once, stopping and going on, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cebra_jax_metrics import (
    Encoder,
    Model,
    TrainingError,
    draw,
    estimate_infonce,
    evaluate,
    fit,
    goodness_of_fit_history,
    goodness_of_fit_score,
    gradient_steps,
    load,
    multisession_infonce_loss,
    samplers,
    save,
    training,
)
from cebra_jax_metrics.encoders import layers

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
STEPS = 300
LABELS = np.sin(np.linspace(0, 20, STEPS)[:, None] * [1, 1.7]).astype(np.float32)
X = np.cos(2 * LABELS @ RNG.normal(size=(2, 6))) + 0.3 * RNG.normal(size=(STEPS, 6))
X = X.astype(np.float32)
KINDS = (LABELS[:, 0] > 0).astype(int)
SAMPLER = samplers.TimeDelta(LABELS, 3)
SMALL = dict(num_hidden_units=8, output_dimension=3, batch_size=32, learning_rate=1e-3)
SAMPLERS = {
    "time": (samplers.Time(STEPS, 3), []),
    "time_delta": (SAMPLER, [LABELS]),
    "delta_normal": (samplers.DeltaNormal(LABELS, 0.2), [LABELS]),
    "discrete": (samplers.Discrete(KINDS, "uniform"), [KINDS]),
    "mixed": (samplers.Mixed(KINDS, LABELS, 2), [LABELS, KINDS]),
    "hybrid": (samplers.Hybrid(SAMPLER, 3), [LABELS]),
}


def train(sampler=SAMPLER, num_steps=5, key=KEY, recording=X, **options):
    options = {"architecture": "offset5-model", **SMALL, **options}
    return fit(key, recording, sampler, num_steps=num_steps, **options)


def same(found, expected, rtol=1e-5):
    def compare(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)

    jax.tree.map(compare, found, expected)


@pytest.mark.heavy
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_those_of_gradient_descent(name):
    """Against a loop of a few lines over the same batches."""
    sampler, labels = SAMPLERS[name]
    result = train(sampler, optimizer=optax.sgd, learning_rate=0.1)
    model = train(sampler, num_steps=1, optimizer=optax.sgd, learning_rate=1e-30).model
    losses = []
    for number in range(5):
        batch = draw(KEY, sampler, 32, 1, start=number)
        loss, gradient = jax.value_and_grad(lambda m, b: evaluate(m, X, b).loss[0])(model, batch)
        fixed = jax.tree.map(jnp.zeros_like, gradient.criterion)
        gradient = Model(gradient.encoders, fixed)
        model = jax.tree.map(lambda x, g: x - 0.1 * g, model, gradient)
        losses.append(loss)
    np.testing.assert_allclose(result.history["total"], losses, rtol=1e-5)
    same(result.model, model)
    total = result.history["pos"] + result.history["neg"]
    np.testing.assert_allclose(total, result.history["total"], rtol=1e-5)
    assert goodness_of_fit_history(result).shape == (5,)
    score = goodness_of_fit_score(result, X, *labels, num_batches=20, key=KEY)
    expected = estimate_infonce(KEY, result, X, sampler, batch_size=32, num_batches=20)
    assert score == pytest.approx(float(expected.bits), abs=1e-5)


def test_it_learns():
    result = train(num_steps=200, learn_temperature=True, architecture="offset10-model")
    bits = goodness_of_fit_history(result)
    assert bits[-10:].mean() > bits[:10].mean() + 0.5
    temperature = result.history["temperature"]
    np.testing.assert_allclose(temperature[0], np.exp(-1e-3), rtol=1e-5)  # Adam's first step


@pytest.mark.heavy
def test_windows_or_the_whole_recording():
    """Short recordings are embedded as a whole, of long ones only what a batch needs."""
    labels = np.tile(LABELS, (4, 1))
    long = np.tile(X, (4, 1))
    sampler = samplers.TimeDelta(labels, 3)
    few, many = train(sampler, recording=long, batch_size=8), None
    model = train(sampler, recording=long, batch_size=8, num_steps=1, learning_rate=1e-30).model
    batch = draw(KEY, sampler, 8, 1)
    expected = evaluate(model, long, batch).loss
    many = few.history["total"][:1]
    np.testing.assert_allclose(many, expected, rtol=1e-5)
    encoder = model.encoders[0]
    steps = jnp.asarray([0, 1, 2, 50, len(long) - 2, len(long) - 1])
    found = jax.jit(Encoder.encode_steps)(encoder, jnp.asarray(long), steps)
    every = jax.jit(Encoder.encode_windows)(encoder, long)
    np.testing.assert_allclose(found, every[encoder.window_of(steps, len(long))], atol=1e-6)


@pytest.mark.heavy
def test_sessions_are_trained_together():
    sampler = samplers.Multisession([LABELS, LABELS[:200]], 3)
    recordings = [X, X[:200, :4]]
    result = train(sampler, recording=recordings, num_steps=60)
    assert [e.num_neurons for e in result.model.encoders] == [6, 4]
    batch = draw(KEY, sampler, 32, 1)
    first = train(sampler, recording=recordings, num_steps=1, learning_rate=1e-30)
    expected = evaluate(first.model, recordings, batch).loss
    np.testing.assert_allclose(result.history["total"][:1], expected, rtol=1e-5)
    loss = float(multisession_infonce_loss(result, recordings, [LABELS, LABELS[:200]]))
    assert loss < result.history["total"][0] - 0.2
    discrete = samplers.DiscreteMultisession([KINDS, KINDS[:200]])
    train(discrete, recording=recordings)
    few = samplers.Multisession([np.tile(LABELS, (9, 1))] * 2, 3)  # windows of a batch only
    train(few, recording=[np.tile(X, (9, 1))] * 2, batch_size=4)


def test_full_batches():
    full = samplers.FullBatch(samplers.TimeDelta(LABELS, 3), STEPS, (2, 3))
    result = train(full, batch_size=None)
    batch = draw(KEY, full, None, 1)
    first = train(full, batch_size=None, num_steps=1, learning_rate=1e-30)
    expected = evaluate(first.model, X, batch).loss
    np.testing.assert_allclose(result.history["total"][:1], expected, rtol=1e-5)
    assert result.settings["batch_size"] is None


KINDS_OF_ENCODERS = {
    "offset1-model-v4": "cosine",
    "offset1-model-mse-resnet-2layers": "euclidean",
    "offset10-model-mse-tanh": "euclidean",
    "offset36-model-more-dropout": "cosine",
    "offset4-model-2x-subsample": "cosine",
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", KINDS_OF_ENCODERS)
def test_kinds_of_encoders(name):
    result = train(architecture=name, similarity=KINDS_OF_ENCODERS[name], num_steps=2)
    assert np.isfinite(result.history["total"]).all()


def test_dropout_while_training():
    """A feature is dropped for all steps of a window, one in ten; none at evaluation."""
    layer = layers.Dropout(0.1)
    ones = jnp.ones((5, 1000))
    dropped = np.asarray(layer.apply({}, "", ones, KEY))
    assert (dropped == dropped[:1]).all()
    share = (dropped[0] == 0).mean()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / 1000)
    np.testing.assert_allclose(dropped[0][dropped[0] > 0], 1 / 0.9, rtol=1e-6)
    np.testing.assert_array_equal(layer.apply({}, "", ones), ones)
    encoder = Encoder.init(KEY, "offset36-model-dropout", 6, 64, 3)
    windows = jnp.full(4, 100)
    encode = jax.jit(Encoder.encode_steps)
    found = encode(encoder, jnp.asarray(X), windows, KEY)
    assert len(np.unique(np.asarray(found), axis=0)) == 4  # each window has its own
    expected = jax.jit(Encoder.encode_windows)(encoder, X)[100 - 18]
    same(encode(encoder, jnp.asarray(X), windows)[0], expected)


STACKS = {
    "seeds": dict(key=jax.random.split(KEY, 3)),
    "rates": dict(learning_rate=[1e-3, 1e-2, 1e-4]),
    "temperatures": dict(temperature=[0.5, 1.0, 2.0], learn_temperature=True),
    "shifts": dict(sampler=[samplers.TimeDelta(np.roll(LABELS, s, axis=0), 3) for s in (0, 9, 50)]),
    "all": dict(
        key=jax.random.split(KEY, 2),
        temperature=jnp.asarray([0.5, 1.0]),
        learning_rate=np.array([1e-3, 1e-2]),
        sampler=[samplers.TimeDelta(np.roll(LABELS, s, axis=0), 3) for s in (0, 9)],
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_several_models_at_once(name):
    options = STACKS[name]
    stack = train(**options)
    differ = ("key", "learning_rate", "temperature", "sampler")
    for number in range(len(stack.history["total"])):
        own = {k: v[number] if k in differ else v for k, v in options.items()}
        alone = train(**own)
        same(jax.tree.map(lambda x, n=number: x[n], stack.model), alone.model, rtol=1e-4)
        np.testing.assert_allclose(
            stack.history["total"][number], alone.history["total"], rtol=1e-5
        )


@pytest.mark.heavy
def test_several_models_on_a_mesh():
    mesh = jax.make_mesh((8,), ("devices",))
    keys = jax.random.split(KEY, 5)
    same(train(key=keys, mesh=mesh).model, train(key=keys).model)


@pytest.mark.heavy
def test_under_vmap():
    keys = jax.random.split(KEY, 2)
    sampler = samplers.Time(STEPS, 3)
    found = jax.vmap(lambda key: train(sampler, key=key).model)(keys)
    same(found, train(sampler, key=keys).model, rtol=1e-4)


@pytest.mark.parametrize("stack", [False, True])
def test_stops_and_goes_on(stack):
    """As if it had never stopped, to the last bit."""
    options = dict(key=jax.random.split(KEY, 2)) if stack else {}
    whole = train(num_steps=7, **options)
    states = []

    def stop(state):
        states.append(state)
        return len(states) == 2

    part = train(num_steps=7, callback=stop, callback_every=2, **options)
    assert part.history["total"].shape[-1] == 4
    assert np.asarray(states[0].step).max() == 2
    rest = train(num_steps=7, state=part.training, **options)
    jax.tree.map(np.testing.assert_array_equal, rest.training, whole.training)
    early = train(num_steps=7, state=states[0], **options)
    jax.tree.map(np.testing.assert_array_equal, early.model, whole.model)


def test_callbacks_and_progress():
    seen, pieces = [], []

    def progress(rounds):
        for number in rounds:
            pieces.append(number)
            yield number

    train(
        num_steps=7,
        callback=lambda state: seen.append(int(state.step)),
        callback_every=3,
        progress=progress,
    )
    assert seen == [3, 6, 7]
    assert pieces == [0, 1, 2]


@pytest.mark.parametrize("pieces", [(0, 10, 3, 2), (4, 10, 3, 8), (0, 5, 5, 1), (3, 4, 9, 4)])
def test_pieces(pieces):
    start, stop, every, capacity = pieces
    found = training._pieces(*pieces)
    assert [step for first, end in found for step in range(first, end)] == [*range(start, stop)]
    assert all(0 < end - first <= capacity for first, end in found)
    ends = {end for _, end in found}
    assert ends >= {n for n in range(start + 1, stop) if n % every == 0} | {stop}


def test_a_loss_that_is_not_finite_stops_it():
    wild = dict(optimizer=optax.sgd, num_steps=40, architecture="offset1-model-mse")
    wild |= dict(similarity="euclidean", learning_rate=1e6)
    with pytest.raises(TrainingError, match="not finite") as caught:
        train(**wild)
    error = caught.value
    assert f"step {error.step} " in str(error)
    assert 0 < error.step < 40
    assert error.checkpoint.history["total"].shape == (error.step,)
    assert np.isfinite(error.checkpoint.history["total"]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(error.checkpoint.model))
    before = train(**{**wild, "num_steps": error.step})
    jax.tree.map(np.testing.assert_array_equal, before.model, error.checkpoint.model)
    state = error.checkpoint.training
    with pytest.raises(TrainingError, match=f"At step {error.step} "):
        train(**wild, state=state)
    with pytest.raises(TrainingError, match="of model 1 or its gradient") as caught:
        train(**{**wild, "learning_rate": [1e-9, 1e6]})
    assert caught.value.step == error.step
    stack = jax.tree.leaves(caught.value.checkpoint.model)
    assert all(np.isfinite(x).all() for x in stack)


def test_trains_a_model_further(tmp_path):
    first = train(num_steps=20, learn_temperature=True, min_temperature=0.1)
    save(first, tmp_path / "model.safetensors")
    stored = load(tmp_path / "model.safetensors")
    same(stored.model, first.model)
    assert {**stored.settings} == {**first.settings}
    more = train(num_steps=5, model=stored)
    assert more.history["temperature"][0] == pytest.approx(
        first.history["temperature"][-1], rel=2e-3
    )
    assert more.model.criterion.learned
    batch = draw(KEY, SAMPLER, 32, 1)
    np.testing.assert_allclose(
        more.history["total"][:1], evaluate(stored, X, batch).loss, rtol=1e-5
    )


def test_one_trace_for_all_numbers_of_steps():
    gradient_steps._train.clear_cache()
    for number, seed in ((5, 0), (7, 1), (8, 2)):
        train(num_steps=number, key=jax.random.key(seed), learning_rate=1e-3 * number)
    assert gradient_steps._train._cache_size() == 1


def test_initial_parameters_have_the_distribution_of_torch():
    """Uniform within one over the root of the number of inputs."""
    result = train(num_steps=1, learning_rate=1e-30, num_hidden_units=128)
    weight = np.asarray(result.model.encoders[0].params["net.2.module.0.weight"])
    bound = 1 / np.sqrt(np.prod(weight.shape[1:]))
    assert np.abs(weight).max() <= bound
    count = weight.size
    assert abs(weight.mean()) < 4 * bound / np.sqrt(3 * count)
    assert abs(weight.var() / (bound**2 / 3) - 1) < 4 * np.sqrt(0.8 / count)


BAD = {
    "steps": (dict(num_steps=0), ValueError, "num_steps has to be at least 1"),
    "every": (dict(callback_every=0), ValueError, "callback_every"),
    "architecture": (dict(architecture="offset11-model"), ValueError, "Did you mean"),
    "optimizer": (dict(optimizer="adam"), TypeError, "optax.adam"),
    "two rates": (dict(optimizer=optax.adam(1e-3)), ValueError, "learning rate already"),
    "rate": (dict(learning_rate=-1.0), ValueError, "learning_rate has to be finite and above 0"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature has to be finite"),
    "lowest": (dict(min_temperature=-1.0), ValueError, "min_temperature"),
    "similarity": (dict(similarity="angle"), ValueError, "Unknown similarity 'angle'"),
    "stack": (
        dict(learning_rate=[1e-3, 1e-2], temperature=[1.0, 1.0, 1.0]),
        ValueError,
        "one axis, of one length",
    ),
    "kinds": (dict(sampler=[SAMPLER, samplers.Time(STEPS)]), ValueError, "of one kind"),
    "length": (dict(sampler=samplers.Time(STEPS + 1)), ValueError, "sampler is for 301"),
    "batch": (dict(batch_size=None), TypeError, "batch_size"),
    "one recording": (
        dict(sampler=samplers.Multisession([LABELS, LABELS])),
        ValueError,
        "list of one recording",
    ),
    "hybrid": (
        dict(sampler=samplers.Hybrid(SAMPLER, 3), output_dimension=2),
        ValueError,
        "2 features",
    ),
    "short": (dict(recording=X[:4], sampler=samplers.Time(4)), ValueError, "minimum of 5"),
    "one dimension": (dict(recording=X[:, 0]), ValueError, "Expected 2D array"),
    "nan": (dict(recording=np.where(X > 1, np.nan, X)), ValueError, "NaN"),
    "key": (dict(key=0), TypeError, "key"),
    "state": (dict(state="half way"), TypeError, "TrainingState"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        train(**options)


def test_states_of_other_arguments():
    state = train(num_steps=3).training
    with pytest.raises(ValueError, match="has taken 3 steps already"):
        train(num_steps=3, state=state)
    for options in (
        {"num_hidden_units": 9},
        {"optimizer": optax.sgd},
        {"learn_temperature": True},
        {"architecture": "offset10-model"},
        {"key": jax.random.split(KEY, 2)},
    ):
        with pytest.raises(ValueError, match="of the state"):
            train(num_steps=5, state=state, **options)


def test_without_optax(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optax", None)
    with pytest.raises(ImportError, match=r"cebra-jax-metrics\[fit\]"):
        train()
