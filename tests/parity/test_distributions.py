"""Whole distributions of drawn indices, CEBRA's and ours, compared with chi-square tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cebra
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cebra.distributions import index as their_index
from cebra.integrations.sklearn.dataset import SklearnDataset
from scipy.stats import chi2_contingency

import cebra_jax_metrics as cjm
from cebra_jax_metrics import samplers
from cebra_jax_metrics.neighbors import nearest

from . import peer

pytestmark = [
    pytest.mark.usefixtures("exact_index"),
    pytest.mark.filterwarnings('ignore:"delta" distribution:DeprecationWarning:cebra'),
]

NUM_BATCHES, BATCH_SIZE = 40, 5000
SHORT, LONG = 12, 60


@dataclass
class Labels:
    """Of a short or a long recording, with repeated values in all of them."""

    line: np.ndarray  # (time,): on a grid, so that draws also fall half-way between two labels
    plane: np.ndarray  # (time, 2)
    space: np.ndarray  # (time, 3)
    discrete: np.ndarray  # values 0, 1, 2, of different frequencies


def make_labels(num_steps):
    rng = np.random.default_rng(num_steps)
    places = rng.normal(size=(num_steps * 2 // 3, 3)).astype(np.float32)
    space = places[rng.integers(len(places), size=num_steps)]
    discrete = rng.choice(3, size=num_steps, p=[0.5, 0.3, 0.2])
    discrete[:3] = 0, 1, 2
    return Labels(
        line=(rng.integers(8, size=num_steps) / 4).astype(np.float32),
        plane=space[:, :2],
        space=space,
        discrete=discrete,
    )


@dataclass
class Case:
    """The names of the labels, CEBRA's loader, and our sampler of these labels."""

    labels: tuple[str, ...]
    loader: Callable
    sampler: Callable


def continuous(conditional, time_offset=1, **settings):
    return partial(
        cebra.data.ContinuousDataLoader,
        conditional=conditional,
        time_offset=time_offset,
        **settings,
    )


discrete, mixed = cebra.data.DiscreteDataLoader, cebra.data.MixedDataLoader
CASES = {
    "time": Case(("line",), continuous("time"), lambda y: samplers.Time(len(y))),
    "time, 4 steps": Case(("line",), continuous("time", 4), lambda y: samplers.Time(len(y), 4)),
    "time_delta": Case(("line",), continuous("time_delta"), samplers.TimeDelta),
    "time_delta, 3 steps": Case(
        ("line",), continuous("time_delta", 3), lambda y: samplers.TimeDelta(y, time_offset=3)
    ),
    "time_delta, 2-D": Case(("plane",), continuous("time_delta"), samplers.TimeDelta),
    "time_delta, 3-D": Case(
        ("space",), continuous("time_delta", 2), lambda y: samplers.TimeDelta(y, time_offset=2)
    ),
    "delta_normal": Case(
        ("line",),
        continuous("delta_normal", delta=0.2),
        lambda y: samplers.DeltaNormal(y, delta=0.2),
    ),
    "delta_normal, 2-D": Case(
        ("plane",), continuous("delta", delta=0.7), lambda y: samplers.DeltaNormal(y, delta=0.7)
    ),
    "discrete": Case(("discrete",), partial(discrete, prior="empirical"), samplers.Discrete),
    "discrete, uniform": Case(
        ("discrete",),
        partial(discrete, prior="uniform"),
        lambda y: samplers.Discrete(y, prior="uniform"),
    ),
    "mixed": Case(("discrete", "line"), partial(mixed, time_offset=1), samplers.Mixed),
    "mixed, 2-D": Case(
        ("discrete", "plane"),
        partial(mixed, time_offset=3),
        lambda d, y: samplers.Mixed(d, y, time_offset=3),
    ),
}


def draw_theirs(case, labels):
    peer.seed(0)
    X = np.zeros((len(labels[0]), 1), np.float32)
    dataset = SklearnDataset(X, tuple(labels))
    loader = case.loader(dataset=dataset, num_steps=NUM_BATCHES, batch_size=BATCH_SIZE)
    batches = [loader.get_indices(BATCH_SIZE) for _ in range(NUM_BATCHES)]
    return samplers.Batch(
        *(
            torch.stack([getattr(batch, kind) for batch in batches]).numpy()
            for kind in samplers.Batch._fields
        )
    )


def draw_ours(case, labels, jit):
    num_batches = NUM_BATCHES // 4 if jit else NUM_BATCHES  # the search under jit is slower
    draw = partial(cjm.draw, batch_size=BATCH_SIZE, num_batches=num_batches)
    draw = jax.jit(draw) if jit else draw
    return samplers.Batch(*map(np.asarray, draw(jax.random.key(0), case.sampler(*labels))))


def tables(batch, num_steps, joint):
    """Counts of each index, and of pairs of them where the recording is short."""
    reference, positive, negative = (steps.astype(np.int64) for steps in batch)
    if not joint:
        named = {"reference": reference, "positive": positive, "negative": negative}
        size = num_steps
    else:
        named = {
            "reference and positive": reference * num_steps + positive,
            "reference and negative": reference * num_steps + negative,
            "positive and negative": positive * num_steps + negative,
            "successive references": reference[:, 1:] * num_steps + reference[:, :-1],
            "successive positives": positive[:, 1:] * num_steps + positive[:, :-1],
        }
        size = num_steps**2
    return {name: np.bincount(steps.ravel(), minlength=size) for name, steps in named.items()}


def pvalue(ours, theirs):
    """That both counts come from one distribution; rare outcomes are counted together."""
    table = np.stack([ours, theirs])
    rare = table.sum(axis=0) < 20
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    return chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


@pytest.mark.parametrize("num_steps", [SHORT, LONG])
@pytest.mark.parametrize("name", CASES)
def test_distribution(name, num_steps):
    case, source = CASES[name], make_labels(num_steps)
    labels = [getattr(source, label) for label in case.labels]
    theirs = tables(draw_theirs(case, labels), num_steps, joint=num_steps == SHORT)
    for jit in (False, True):
        ours = tables(draw_ours(case, labels, jit), num_steps, joint=num_steps == SHORT)
        pvalues = {name: pvalue(ours[name], theirs[name]) for name in ours}
        assert min(pvalues.values()) > 1e-4, pvalues


def nearest_labels(labels, query, grouped):
    """Steps of the nearest labels as CEBRA and as we find them."""
    if not grouped:
        expected = their_index.ContinuousIndex(torch.from_numpy(labels)).search(
            torch.from_numpy(query)
        )
        return expected.numpy(), nearest(jnp.asarray(labels), jnp.asarray(query))
    groups, asking = np.arange(len(labels)) % 3, np.arange(len(query)) % 3
    index = their_index.ConditionalIndex(torch.from_numpy(groups), torch.from_numpy(labels))
    expected = index.search(torch.from_numpy(query), torch.from_numpy(asking))
    ours = nearest(jnp.asarray(labels), jnp.asarray(query), len(labels), groups, asking)
    return expected.numpy(), ours


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_nearest_label_is_the_one_cebra_finds(features, grouped):
    rng = np.random.default_rng(features)
    places = rng.normal(size=(150, features)).astype(np.float32)
    labels = places[rng.integers(len(places), size=400)]  # with many repeated labels
    query = np.concatenate([labels, 2 * rng.normal(size=(3000, features)).astype(np.float32)])
    expected, ours = nearest_labels(labels, query, grouped)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_of_equally_near_labels_the_earliest_is_found(features, grouped):
    """As with positions in a camera's pixels: different labels are equally near."""
    rng = np.random.default_rng(features)
    labels, query = (
        np.round(2 * rng.normal(size=(n, features))).astype(np.float32) for n in (400, 3000)
    )
    expected, ours = nearest_labels(labels, query, grouped)
    np.testing.assert_array_equal(ours, expected)
