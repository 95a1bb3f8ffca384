"""The same mistakes with CEBRA and with us: the same kind of exception and the same first words.

Left out is what we support and CEBRA does not, and what CEBRA stumbles over by accident (1-D X in
a score gives an IndexError, a missing delta a TypeError about tensors).
"""

import functools
from types import SimpleNamespace

import cebra
import numpy as np
import pytest
from cebra.integrations.sklearn import metrics

import cebra_jax_metrics as cjm

from . import peer

FIRST = peer.simulate(3, num_steps=120, num_neurons=5)
SECOND = peer.simulate(4, num_steps=100, num_neurons=7)
X, P, H, D = FIRST
BOTH_X, BOTH_P = [FIRST.X, SECOND.X], [FIRST.position, SECOND.position]


def two_discrete():
    """CEBRA fits no such model: one that says it was fitted with two discrete labels."""
    estimator = peer.fit(X, H, H)
    estimator.label_types_ = [(D.dtype, D.shape)] * 2
    return estimator


def several_offsets():
    estimator = peer.fit(X)
    estimator.time_offsets = [1, 2]
    return estimator


def changed(*labels, **settings):
    """An estimator with settings that it was not fitted with."""
    estimator = peer.fit(X, *labels)
    return estimator.set_params(**settings)


def large_offset():
    estimator = peer.fit(X)
    estimator.time_offsets = 500
    return estimator


MODELS = {
    "unfitted": cebra.CEBRA,
    "time": lambda: peer.fit(X),
    "plane": lambda: peer.fit(X, P),
    "line": lambda: peer.fit(X, H),
    "plane and line": lambda: peer.fit(X, P, H),
    "discrete": lambda: peer.fit(X, D),
    "mixed": lambda: peer.fit(X, D, P),
    "two discrete": two_discrete,
    "several offsets": several_offsets,
    "large offset": large_offset,
    "offset of no integer": lambda: changed(time_offsets=[1.5]),
    "hybrid without labels": lambda: changed(hybrid=True),
    "hybrid of integers": lambda: changed(D, hybrid=True),
    "hybrid of both": lambda: changed(D, P, hybrid=True),
    "hybrid full batch": lambda: changed(P, hybrid=True, batch_size=None),
    "full batch of integers": lambda: changed(D, batch_size=None),
    "full batch of both": lambda: changed(D, P, batch_size=None),
    "sessions": lambda: peer.fit(BOTH_X, BOTH_P),
    "full batch": lambda: peer.fit(X, P, batch_size=None),
}


@functools.cache
def fitted(name):
    return MODELS[name]()


def spoiled(array, value):
    array = array.copy()
    array[7, 1] = value
    return array


# What goes wrong: the model, and the arguments of a score.
SCORES = {
    "unfitted": ("unfitted", (X, P), {}),
    "list of sessions": ("sessions", (BOTH_X, BOTH_P), {"session_id": 0}),
    "list of sessions for one": ("plane", ([X, X], P), {}),
    "list of labels": ("sessions", (X, BOTH_P), {"session_id": 0}),
    "no session": ("sessions", (X, P), {}),
    "session too large": ("sessions", (X, P), {"session_id": 2}),
    "session negative": ("sessions", (X, P), {"session_id": -1}),
    "wrong session": ("sessions", (X, P), {"session_id": 1}),
    "session of a single one": ("plane", (X, P), {"session_id": 1}),
    "negative session of a single one": ("plane", (X, P), {"session_id": -1}),
    "no labels": ("plane", (X,), {}),
    "too many labels": ("plane", (X, P, H), {}),
    "labels for time": ("time", (X, P), {}),
    "integers for floats": ("line", (X, D), {}),
    "floats for integers": ("discrete", (X, H), {}),
    "labels in the wrong order": ("mixed", (X, P, D), {}),
    "two columns of integers for floats": ("plane", (X, P.astype(int)), {}),
    "labels too wide": ("plane", (X, np.column_stack([P, H])), {}),
    "labels too narrow": ("plane", (X, P[:, :1]), {}),
    "two columns of integers": ("discrete", (X, np.column_stack([D, D])), {}),
    "3-D labels": ("plane", (X, P[:, :, None]), {}),
    "wrong number of neurons": ("plane", (SECOND.X, SECOND.position), {}),
    "shorter than the receptive field": ("plane", (X[:4], P[:4]), {}),
    "one step": ("plane", (X[:1], P[:1]), {}),
    "no step": ("plane", (X[:0], P[:0]), {}),
    "NaN in X": ("plane", (spoiled(X, np.nan), P), {}),
    "infinity in X": ("plane", (spoiled(X, np.inf), P), {}),
    "NaN in labels": ("plane", (X, spoiled(P, np.nan)), {}),
    "infinity in labels": ("plane", (X, spoiled(P, np.inf)), {}),
    "3-D X": ("plane", (X[:, :, None], P), {}),
    "complex X": ("plane", (X.astype(complex), P), {}),
    "labels of other length": ("plane", (X, P[:-1]), {}),
    "second labels of other length": ("plane and line", (X, P, H[:-1]), {}),
    "no batches": ("plane", (X, P), {"num_batches": 0}),
    "fewer than no batches": ("plane", (X, P), {"num_batches": -1}),
    "batches None": ("plane", (X, P), {"num_batches": None}),
    "two discrete labels": ("two discrete", (X, D, D), {}),
    "several time offsets": ("several offsets", (X,), {}),
    "time offset beyond the recording": ("large offset", (X,), {}),
    "time offset of no integer": ("offset of no integer", (X,), {}),
    "hybrid without labels": ("hybrid without labels", (X,), {}),
    "hybrid of integers": ("hybrid of integers", (X, D), {}),
    "hybrid of both": ("hybrid of both", (X, D, P), {}),
    "hybrid full batch": ("hybrid full batch", (X, P), {}),
    "full batch of integers": ("full batch of integers", (X, D), {}),
    "full batch of both": ("full batch of both", (X, D, P), {}),
}
TRANSFORMS = {
    "unfitted": ("unfitted", (X,), {}),
    "no session": ("sessions", (X,), {}),
    "session too large": ("sessions", (X,), {"session_id": 2}),
    "session negative": ("sessions", (X,), {"session_id": -1}),
    "wrong session": ("sessions", (X,), {"session_id": 1}),
    "session of a single one": ("plane", (X,), {"session_id": 1}),
    "wrong number of neurons": ("plane", (SECOND.X,), {}),
    "shorter than the receptive field": ("plane", (X[:4],), {}),
    "no step": ("plane", (X[:0],), {}),
    "NaN": ("plane", (spoiled(X, np.nan),), {}),
    "infinity": ("plane", (spoiled(X, np.inf),), {}),
    "1-D X": ("plane", (X[:, 0],), {}),
    "3-D X": ("plane", (X[:, :, None],), {}),
    "complex X": ("plane", (X.astype(complex),), {}),
}
# What goes wrong with several sessions: CEBRA says so when it is fitted to them.
SESSIONS = {
    "no labels": (BOTH_X,),
    "two sets of labels": (BOTH_X, BOTH_P, BOTH_P),
    "labels of one session": (BOTH_X, BOTH_P[:1]),
    "labels of another length": (BOTH_X, [FIRST.position, SECOND.position[1:]]),
}
CONVERSIONS = {
    "model and batch size": lambda side: side.to_bits(1.0, fitted("plane"), batch_size=32),
    "model and sessions": lambda side: side.to_bits(1.0, fitted("plane"), num_sessions=1),
    "unfitted and sessions": lambda side: side.to_bits(1.0, fitted("unfitted"), num_sessions=1),
    "neither": lambda side: side.to_bits(1.0),
    "no batch size": lambda side: side.to_bits(1.0, num_sessions=1),
    "no sessions": lambda side: side.to_bits(1.0, batch_size=32),
    "unfitted": lambda side: side.to_bits(1.0, fitted("unfitted")),
    "full batch": lambda side: side.to_bits(1.0, fitted("full batch")),
    "history of a full batch": lambda side: side.history(fitted("full batch")),
    "correction without a batch size": lambda side: side.infonce_loss(
        fitted("full batch"), X, P, num_batches=2, correct_by_batchsize=True
    ),
}
THEIRS = SimpleNamespace(
    infonce_loss=metrics.infonce_loss,
    goodness_of_fit_score=metrics.goodness_of_fit_score,
    transform=cebra.CEBRA.transform,
    history=metrics.goodness_of_fit_history,
    to_bits=metrics.infonce_to_goodness_of_fit,
)
OURS = SimpleNamespace(
    infonce_loss=cjm.infonce_loss,
    goodness_of_fit_score=cjm.goodness_of_fit_score,
    transform=lambda estimator, *args, **kw: cjm.embed(cjm.from_cebra(estimator), *args, **kw),
    history=cjm.goodness_of_fit_history,
    to_bits=cjm.infonce_to_goodness_of_fit,
)


def assert_same_error(call):
    """An instance of CEBRA's exception, with the first words of CEBRA's message."""
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever CEBRA raises)
        call(THEIRS)
    with pytest.raises(theirs.type) as ours:
        call(OURS)
    leading = str(theirs.value).partition("\n")[0][:30].rstrip(".")
    assert str(ours.value)[: len(leading)] == leading


@pytest.mark.parametrize("score", ["infonce_loss", "goodness_of_fit_score"])
@pytest.mark.parametrize("mistake", SCORES)
def test_score(mistake, score):
    model, args, settings = SCORES[mistake]
    settings = {"num_batches": 2, **settings}
    assert_same_error(lambda side: getattr(side, score)(fitted(model), *args, **settings))


@pytest.mark.parametrize("mistake", TRANSFORMS)
def test_transform(mistake):
    model, args, settings = TRANSFORMS[mistake]
    assert_same_error(lambda side: side.transform(fitted(model), *args, **settings))


@pytest.mark.parametrize("mistake", SESSIONS)
def test_sessions(mistake):
    fit = cebra.CEBRA(**peer.SETTINGS).fit
    joint = functools.partial(cjm.multisession_infonce_loss, fitted("sessions"))
    sides = {id(THEIRS): fit, id(OURS): joint}
    assert_same_error(lambda side: sides[id(side)](*SESSIONS[mistake]))


@pytest.mark.parametrize("mistake", CONVERSIONS)
def test_conversion(mistake):
    assert_same_error(CONVERSIONS[mistake])


def test_history_of_an_unfitted_model():
    with pytest.raises(AttributeError):
        metrics.goodness_of_fit_history(fitted("unfitted"))
    with pytest.raises(AttributeError, match="not fitted yet"):  # NotFittedError is one of these
        cjm.goodness_of_fit_history(fitted("unfitted"))
