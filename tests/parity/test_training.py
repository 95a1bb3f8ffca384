"""Training and gradients against torch: CEBRA's own models, criteria, solvers and Adam."""

import copy

import cebra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cebra.data import Batch, BatchIndex
from cebra.integrations.sklearn.dataset import SklearnDataset

import cebra_jax_metrics as cjm
from cebra_jax_metrics.demo import load_demo

from . import peer

KEY = jax.random.key(0)
RECORDING = peer.simulate(1, num_steps=300, num_neurons=6)
SESSIONS = [peer.simulate(2, num_steps=260, num_neurons=4), RECORDING]
RATE, STEPS, SIZE = 3e-3, 50, 64

CASES = {
    "mlp": {"model_architecture": "offset1-model"},
    "conv": {"model_architecture": "offset10-model"},
    "learned": {"temperature_mode": "auto", "temperature": 0.7, "min_temperature": 0.1},
    "euclidean": {"model_architecture": "offset10-model-mse", "distance": "euclidean"},
    "euclidean learned": {
        "model_architecture": "offset1-model-mse",
        "distance": "euclidean",
        "temperature_mode": "auto",
    },
}


def untrained(X, *labels, **settings):
    """An estimator whose one step went nowhere."""
    still = {
        "max_iterations": 1,
        "learning_rate": 1e-30,
        "batch_size": SIZE,
        "num_hidden_units": 16,
    }
    return peer.fit(X, *labels, **{**still, "num_hidden_units": 16, **settings})


def windows(estimator, recordings, labels):
    dataset = SklearnDataset(recordings, labels)
    dataset.configure_for(estimator.model_)
    return dataset


def steps_of_torch(estimator, dataset, batches, make_index):
    """Losses of CEBRA's solver, training a copy of its model on given indices."""
    solver = copy.deepcopy(estimator.solver_)
    parameters = [*solver.model.parameters(), *solver.criterion.parameters()]
    solver.optimizer = torch.optim.Adam(parameters, lr=RATE)
    losses = []
    for number in range(STEPS):
        index = make_index(jax.tree.map(lambda x, n=number: torch.tensor(np.array(x[n])), batches))
        losses.append(solver.step(dataset.load_batch(index))["total"])
    return np.array(losses), solver


@pytest.mark.parametrize("name", CASES)
def test_follows_the_loss_of_cebra(name):
    estimator = untrained(RECORDING.X, RECORDING.position, time_offsets=3, **CASES[name])
    sampler = cjm.samplers.TimeDelta(RECORDING.position, 3)
    ours = cjm.fit(
        KEY,
        RECORDING.X,
        sampler,
        model=cjm.from_cebra(estimator),
        learning_rate=RATE,
        num_steps=STEPS,
        batch_size=SIZE,
    )
    batches = inside(cjm.draw(KEY, sampler, SIZE, STEPS), estimator)
    dataset = windows(estimator, RECORDING.X, (RECORDING.position,))
    losses, solver = steps_of_torch(estimator, dataset, batches, lambda b: BatchIndex(*b))
    np.testing.assert_allclose(ours.history["total"], losses, rtol=1e-4)
    if "learned" in name:
        np.testing.assert_allclose(
            ours.history["temperature"], solver.log["temperature"][-STEPS:], rtol=1e-4
        )
        assert ours.history["temperature"][-1] != ours.history["temperature"][0]


def inside(batches, estimator):
    """Windows over the edge are the first and last whole ones."""
    models = estimator.model_
    offset = (models if hasattr(models, "get_offset") else models[0]).get_offset()

    def clip(steps):
        if steps.ndim == 2:
            return jnp.clip(steps, offset.left, len(RECORDING.X) - offset.right)
        lengths = jnp.asarray([len(s.X) for s in SESSIONS])[None, :, None]
        return jnp.clip(steps, offset.left, lengths - offset.right)

    return type(batches)(*map(clip, batches[:3]), *batches[3:])


def test_follows_the_joint_loss_of_cebra():
    X, labels = [s.X for s in SESSIONS], [s.position for s in SESSIONS]
    estimator = untrained(X, labels, time_offsets=3)
    sampler = cjm.samplers.Multisession(labels, 3)
    ours = cjm.fit(
        KEY,
        X,
        sampler,
        model=cjm.from_cebra(estimator),
        learning_rate=RATE,
        num_steps=STEPS,
        batch_size=SIZE,
    )
    batches = inside(cjm.draw(KEY, sampler, SIZE, STEPS), estimator)
    dataset = cebra.data.DatasetCollection(
        *[SklearnDataset(x, (y,)) for x, y in zip(X, labels, strict=True)]
    )
    dataset.configure_for(estimator.model_)

    def make_index(batch):
        steps = batch.reference, batch.positive, batch.negative
        return BatchIndex(*steps, index=None, index_reversed=batch.order.numpy())

    losses, _ = steps_of_torch(estimator, dataset, batches, make_index)
    np.testing.assert_allclose(ours.history["total"], losses, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """Of parameters, temperature and recording, on the same indices."""
    estimator = untrained(RECORDING.X, RECORDING.position, time_offsets=3, **CASES[name])
    checkpoint = cjm.from_cebra(estimator)
    batches = inside(
        cjm.draw(KEY, cjm.samplers.TimeDelta(RECORDING.position, 3), SIZE, 1), estimator
    )
    solver = estimator.solver_
    solver.model.train()
    dataset = windows(estimator, RECORDING.X, (RECORDING.position,))
    dataset.neural.requires_grad_(True)
    index = [torch.tensor(np.array(x[0])) for x in batches]
    loaded = Batch(*(dataset[i] for i in index))
    prediction = solver._inference(loaded)
    loss, *_ = solver.criterion(prediction.reference, prediction.positive, prediction.negative)
    solver.model.zero_grad()
    solver.criterion.zero_grad()
    loss.backward()

    def ours(model, X):
        return cjm.evaluate(model, X, batches).loss[0]

    value, (model, X) = jax.value_and_grad(ours, argnums=(0, 1))(
        checkpoint.model, jnp.asarray(RECORDING.X)
    )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)

    largest = max(p.grad.abs().max().item() for p in solver.model.parameters())

    def close(found, expected, scale=0.0):
        atol = 1e-4 * max(expected.abs().max().item(), scale)
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=atol)

    close(X, dataset.neural.grad)
    aliases = dict(solver.model.named_parameters())
    *_, last = aliases
    for parameter, gradient in model.encoders[0].params.items():
        # The last bias does not matter to distances: its gradient is 0 but for rounding.
        is_nothing = "euclidean" in name and parameter == last
        close(gradient, aliases[parameter].grad, largest if is_nothing else 0.0)
    if "learned" in name:
        # d/d(-log τ) = -τ d/dτ
        found = -model.criterion.temperature * checkpoint.model.criterion.temperature
        close(found, solver.criterion.log_inverse_temperature.grad)


def test_goes_back_into_torch():
    """What was trained here is loaded by CEBRA's own model."""
    sampler = cjm.samplers.TimeDelta(RECORDING.position, 3)
    for name in ("offset10-model", "offset1-model", "offset36-model-dropout"):
        ours = cjm.fit(
            KEY,
            RECORDING.X,
            sampler,
            architecture=name,
            num_hidden_units=16,
            output_dimension=3,
            num_steps=5,
            batch_size=SIZE,
        )
        estimator = untrained(RECORDING.X, RECORDING.position, model_architecture=name)
        state = {k: torch.tensor(np.array(v)) for k, v in cjm.to_state_dict(ours).items()}
        estimator.solver_.model.load_state_dict(state)
        np.testing.assert_allclose(
            cjm.embed(ours, RECORDING.X), estimator.transform(RECORDING.X), atol=1e-5
        )


def test_default_optimizer_is_that_of_cebra():
    sampler = cjm.samplers.Time(len(RECORDING.X))
    options = dict(num_steps=5, batch_size=SIZE, num_hidden_units=8)
    default = cjm.fit(KEY, RECORDING.X, sampler, **options)
    adam = cjm.fit(KEY, RECORDING.X, sampler, optimizer=optax.adam(3e-4), **options)
    np.testing.assert_allclose(default.history["total"], adam.history["total"], rtol=1e-6)
    assert cebra.CEBRA().learning_rate == 3e-4


def test_reaches_the_goodness_of_fit_of_cebra():
    """On the recording of the demo, after as many steps; the mean over five seeds each."""
    demo, number = load_demo(), 5
    settings = dict(num_hidden_units=32, output_dimension=3, batch_size=256)
    steps = {"max_iterations": 200, "time_offsets": 10, "learning_rate": 1e-3}
    theirs = []
    for seed in range(number):
        peer.seed(seed)
        estimator = cebra.CEBRA(
            model_architecture="offset10-model", device="cpu", **settings, **steps
        ).fit(demo.spikes, demo.position)
        theirs.append(
            cjm.goodness_of_fit_score(estimator, demo.spikes, demo.position, num_batches=200)
        )
    sampler = cjm.samplers.TimeDelta(demo.position, 10)
    stack = cjm.fit(
        jax.random.split(KEY, number),
        demo.spikes,
        sampler,
        architecture="offset10-model",
        learning_rate=1e-3,
        num_steps=200,
        **settings,
    )
    ours = jax.vmap(
        lambda model: (
            cjm.estimate_infonce(
                KEY, model, demo.spikes, sampler, batch_size=256, num_batches=200
            ).bits
        )
    )(stack.model)
    stderr = np.hypot(*(np.std(x, ddof=1) / number**0.5 for x in (ours, theirs)))
    assert abs(np.mean(ours) - np.mean(theirs)) < 3 * stderr
    assert np.mean(theirs) > 1  # they have learned
