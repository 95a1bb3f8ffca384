"""Recordings of different lengths, models of one architecture in one call, shifts of labels."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import NEURONS, recording
from benchmarks.measure import Comparison, compare, seconds
from cebra_jax_metrics import (
    Encoder,
    Model,
    estimate_infonce,
    evaluation,
    goodness_of_fit_score,
    goodness_of_fit_test,
    model,
    samplers,
)
from cebra_jax_metrics.demo import load_demo
from cebra_jax_metrics.samplers import drawing

KEY = jax.random.key(0)
JITTED = {
    "_propose": drawing._propose,
    "plain_losses": evaluation.plain_losses,
    "_encode_chunk": model._encode_chunk,
}


def run(quick: bool) -> list[Comparison]:
    """All; the peers are the same calls on their own."""
    number, num_batches = (3, 10) if quick else (20, 500)
    return [
        *_recordings(number, num_batches),
        *_stacked(number, num_batches),
        _shifts(10 * number, num_batches),
    ]


def _score(one: Model, X: np.ndarray, labels: np.ndarray, num_batches: int) -> float:
    sampler = samplers.TimeDelta(labels, 10)
    options = {"batch_size": 512, "num_batches": num_batches}
    return float(estimate_infonce(KEY, one, X, sampler, **options))


def _recordings(number: int, num_batches: int) -> list[Comparison]:
    X, labels = recording(40_000)
    one = Model((Encoder.init(KEY, "offset10-model", NEURONS, 32, 3),))
    lengths = np.geomspace(1_000, len(X), number).astype(int)
    jax.clear_caches()
    cold = [seconds(lambda n=n: _score(one, X[:n], labels[:n], num_batches)) for n in lengths]
    counts = ", ".join(f"{name} {jitted._cache_size()}" for name, jitted in JITTED.items())
    again = [seconds(lambda n=n: _score(one, X[:n], labels[:n], num_batches)) for n in lengths]
    case = f"{number} recordings of {lengths[0]} to {lengths[-1]} steps (compilations: {counts})"
    return [Comparison(case, "the same, all compiled", [sum(cold)], [sum(again)])]


def _stacked(number: int, num_batches: int) -> list[Comparison]:
    X, labels = recording()
    sampler = samplers.TimeDelta(labels, 10)
    keys = jax.random.split(KEY, number)
    models = [Model((Encoder.init(key, "offset10-model", NEURONS, 32, 3),)) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def losses(one: Model) -> jax.Array:
        options = {"batch_size": 512, "num_batches": num_batches}
        return estimate_infonce(KEY, one, X, sampler, **options).loss

    return [
        compare(
            f"{number} stacked models in one call of vmap",
            f"{number} calls",
            lambda: jax.block_until_ready(jax.vmap(losses)(stacked)),
            lambda: jax.block_until_ready([losses(one) for one in models]),
            3,
        )
    ]


def _shifts(number: int, num_batches: int) -> Comparison:
    demo = load_demo()
    sampler = samplers.TimeDelta(demo.position, 10)
    options = {"batch_size": 512, "num_batches": num_batches}

    def test() -> object:
        return goodness_of_fit_test(
            KEY,
            demo.checkpoint,
            demo.spikes,
            sampler,
            held_out=slice(None),
            num_samples=number,
            **options,
        )

    def score() -> float:
        return goodness_of_fit_score(
            demo.checkpoint, demo.spikes, demo.position, num_batches=num_batches
        )

    whole = compare("", "", test, score, 3)
    return Comparison(
        f"a shift of the demo's labels, of {number} in one call of goodness_of_fit_test",
        "a call of goodness_of_fit_score",
        [taken / number for taken in whole.ours],
        whole.theirs,
    )
