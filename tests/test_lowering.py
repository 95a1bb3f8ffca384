"""Every jitted function lowers for accelerators that are not there; what its text must show."""

import importlib
import inspect
import pkgutil
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cebra_jax_metrics
from cebra_jax_metrics import (
    Encoder,
    Model,
    alignment,
    consistency,
    control_variates,
    draw,
    estimate_infonce,
    estimation,
    evaluate,
    evaluation,
    gradient_steps,
    infonce,
    model,
    neighbors,
    nulls,
    samplers,
    spread,
)
from cebra_jax_metrics.demo import load_demo
from cebra_jax_metrics.encoders import layers
from cebra_jax_metrics.infonce import InfoNCE
from cebra_jax_metrics.model import encode_recording
from cebra_jax_metrics.samplers import drawing

from .test_estimation import KEY, LABELS, MODEL, SAMPLER, SIZES, X
from .test_samplers import SAMPLERS

PLATFORMS = ("cpu", "cuda", "tpu")
JITTED = type(jax.jit(lambda: 0))

KEY_DATA = jax.random.key_data(KEY)  # typed keys cannot cross an export
ENCODER, CRITERION = MODEL.encoders[0], MODEL.criterion
BATCH = draw(KEY, SAMPLER, 16, 4)
WINDOWS = encode_recording(ENCODER, X)
GROUPS = jnp.zeros(120, jnp.int32)
PAIR = (X, X[:, :3])
STEPS = (jnp.arange(120, dtype=jnp.int32)[None], jnp.zeros((1, 120), jnp.int32))
SHIFTED = (CRITERION, ENCODER, WINDOWS, STEPS[0][0], BATCH, jnp.arange(3, dtype=jnp.int32))
BY_POSITION = samplers.TimeDelta(LABELS, 3)
MULTISESSION = samplers.Multisession([LABELS, LABELS[:80]])
JOINT = Model((ENCODER, ENCODER))
FULL = samplers.FullBatch(samplers.Time(120), 120, ENCODER.offset)
SOFT = samplers.Soft(samplers.DeltaNormal(LABELS, 0.3), 0.1)
SOFT_BATCH = samplers.SoftBatch(BATCH.reference, LABELS[BATCH.positive], BATCH.negative)
BATCHES = (
    (CRITERION, (ENCODER,), (WINDOWS,), None, BATCH),
    (CRITERION, (ENCODER,), (WINDOWS,), SOFT, SOFT_BATCH),
    (CRITERION, JOINT.encoders, (WINDOWS, WINDOWS), None, draw(KEY, MULTISESSION, 16, 2)),
)
WEIGHTS = SAMPLER.probabilities(1024)
MARKS = control_variates.Marks.of(*WEIGHTS, *WEIGHTS, 10**7)
KNOWN = evaluation._known(
    CRITERION, (ENCODER,), (WINDOWS,), WEIGHTS, (MARKS,), SAMPLER, mesh=None, axis_name=None
)
ALL_SAMPLERS = {
    **SAMPLERS,
    "hybrid": samplers.Hybrid(BY_POSITION),
    "full": FULL,
    "multisession": MULTISESSION,
    "discrete_multisession": samplers.DiscreteMultisession([GROUPS, GROUPS[:80]]),
}


def with_key(function):
    return lambda key, *arguments: function(jax.random.wrap_key_data(key), *arguments)


def numbered(function, **options):
    return partial(function, **options, axis_name=None)


def batch_size(sampler):
    return sampler.batch_size if isinstance(sampler, samplers.FullBatch) else 16


def propose(sampler):
    """The jitted method of a sampler."""
    return with_key(lambda key: sampler.propose(key, batch_size(sampler))), (KEY_DATA,)


def relabelled(key, x, y, places, permute):
    keys, sizes = jax.random.split(key, 4), {"num_bins": 5, "margin": 1, "reach": 2}
    options = {**sizes, "permute": permute, "min_shift": 1}
    return consistency._relabelled((x, y), (places, places), keys, **options)


def trained(key, one, x, whole, in_turn):
    descent = optax.sgd(0.1)
    run = one, descent.init(None), key, None, BATCH
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf]), run)
    options = {"optimizer": descent, "whole": whole, "in_turn": in_turn}
    return gradient_steps._train((x,), np.int32(0), np.int32(2), stack, **options)


# Of every jitted function, calls that lower it: a function without static arguments, its arguments.
CALLS = {
    "alignment.bin_means": [
        (partial(alignment.bin_means, num_bins=4), (X, GROUPS, GROUPS == 0)),
    ],
    "consistency._matrix": [
        (numbered(consistency._matrix, folds=None, block_size=50, number=120), (PAIR,)),
        (
            numbered(consistency._matrix, folds=((0, 60), (60, 120)), block_size=50, number=120),
            (PAIR,),
        ),
    ],
    "consistency._shift_pairs": [
        (
            numbered(consistency._shift_pairs, min_shift=1, number=2),
            (PAIR, jnp.asarray([0.5]), np.array([[0, 1], [1, 0]])),
        ),
    ],
    "consistency._relabelled": [
        (with_key(partial(relabelled, permute=permute)), (KEY_DATA, *PAIR, GROUPS))
        for permute in (False, True)
    ],
    "consistency._resampled": [
        (partial(consistency._resampled, num_bins=0, margin=0, reach=0), (PAIR, None, STEPS)),
        (
            partial(consistency._resampled, num_bins=5, margin=1, reach=2),
            (PAIR, (GROUPS, GROUPS), STEPS),
        ),
    ],
    "consistency.shifted_consistency": [(consistency.shifted_consistency, PAIR)],
    "encoders.layers.initialise": [
        (
            with_key(partial(layers.initialise, shapes=(("net.0.weight", (3, 4)),))),
            (KEY_DATA,),
        ),
    ],
    "samplers.drawing._propose": [
        (
            with_key(partial(drawing._propose, batch_size=16)),
            (KEY_DATA, SAMPLER, np.arange(4, dtype=np.uint32)),
        ),
    ],
    "evaluation.plain_losses": [(evaluation.plain_losses, batches) for batches in BATCHES],
    "evaluation.controlled_losses": [
        (
            partial(evaluation.controlled_losses, batch_size=8),
            (*shared, KNOWN * len(shared[1]), batch),
        )
        for *shared, batch in BATCHES
    ],
    "evaluation._probabilities": [
        (partial(evaluation._probabilities, sizes=(1024,) * sessions), (sampler,))
        for sampler, sessions in ((SAMPLER, 1), (ALL_SAMPLERS["discrete"], 1), (MULTISESSION, 2))
    ],
    "evaluation._known": [
        (
            partial(evaluation._known, mesh=None, axis_name=None),
            (CRITERION, (ENCODER,), (WINDOWS,), WEIGHTS, (marks,), SAMPLER),
        )
        for marks in (MARKS, MARKS._replace(some=(STEPS[0][0], STEPS[0][0])))
    ],
    "control_variates._log_sums": [
        (control_variates._log_sums, (WINDOWS.rows, jnp.zeros(len(WINDOWS.rows)), WINDOWS.rows)),
    ],
    "control_variates.reduced": [
        (
            lambda plain, drawn, controls: control_variates.reduced(
                plain, control_variates.Compared(*drawn, controls)
            ),
            (
                InfoNCE(*jnp.ones((3, 40))),
                tuple(jnp.ones((5, 40))),
                jnp.ones((40, 2)),
            ),
        ),
    ],
    "evaluation.uniform_terms": [
        (evaluation.uniform_terms, (CRITERION, WINDOWS.rows, WINDOWS.rows)),
    ],
    "evaluation.full_losses": [
        (
            evaluation.full_losses,
            (CRITERION, ENCODER, WINDOWS, jnp.float32(0), draw(KEY, FULL, None, 2)),
        ),
    ],
    "estimation._summarise": [
        (partial(estimation._summarise, num_batches=3), ((evaluate(MODEL, X, BATCH),),)),
    ],
    "estimation._combined": [
        (
            partial(estimation._combined, plain=None, num_negatives=16, is_joint=is_joint),
            ({"0": evaluate(MODEL, X, BATCH), "1": evaluate(MODEL, X, BATCH)},),
        )
        for is_joint in (False, True)
    ],
    "model._encode_chunk": [(model._encode_chunk, (WINDOWS.rows, ENCODER, X, np.int32(0)))],
    "model._encode": [(partial(model._encode, pad=True), (ENCODER, X))],
    "neighbors.nearest_under_jit": [
        (neighbors.nearest_under_jit, (LABELS, LABELS, 120)),
        (neighbors.nearest_under_jit, (LABELS[:, :1], LABELS[:, :1], 120)),
        (neighbors.nearest_under_jit, (LABELS, LABELS, 120, GROUPS, GROUPS)),
    ],
    "sharding._spread": [
        (
            lambda encoder, x: spread(
                Encoder.encode_windows,
                (encoder,),
                x,
                mesh=jax.make_mesh((1,), ("devices",)),
                reduces=False,
            ),
            (Encoder.init(KEY, "offset1-model", 6), X),
        ),
    ],
    "samplers.time.Time.propose": [propose(samplers.Time(120))],
    "samplers.delta.TimeDelta.propose": [propose(BY_POSITION)],
    "samplers.delta.DeltaNormal.propose": [propose(samplers.DeltaNormal(LABELS, 0.3))],
    "samplers.discrete.Discrete.propose": [propose(samplers.Discrete(GROUPS))],
    "samplers.mixed.Mixed.propose": [propose(samplers.Mixed(GROUPS, LABELS))],
    "samplers.hybrid.Hybrid.propose": [propose(samplers.Hybrid(BY_POSITION))],
    "samplers.full.FullBatch.propose": [propose(FULL)],
    "samplers.soft.Soft.propose": [propose(SOFT)],
    "samplers.multisession.Multisession.propose": [propose(MULTISESSION)],
    "samplers.multisession.DiscreteMultisession.propose": [
        propose(ALL_SAMPLERS["discrete_multisession"])
    ],
    "nulls._shifted_aligns": [(nulls._shifted_aligns, SHIFTED)],
    "nulls._shifted_losses": [(nulls._shifted_losses, SHIFTED)],
    "nulls._held_out_losses": [
        (nulls._held_out_losses, (X, jax.tree.map(lambda x: jnp.stack([x]), (MODEL, BATCH)))),
    ],
    # public functions that are not jitted themselves, as one function of JAX's
    "infonce": [
        (partial(infonce, similarity=similarity, block_size=block_size), (X, X, X))
        for similarity in ("cosine", "euclidean")
        for block_size in (32, 1024)
    ],
    "gradient": [
        (jax.grad(lambda one, x: evaluate(one, x, BATCH).loss.sum(), argnums=(0, 1)), (MODEL, X)),
    ],
    "estimate_infonce": [
        (
            with_key(lambda key, one, x: estimate_infonce(key, one, x, SAMPLER, **SIZES)),
            (KEY_DATA, MODEL, X),
        ),
    ],
    "gradient_steps._train": [
        (with_key(partial(trained, whole=whole, in_turn=in_turn)), (KEY_DATA, MODEL, X))
        for whole, in_turn in ((True, True), (False, False))
    ],
    "draw": [
        (
            with_key(partial(draw, batch_size=batch_size(sampler), num_batches=4)),
            (KEY_DATA, sampler),
        )
        for sampler in ALL_SAMPLERS.values()
    ],
}


def jitted_functions():
    """The names of all jitted functions and methods of the package."""
    prefix = cebra_jax_metrics.__name__ + "."
    for info in pkgutil.walk_packages(cebra_jax_metrics.__path__, prefix):
        if info.name.endswith(("__main__", "make_demo")):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != info.name:
                continue
            place = f"{info.name.removeprefix(prefix)}.{name}"
            if isinstance(value, JITTED):
                yield place
            elif inspect.isclass(value):
                members = vars(value).items()
                yield from (f"{place}.{n}" for n, member in members if isinstance(member, JITTED))


def test_none_is_left_out():
    found = set(jitted_functions()) | {"model._encode"}  # which carries its method's module
    public = {name for name in CALLS if "." in name}
    assert found == public


@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_every_platform(name):
    for function, arguments in CALLS[name]:
        text = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments).mlir_module()
        assert "f64" not in text
        assert "callback" not in text
        products = re.findall(r"stablehlo\.dot_general.*", text)
        assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)
        assert "stablehlo.convolution" not in text
        if name in ("infonce", "consistency._matrix", "evaluation.plain_losses", "model._encode"):
            assert products


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_indices_are_of_32_bits(name):
    sampler = ALL_SAMPLERS[name]
    assert all(x.dtype == jnp.int32 for x in draw(KEY, sampler, batch_size(sampler), 2))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_embeddings_stored_in_bfloat16(temperature, seed):
    """Within README's bound: two similarities, each off by at most 2u + u² over τ."""
    rows = jax.random.normal(jax.random.key(seed), (3, 200, 8))
    rows = rows / jnp.linalg.norm(rows, axis=2, keepdims=True)
    exact = infonce(*rows, temperature=temperature).loss
    stored = infonce(*rows.astype(jnp.bfloat16), temperature=temperature).loss
    assert stored.dtype == jnp.float32
    roundoff = 2.0**-9
    assert 0 < abs(float(stored - exact)) <= 2 * (2 * roundoff + roundoff**2) / temperature


def test_models_stored_in_bfloat16():
    """README says that it costs the demo's score less than 0.002 bits."""
    demo = load_demo()
    stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), demo.checkpoint.model)
    sampler = samplers.TimeDelta(demo.position, demo.checkpoint.settings["time_offsets"])
    options = dict(batch_size=512, num_batches=100)
    exact, found = (
        estimate_infonce(KEY, one, demo.spikes, sampler, **options)
        for one in (demo.checkpoint.model, stored)
    )
    assert found.loss.dtype == jnp.float32
    assert 0 < abs(float(exact.bits - found.bits)) < 0.002
