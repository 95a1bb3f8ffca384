"""A property of every public function: shapes, dtypes, and what input it refuses.

Numbers are small integers, which all dtypes hold exactly: whatever the dtype they come in, the
answer is that to float32.
"""

import builtins
import inspect
import warnings
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cebra_jax_metrics as cjm
from cebra_jax_metrics import samplers

TIME, NEURONS, FEATURES = 24, 3, 2
KEY = jax.random.key(0)
FLOATS = ("float16", "float32", "float64", "jax float32", "jax bfloat16", "list of floats")
INTEGERS = ("int8", "uint8", "int64", "jax int32", "list of integers")
SIZES = {"batch_size": 4, "num_batches": 3}

ENCODER = cjm.Encoder.init(KEY, "offset1-model", NEURONS, 4, 3)
MODEL = cjm.Model((ENCODER,))
SESSIONS = cjm.Model((ENCODER, ENCODER))
CHECKPOINT = cjm.Checkpoint(
    MODEL, {"batch_size": 4}, {"total": np.linspace(2, 1, 5)}, {"written_by": "a test"}
)
JOINT = cjm.Checkpoint(SESSIONS, {"batch_size": 4, "num_sessions": 2})
X = np.random.default_rng(0).normal(size=(TIME, NEURONS)).astype(np.float32)
LABELS = np.random.default_rng(1).normal(size=(TIME, FEATURES)).astype(np.float32)
DISCRETE = np.arange(TIME) % 3


def as_kind(values, kind):
    """Small integers as an array of a dtype, NumPy's or JAX's, or as lists."""
    if kind.startswith("list"):
        return np.asarray(values, int if kind.endswith("integers") else float).tolist()
    is_jax, dtype = kind.startswith("jax "), kind.removeprefix("jax ")
    return jnp.asarray(values, dtype) if is_jax else np.asarray(values, dtype)


class Draw:
    """Draws sizes, dtypes and small integers."""

    def __init__(self, data):
        self.data = data

    def one_of(self, *options):
        return self.data.draw(st.sampled_from(options))

    def integers(self, *shape, below=9):
        seed = self.data.draw(st.integers(0, 2**16))
        return np.random.default_rng(seed).integers(0, below, shape)

    def columns(self, time, features):
        """Integers ``(time, features)``; no column is constant, no row 0."""
        values = 1 + self.integers(time, features)
        values[:2] = [[1], [2]]
        return values


def same(ours, expected, dtype):
    """Arrays of one dtype and of equal values."""
    assert ours.dtype == dtype, (ours.dtype, dtype)
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(ours, float), np.asarray(expected, float))


PROPERTIES = {}


def holds(*names):
    """Register a property ``(draw, kind)`` of public functions, of which kind is a dtype."""

    def register(check):
        PROPERTIES.update({name: partial(check, name) for name in names})
        return check

    return register


@holds("infonce", "dot_similarity", "euclidean_similarity")
def _(name, draw, kind):
    batch, negatives = draw.one_of((4, 6), (1, 1), (3, 1))
    features = draw.one_of(1, 3)
    values = [draw.integers(rows, features) for rows in (batch, batch, negatives)]
    function = getattr(cjm, name)
    found = function(*(as_kind(x, kind) for x in values))
    expected = function(*(as_kind(x, "jax float32") for x in values))
    shapes = [()] * 3 if name == "infonce" else [(batch,), (batch, negatives)]
    assert [x.shape for x in found] == shapes
    for x, y in zip(found, expected, strict=True):
        same(x, y, np.float32)


@holds("chance_level", "goodness_of_fit")
def _(name, draw, kind):
    loss = 1 + draw.integers(*draw.one_of((), (4,), (2, 3)))
    function = cjm.chance_level if name == "chance_level" else partial(cjm.goodness_of_fit, 8)
    same(function(as_kind(loss, kind)), function(as_kind(loss, "jax float32")), np.float32)
    found = cjm.goodness_of_fit(as_kind(loss, kind), num_negatives=8)
    np.testing.assert_allclose(found, 3 - loss / np.log(2), rtol=4 * np.finfo(np.float32).eps)


@holds("infonce_to_goodness_of_fit")
def _(name, draw, kind):
    loss = draw.integers(*draw.one_of((), (4,), (2, 3)))
    found = cjm.infonce_to_goodness_of_fit(as_kind(loss, kind), batch_size=8, num_sessions=1)
    assert isinstance(found, float) if loss.ndim == 0 else found.dtype == np.float64
    np.testing.assert_array_equal(found, (np.log(8) - loss) / np.log(2))


@holds("goodness_of_fit_history")
def _(name, draw, kind):
    total = draw.integers(draw.one_of(1, 5))
    checkpoint = cjm.Checkpoint(MODEL, {"batch_size": 8}, {"total": as_kind(total, kind)})
    same(cjm.goodness_of_fit_history(checkpoint), (np.log(8) - total) / np.log(2), np.float64)


@holds("embed")
def _(name, draw, kind):
    values = draw.integers(draw.one_of(1, TIME), NEURONS)
    found = cjm.embed(MODEL, as_kind(values, kind))
    assert found.shape == (len(values), 3)
    same(found, cjm.embed(MODEL, values.astype(np.float32)), np.float32)


@holds("draw", "evaluate", "estimate_infonce")
def _(name, draw, kind):
    sizes = {"batch_size": 4, "num_batches": draw.one_of(1, 3)}
    sampler = samplers.TimeDelta(LABELS)
    batch = cjm.draw(KEY, sampler, **sizes)
    for steps in batch:
        assert steps.dtype == np.int32
        assert steps.shape == (sizes["num_batches"], sizes["batch_size"])
        assert 0 <= int(steps.min()) <= int(steps.max()) < TIME
    values = draw.integers(TIME, NEURONS)
    losses = cjm.evaluate(MODEL, as_kind(values, kind), batch)
    for x, y in zip(losses, cjm.evaluate(MODEL, values.astype(np.float32), batch), strict=True):
        assert x.shape == (sizes["num_batches"],)
        same(x, y, np.float32)
    method = draw.one_of("plain", "control_variates")
    estimate = cjm.estimate_infonce(
        KEY, MODEL, as_kind(values, kind), sampler, method=method, **sizes
    )
    assert isinstance(estimate, cjm.Estimate)
    assert estimate.per_batch.shape == (sizes["num_batches"],)
    assert estimate.num_negatives == sizes["batch_size"]
    for x in (estimate.loss, estimate.stderr, estimate.bits, estimate.chance):
        assert (x.shape, x.dtype) == ((), np.float32)
    assert np.isnan(estimate.stderr) == (sizes["num_batches"] == 1)


@holds("infonce_loss", "goodness_of_fit_score", "multisession_infonce_loss")
def _(name, draw, kind):
    values = draw.integers(TIME, NEURONS)
    labels = draw.columns(TIME, FEATURES)
    is_joint = name.startswith("multisession")
    function = partial(getattr(cjm, name), JOINT if is_joint else CHECKPOINT, num_batches=2)

    def score(kind):
        x, y = as_kind(values, kind), as_kind(labels, kind)
        return float(function([x, x], [y, y]) if is_joint else function(x, y))

    # Integers are discrete labels, which have one column.
    labels = labels[:, 0] if kind in INTEGERS else labels
    assert score(kind) == score("int64" if kind in INTEGERS else "float64")


def embeddings(draw, kind):
    values = [draw.columns(TIME, width) for width in (1, 3)]
    arrays = [as_kind(x, kind) for x in values]
    is_narrow = kind.startswith("jax") and kind not in INTEGERS
    return values, arrays, np.dtype(np.float32 if is_narrow else np.float64)


@holds("consistency_matrix", "shifted_consistency")
def _(name, draw, kind):
    values = [draw.columns(TIME, width) for width in (1, 3)]
    cv, is_matrix = draw.one_of(None, 3), name == "consistency_matrix"

    def score(kind):
        arrays = [as_kind(x, kind) for x in values]
        return cjm.consistency_matrix(arrays, cv=cv) if is_matrix else function(*arrays)

    function = cjm.shifted_consistency
    if not is_matrix and kind.startswith("list"):
        with pytest.raises(TypeError, match="Expected two arrays"):
            score(kind)
        return
    assert score(kind).shape == ((2, 2) if is_matrix else (TIME,))
    same(score(kind), score("float32"), np.float32)


@holds("consistency_score")
def _(name, draw, kind):
    values, arrays, dtype = embeddings(draw, kind)
    cv = draw.one_of(None, 3)
    found = cjm.consistency_score(arrays, "runs", cv=cv)
    assert isinstance(found, cjm.Consistency)
    assert (found.pairs.shape, found.ids.shape) == ((2, 2), (2,))
    expected = cjm.consistency_score([x.astype(float) for x in values], "runs", cv=cv)
    same(found.scores, expected.scores.astype(dtype), dtype)
    labels = [DISCRETE, DISCRETE[::-1]]
    between = cjm.consistency_score(arrays, "datasets", labels)
    assert (between.scores.shape, between.scores.dtype) == ((2,), dtype)


@holds("consistency_test", "bootstrap_consistency")
def _(name, draw, kind):
    _, arrays, dtype = embeddings(draw, kind)
    function = partial(getattr(cjm, name), KEY, between="runs")
    if name == "consistency_test":
        found = function(arrays)
        assert isinstance(found, cjm.ConsistencyTest)
        assert isinstance(found.pairwise, cjm.NullTest)
        assert {x.dtype for x in (*found.pairwise, *found.overall)} == {dtype}
        assert found.pairwise.p_value.shape == (2,)
        assert found.pairwise.null_quantiles.shape == (3, 2)
        assert ((found.pairwise.p_value > 0) & (found.pairwise.p_value <= 1)).all()
    else:
        found = function(arrays, num_resamples=3)
        assert isinstance(found, cjm.Bootstrap)
        assert (found.samples.shape, found.samples.dtype) == ((3, 2), dtype)
        assert found.stderr.shape == found.observed.shape == (2,)


@holds("align_embeddings")
def _(name, draw, kind):
    values = draw.columns(TIME, FEATURES)
    normalize = draw.one_of(True, False)
    labels = DISCRETE if draw.one_of(True, False) else np.linspace(0, 1, TIME)
    found, other = cjm.align_embeddings([as_kind(values, kind), values.astype(float)],
                                        [labels, labels], normalize, n_bins=4)  # fmt: skip
    dtype = {"float64": np.float64, "list of floats": np.float64, "float16": np.float16,
             "jax bfloat16": jnp.bfloat16}.get(kind, np.float32)  # fmt: skip
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == (other.shape, dtype)
    assert len(found) == 3
    tolerance = TIME * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(float), other, rtol=tolerance)


@holds("fit")
def _(name, draw, kind):
    steps, batch_size = draw.one_of(1, 3), 4
    values = draw.integers(TIME, NEURONS)
    options = {"architecture": "offset1-model", "num_hidden_units": 4, "output_dimension": 3}
    train = partial(cjm.fit, KEY, num_steps=steps, batch_size=batch_size, **options)
    found = train(as_kind(values, kind), samplers.TimeDelta(LABELS))
    assert isinstance(found, cjm.Checkpoint)
    assert isinstance(found.training, cjm.TrainingState)
    total = found.history["total"]
    assert (total.shape, total.dtype) == ((steps,), np.float32)
    expected = train(values.astype(np.float32), samplers.TimeDelta(LABELS)).history["total"]
    same(total, expected, np.float32)


@holds("goodness_of_fit_test", "bootstrap_goodness_of_fit", "compare_goodness_of_fit")
def _(name, draw, kind):
    x, sampler = as_kind(draw.columns(TIME, NEURONS), kind), samplers.TimeDelta(LABELS)
    sizes = {"batch_size": 4, "num_batches": 2}
    if name == "goodness_of_fit_test":
        found = cjm.goodness_of_fit_test(
            KEY, MODEL, x, sampler, num_samples=5, held_out=slice(None), **sizes
        )
        assert isinstance(found, cjm.GoodnessOfFitTest)
        assert found.null.shape == found.shifts.shape == (5,)
        assert 1 / 6 <= found.p_value <= 1
    elif name == "bootstrap_goodness_of_fit":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Resampled recordings differ no more")
            found = cjm.bootstrap_goodness_of_fit(KEY, MODEL, x, sampler, num_resamples=3, **sizes)
        assert isinstance(found, cjm.Bootstrap)
        assert found.samples.shape == (3,)
        assert found.stderr >= 0
    else:
        found = cjm.compare_goodness_of_fit(KEY, MODEL, MODEL, x, sampler, **sizes)
        assert isinstance(found, cjm.Comparison)
        assert (found.difference, found.stderr) == (0, 0)


@holds("optimal_block_length")
def _(name, draw, kind):
    values = draw.columns(draw.one_of(10, 40), draw.one_of(1, 2))
    length = cjm.optimal_block_length(as_kind(values, kind))
    assert isinstance(length, int)
    assert length == cjm.optimal_block_length(values.astype(float)) >= 1


@holds("time_split", "time_folds", "required_gap")
def _(name, draw, kind):
    number, gap = draw.one_of(20, 41), draw.one_of(0, 3)
    fitted, scored = cjm.time_split(number, gap=gap)
    assert fitted.stop + gap == scored.start < scored.stop == number
    folds = cjm.time_folds(number, 4, gap=gap)
    scored = np.concatenate([np.arange(number)[score] for _, score in folds])
    assert scored.tolist() == list(range(number))
    for steps, score in folds:
        assert np.min(np.abs(steps[:, None] - np.arange(number)[score])) == gap + 1
    found = cjm.required_gap(MODEL, samplers.TimeDelta(LABELS, gap + 1))
    assert (type(found), found) == (int, ENCODER.receptive_field + gap + 1)


@holds("spread")
def _(name, draw, kind):
    items = as_kind(draw.integers(draw.one_of(1, 5), 2), "jax float32")
    mesh = draw.one_of(None, jax.make_mesh((2,), ("devices",)))
    same(cjm.spread(jnp.square, (), items, mesh=mesh), items**2, np.float32)


@holds("save", "load", "to_state_dict", "from_state_dict", "from_cebra")
def _(name, draw, kind):
    """Of checkpoints there are tests of their own: here, that parameters keep dtype and shape."""
    state = cjm.to_state_dict(MODEL)
    for key, value in ENCODER.params.items():
        same(state[key], value, np.float32)
    for wrong in (1, None, np.zeros(3), "no such file", {}):
        with pytest.raises((ValueError, TypeError, OSError)):
            getattr(cjm, name)(*((wrong, "path") if name == "save" else (wrong,)))


@holds("architecture_names", "register_architecture")
def _(name, draw, kind):
    names = cjm.architecture_names()
    assert all(isinstance(each, str) for each in names)
    nothing = {"init": lambda *_: {}, "apply": lambda _, X: X}
    with pytest.raises(ValueError, match="exists already"):
        cjm.register_architecture(names[0], offset=(0, 1), **nothing)
    for offset in ((0, 0), (-1, 1), (1,), 3, ("a", "b")):
        with pytest.raises((ValueError, TypeError)):
            cjm.register_architecture("no architecture", offset=offset, **nothing)
    assert "no architecture" not in cjm.architecture_names()


MADE_OF_LABELS = {
    "TimeDelta": lambda y, _: samplers.TimeDelta(y),
    "DeltaNormal": lambda y, _: samplers.DeltaNormal(y, 0.5),
    "Soft": lambda y, _: samplers.Soft(samplers.TimeDelta(y), 0.5),
    "Hybrid": lambda y, _: samplers.Hybrid(samplers.TimeDelta(y)),
    "FullBatch": lambda y, _: samplers.FullBatch(samplers.TimeDelta(y), TIME, (0, 1)),
    "Multisession": lambda y, _: samplers.Multisession([y, y]),
    "Discrete": lambda _, y: samplers.Discrete(y),
    "DiscreteMultisession": lambda _, y: samplers.DiscreteMultisession([y, y]),
    "Mixed": lambda y, d: samplers.Mixed(d, y),
    "Time": lambda *_: samplers.Time(TIME),
}


@holds(*(f"samplers.{name}" for name in MADE_OF_LABELS))
def _(name, draw, kind):
    make = MADE_OF_LABELS[name.removeprefix("samplers.")]
    continuous = draw.integers(*draw.one_of((TIME,), (TIME, 2)))
    discrete = as_kind(draw.integers(TIME, below=2), draw.one_of(*INTEGERS))
    size = draw.one_of(1, 4)
    found = make(as_kind(continuous, kind), discrete).sample(KEY, size)
    expected = make(as_kind(continuous, "float64"), discrete).sample(KEY, size)
    size = TIME - 2 if name.endswith("FullBatch") else size
    sessions = (2,) if "Multisession" in name else ()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        same(x, y, y.dtype)
    for steps in (found.reference, found.negative):
        assert (steps.shape, steps.dtype) == ((*sessions, size), np.int32)
        assert 0 <= int(steps.min()) <= int(steps.max()) < TIME


@holds(*(name for name in cjm.__all__ if name.startswith(("plot_", "compare_models"))))
def _(name, draw, kind):
    """Of pictures there are tests of their own."""
    with pytest.raises((ValueError, TypeError)):
        getattr(cjm, name)(object())


def public_functions():
    functions = {
        name
        for name in cjm.__all__
        if callable(getattr(cjm, name)) and not inspect.isclass(getattr(cjm, name))
    }
    made = (getattr(samplers, name) for name in samplers.__all__)
    kinds = {f"samplers.{each.__name__}" for each in made if hasattr(each, "attached")}
    return functions | kinds


def test_every_public_function_has_a_property():
    assert public_functions() == PROPERTIES.keys()


@pytest.mark.parametrize("name", sorted(PROPERTIES))
@hypothesis.settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=st.data())
def test_shapes_and_dtypes(name, data):
    draw = Draw(data)
    PROPERTIES[name](draw, draw.one_of(*FLOATS, *INTEGERS))


BAD_ARRAYS = {
    "nothing": None,
    "object": object(),
    "scalar": np.float32(1),
    "empty": np.zeros((0, NEURONS), np.float32),
    "no features": np.zeros((TIME, 0), np.float32),
    "no axis of features": np.ones(TIME, np.float32),
    "too many axes": np.ones((2, TIME, NEURONS), np.float32),
    "text": np.full((TIME, NEURONS), "a"),
    "complex": np.ones((TIME, NEURONS), np.complex64),
    "ragged": [[1.0], [1.0, 2.0]],
}
NEVER = (None, object(), "3", 1.5, 0, -1)
ones = np.ones((TIME, NEURONS), np.float32)
some = samplers.TimeDelta(LABELS)
batch = cjm.draw(KEY, some, **SIZES)
score = partial(cjm.goodness_of_fit_score, CHECKPOINT)
estimate = partial(cjm.estimate_infonce, KEY, MODEL)
fit = partial(cjm.fit, KEY, num_steps=1, architecture="offset1-model")
shifted = partial(
    cjm.goodness_of_fit_test, KEY, MODEL, batch_size=4, num_batches=2, held_out=slice(None)
)
resampled = partial(
    cjm.bootstrap_goodness_of_fit, KEY, MODEL, batch_size=4, num_batches=2, num_resamples=2
)

# What takes arrays, by the argument that is bad.
TAKE_ARRAYS = {
    "infonce reference": lambda bad: cjm.infonce(bad, ones, ones),
    "infonce all": lambda bad: cjm.infonce(bad, bad, bad),
    "infonce negative": lambda bad: cjm.infonce(ones, ones, bad),
    "dot_similarity": lambda bad: cjm.dot_similarity(bad, bad, bad),
    "euclidean_similarity": lambda bad: cjm.euclidean_similarity(bad, bad, bad),
    "embed": lambda bad: cjm.embed(MODEL, bad),
    "evaluate": lambda bad: cjm.evaluate(MODEL, bad, batch),
    "estimate_infonce": lambda bad: estimate(bad, some, **SIZES),
    "infonce_loss X": lambda bad: cjm.infonce_loss(CHECKPOINT, bad, num_batches=2),
    "goodness_of_fit_score X": lambda bad: score(bad, num_batches=2),
    "goodness_of_fit_score y": lambda bad: score(X, bad, num_batches=2),
    "multisession_infonce_loss X": lambda bad: cjm.multisession_infonce_loss(
        JOINT, [X, bad], [LABELS, LABELS], num_batches=2
    ),
    "multisession_infonce_loss y": lambda bad: cjm.multisession_infonce_loss(
        JOINT, [X, X], [LABELS, bad], num_batches=2
    ),
    "multisession_infonce_loss sessions": lambda bad: cjm.multisession_infonce_loss(
        JOINT, bad, bad, num_batches=2
    ),
    "consistency_matrix": lambda bad: cjm.consistency_matrix([ones, bad]),
    "consistency_matrix all": lambda bad: cjm.consistency_matrix([bad, bad]),
    "shifted_consistency": lambda bad: cjm.shifted_consistency(bad, bad),
    "consistency_score": lambda bad: cjm.consistency_score([ones, bad], "runs"),
    "consistency_score all": lambda bad: cjm.consistency_score([bad, bad], "runs"),
    "consistency_score none": lambda bad: cjm.consistency_score(bad, "runs"),
    "consistency_score datasets": lambda bad: cjm.consistency_score(
        [bad, bad], "datasets", [DISCRETE, DISCRETE]
    ),
    "consistency_score labels": lambda bad: cjm.consistency_score(
        [ones, ones], "datasets", [bad, bad]
    ),
    "consistency_test": lambda bad: cjm.consistency_test(KEY, [bad, bad], "runs"),
    "consistency_test datasets": lambda bad: cjm.consistency_test(
        KEY, [bad, bad], "datasets", [DISCRETE, DISCRETE], num_samples=2
    ),
    "bootstrap_consistency": lambda bad: cjm.bootstrap_consistency(KEY, [bad, bad], "runs"),
    "align_embeddings": lambda bad: cjm.align_embeddings([bad, bad], [DISCRETE, DISCRETE]),
    "align_embeddings labels": lambda bad: cjm.align_embeddings([ones, ones], [bad, bad]),
    "fit": lambda bad: fit(bad, some, batch_size=4),
    "goodness_of_fit_test": lambda bad: shifted(bad, some),
    "bootstrap_goodness_of_fit": lambda bad: resampled(bad, some),
    "compare_goodness_of_fit": lambda bad: cjm.compare_goodness_of_fit(
        KEY, MODEL, MODEL, bad, some, **SIZES
    ),
    "optimal_block_length": cjm.optimal_block_length,
    "goodness_of_fit": lambda bad: cjm.goodness_of_fit(bad, bad),
    "infonce_to_goodness_of_fit": lambda bad: cjm.infonce_to_goodness_of_fit(bad, CHECKPOINT),
    "goodness_of_fit_history": lambda bad: cjm.goodness_of_fit_history(
        cjm.Checkpoint(MODEL, {"batch_size": 4}, {"total": bad})
    ),
    "spread": lambda bad: cjm.spread(jnp.square, (), bad),
    "Time steps": lambda bad: samplers.Time(TIME, steps=bad if bad is not None else []),
    **{
        f"{name} labels": lambda bad, make=make: make(bad, bad)
        for name, make in MADE_OF_LABELS.items()
        if name != "Time"
    },
}
# What they take all the same.
COLUMN = {"no axis of features"}
SHAPES = COLUMN | {"scalar", "empty", "no features", "too many axes"}
FINE = {
    "goodness_of_fit": SHAPES,
    "infonce_to_goodness_of_fit": SHAPES,
    "goodness_of_fit_score y": COLUMN,
    "spread": COLUMN | {"no features", "too many axes", "complex"},
    "goodness_of_fit_history": COLUMN | {"no features", "too many axes"},  # of stacks of models
    "multisession_infonce_loss sessions": {"too many axes"},
    "consistency_score none": {"too many axes"},
    "Multisession labels": COLUMN,
    **{
        f"{name} labels": COLUMN
        for name in ("TimeDelta", "DeltaNormal", "Soft", "Hybrid", "FullBatch")
    },
}


def assert_refused(call):
    """A builtin error of a wrong value or type, with a message, and none of JAX's own."""
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        call()
    assert type(caught.value).__module__ == builtins.__name__, repr(caught.value)
    assert len(str(caught.value)) > 20, repr(caught.value)


@pytest.mark.parametrize("what", TAKE_ARRAYS)
@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_bad_arrays_are_refused(what, bad):
    call = partial(TAKE_ARRAYS[what], BAD_ARRAYS[bad])
    if bad in FINE.get(what, ()):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(call())]
        assert all(np.isfinite(leaf).all() for leaf in leaves if leaf.dtype.kind in "fc")
    else:
        assert_refused(call)


TAKE_SIZES = {
    "draw batch_size": lambda bad: cjm.draw(KEY, some, bad, 3),
    "draw num_batches": lambda bad: cjm.draw(KEY, some, 4, bad),
    "estimate_infonce batch_size": lambda bad: estimate(X, some, batch_size=bad, num_batches=3),
    "estimate_infonce num_batches": lambda bad: estimate(X, some, batch_size=4, num_batches=bad),
    "goodness_of_fit_score num_batches": lambda bad: score(X, LABELS, num_batches=bad),
    "goodness_of_fit_score batch_size": lambda bad: score(
        X, LABELS, num_batches=2, batch_size=bad or 0
    ),
    "infonce block_size": lambda bad: cjm.infonce(ones, ones, ones, block_size=bad),
    "consistency_matrix block_size": lambda bad: cjm.consistency_matrix(
        [ones, ones], block_size=bad
    ),
    "consistency_score cv": lambda bad: cjm.consistency_score([ones, ones], "runs", cv=bad or 0),
    "fit num_steps": lambda bad: cjm.fit(KEY, X, some, num_steps=bad, batch_size=4),
    "fit batch_size": lambda bad: fit(X, some, batch_size=bad),
    "sample": lambda bad: some.sample(KEY, bad),
    "Time length": samplers.Time,
    "TimeDelta time_offset": lambda bad: samplers.TimeDelta(LABELS, bad),
    "TimeDelta length": lambda bad: samplers.TimeDelta(LABELS, length=bad or 0),
    "Mixed time_offset": lambda bad: samplers.Mixed(DISCRETE, LABELS, bad),
    "Hybrid time_offset": lambda bad: samplers.Hybrid(some, bad),
    "Multisession time_offset": lambda bad: samplers.Multisession([LABELS], bad),
    "FullBatch num_steps": lambda bad: samplers.FullBatch(some, bad, (0, 1)),
    "bootstrap_goodness_of_fit num_resamples": lambda bad: cjm.bootstrap_goodness_of_fit(
        KEY, MODEL, X, some, batch_size=4, num_resamples=bad
    ),
    "bootstrap_consistency num_resamples": lambda bad: cjm.bootstrap_consistency(
        KEY, [ones, ones], "runs", num_resamples=bad
    ),
    "goodness_of_fit_test num_batches": lambda bad: cjm.goodness_of_fit_test(
        KEY, MODEL, X, some, batch_size=4, num_batches=bad, held_out=slice(None)
    ),
    "compare_goodness_of_fit num_batches": lambda bad: cjm.compare_goodness_of_fit(
        KEY, MODEL, MODEL, X, some, batch_size=4, num_batches=bad
    ),
    "consistency_test min_shift": lambda bad: cjm.consistency_test(
        KEY, [ones, ones], "runs", min_shift=bad
    ),
    "align_embeddings n_bins": lambda bad: cjm.align_embeddings([ones], [X[:, 0]], n_bins=bad),
    "time_split": lambda bad: cjm.time_split(bad, gap=1),
    "time_folds": lambda bad: cjm.time_folds(20, bad, gap=1),
    "infonce_to_goodness_of_fit": lambda bad: cjm.infonce_to_goodness_of_fit(
        1.0, batch_size=bad, num_sessions=1
    ),
}


@pytest.mark.parametrize("what", TAKE_SIZES)
@pytest.mark.parametrize("bad", NEVER)
def test_bad_sizes_are_refused(what, bad):
    assert_refused(partial(TAKE_SIZES[what], bad))


TAKE_TEMPERATURES = {
    "infonce": lambda bad: cjm.infonce(ones, ones, ones, temperature=bad),
    "evaluate": lambda bad: cjm.evaluate(at_temperature(bad), X, batch),
    "estimate_infonce": lambda bad: cjm.estimate_infonce(
        KEY, at_temperature(bad), X, some, **SIZES
    ),
    "goodness_of_fit_score": lambda bad: cjm.goodness_of_fit_score(
        cjm.Checkpoint(at_temperature(bad), {"batch_size": 4}), X, LABELS, num_batches=2
    ),
    "compare_goodness_of_fit": lambda bad: cjm.compare_goodness_of_fit(
        KEY, MODEL, at_temperature(bad), X, some, **SIZES
    ),
}


def at_temperature(temperature):
    return cjm.Model((ENCODER,), cjm.Criterion("cosine", temperature))


@pytest.mark.parametrize("what", TAKE_TEMPERATURES)
@pytest.mark.parametrize("bad", [0, -1.0, np.nan, np.inf, 1e-40, np.ones((1, 2), np.float32)])
def test_bad_temperatures_are_refused(what, bad):
    """Known ones, that is: a negative one would give a loss that looks like any other."""
    with pytest.raises(ValueError, match="temperature has to be"):
        TAKE_TEMPERATURES[what](bad)


@pytest.mark.parametrize("function", [cjm.chance_level, partial(cjm.goodness_of_fit, 1.0)])
@pytest.mark.parametrize("bad", [0, -1, np.nan, [4, 0], [np.nan, 4]])
def test_bad_numbers_of_negatives_are_refused(function, bad):
    with pytest.raises(ValueError, match="one negative at least"):
        function(np.asarray(bad))


TAKE_KEYS = {
    "draw": lambda bad: cjm.draw(bad, some, 4, 3),
    "estimate_infonce": lambda bad: cjm.estimate_infonce(bad, MODEL, X, some, **SIZES),
    "fit": lambda bad: cjm.fit(bad, X, some, num_steps=1, batch_size=4),
    "sample": lambda bad: some.sample(bad, 4),
    "consistency_test": lambda bad: cjm.consistency_test(bad, [ones, ones], "runs"),
    "bootstrap_consistency": lambda bad: cjm.bootstrap_consistency(bad, [ones, ones], "runs"),
    "goodness_of_fit_test": lambda bad: cjm.goodness_of_fit_test(
        bad, MODEL, X, some, batch_size=4, held_out=slice(None)
    ),
    "bootstrap_goodness_of_fit": lambda bad: cjm.bootstrap_goodness_of_fit(
        bad, MODEL, X, some, batch_size=4
    ),
    "compare_goodness_of_fit": lambda bad: cjm.compare_goodness_of_fit(
        bad, MODEL, MODEL, X, some, **SIZES
    ),
}
TAKE_MODELS = {
    "embed": lambda bad: cjm.embed(bad, X),
    "evaluate": lambda bad: cjm.evaluate(bad, X, batch),
    "estimate_infonce": lambda bad: cjm.estimate_infonce(KEY, bad, X, some, **SIZES),
    "to_state_dict": cjm.to_state_dict,
    "required_gap": lambda bad: cjm.required_gap(bad, some),
    "goodness_of_fit_test": lambda bad: cjm.goodness_of_fit_test(
        KEY, bad, X, some, batch_size=4, held_out=slice(None)
    ),
    "bootstrap_goodness_of_fit": lambda bad: cjm.bootstrap_goodness_of_fit(
        KEY, bad, X, some, batch_size=4
    ),
}
TAKE_SAMPLERS = {
    "draw": lambda bad: cjm.draw(KEY, bad, 4, 3),
    "estimate_infonce": lambda bad: estimate(X, bad, **SIZES),
    "fit": lambda bad: fit(X, bad, batch_size=4),
    "required_gap": lambda bad: cjm.required_gap(MODEL, bad),
    "goodness_of_fit_test": lambda bad: shifted(X, bad),
    "bootstrap_goodness_of_fit": lambda bad: resampled(X, bad),
    "Soft": lambda bad: samplers.Soft(bad, 0.5),
    "Hybrid": samplers.Hybrid,
    "FullBatch": lambda bad: samplers.FullBatch(bad, TIME, (0, 1)),
}
OTHERS = {
    **{f"key of {name}": call for name, call in TAKE_KEYS.items()},
    **{f"model of {name}": call for name, call in TAKE_MODELS.items()},
    **{f"sampler of {name}": call for name, call in TAKE_SAMPLERS.items()},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("bad", [None, 0, "text", object(), np.zeros(3)])
def test_other_bad_arguments_are_refused(what, bad):
    assert_refused(partial(OTHERS[what], bad))
