"""Checkpoints in and out: CEBRA's files and state dicts, and the library's own file."""

import copy
import dataclasses
import json
import os
import pickletools
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

import cebra_jax_metrics as cjm
from cebra_jax_metrics import CheckpointError
from cebra_jax_metrics.checkpoints import cebra as cebra_files
from cebra_jax_metrics.checkpoints.torch_zip import DType, read_torch_zip
from cebra_jax_metrics.encoders import architectures

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.pt"))
SINGLE = "offset10-model"
MULTI = "multisession"
AUTO = "criterion_cosine_auto"
TIED = "offset1-model-mse-v2-3layers"
SIZES = {"num_hidden_units": 6, "output_dimension": 3}


def golden(name):
    return cjm.load(GOLDEN / f"{name}.pt")


def assert_same(a, b):
    """Two checkpoints are the same, bit by bit."""
    leaves, structure = jax.tree.flatten(a.model)
    others, structure_b = jax.tree.flatten(b.model)
    assert structure == structure_b
    for one, other in zip(leaves, others, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
    assert dict(a.settings) == dict(b.settings)
    assert dict(a.metadata) == dict(b.metadata)
    assert a.history.keys() == b.history.keys()
    for name in a.history:
        np.testing.assert_array_equal(a.history[name], b.history[name], strict=True)


@pytest.fixture
def edited(monkeypatch):
    """Load a golden file after an edit of what the reader finds in it."""

    def load(name, edit):
        payload = copy.deepcopy(read_torch_zip(GOLDEN / f"{name}.pt"))
        edit(payload)
        monkeypatch.setattr(cebra_files, "read_torch_zip", lambda path: payload)
        return cjm.load(GOLDEN / f"{name}.pt")

    return load


def put(*keys_and_value):
    """An edit: set the value at a path of keys."""
    *keys, last, value = keys_and_value

    def edit(payload):
        for key in keys:
            payload = payload[key]
        payload[last] = value

    return edit


def argument(name, value):
    return put("args", name, value)


def parameter(name, value):
    return put("state_dict", "model", name, value)


@pytest.fixture
def custom_architecture(monkeypatch):
    """A linear encoder, registered during the test; its first parameter is a bias."""
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    cjm.register_architecture(
        "test-linear",
        init=lambda key, n, h, d: {"bias": jnp.zeros(d), "weight": jax.random.normal(key, (n, d))},
        apply=lambda params, X: X @ params["weight"] + params["bias"][None],
        offset=(0, 1),
    )
    return "test-linear"


# CEBRA's files


@pytest.mark.parametrize("name", NAMES)
def test_golden_parameters(name):
    written = read_torch_zip(GOLDEN / f"{name}.pt")["state_dict"]["model"]
    state_dict = cjm.to_state_dict(golden(name))
    written = {key.removeprefix("module."): value for key, value in written.items()}
    assert state_dict.keys() == written.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(state_dict[key], value, strict=True)


@pytest.mark.parametrize("name", [SINGLE, "discrete", "mixed", "time", AUTO, "no_padding"])
def test_golden_settings(name):
    payload = read_torch_zip(GOLDEN / f"{name}.pt")
    checkpoint = golden(name)
    for key, value in payload["args"].items():
        plain = json.loads(json.dumps(value))
        assert checkpoint.settings[key] == plain
    assert checkpoint.settings["num_sessions"] is None
    assert not checkpoint.is_multisession
    assert checkpoint.metadata == payload["metadata"]
    log = payload["state_dict"]["log"]
    assert checkpoint.history.keys() == log.keys()
    for key, value in log.items():
        np.testing.assert_array_equal(checkpoint.history[key], np.array(value), strict=True)


POSITION = {"dtype": "float32", "shape": [120, 2]}
DIRECTION = {"dtype": "int64", "shape": [120]}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        (SINGLE, [POSITION]),
        ("discrete", [DIRECTION]),
        ("mixed", [POSITION, DIRECTION]),
        ("time", []),
        ("hybrid", [POSITION]),
        (MULTI, [[POSITION, {"dtype": "float32", "shape": [100, 2]}]]),
    ],
)
def test_golden_label_types(name, labels):
    assert golden(name).settings["label_types"] == labels


def test_sessions_by_prefix():
    checkpoint = golden(MULTI)
    assert checkpoint.is_multisession
    assert checkpoint.settings["num_sessions"] == 2
    assert [encoder.num_neurons for encoder in checkpoint.model.encoders] == [7, 5]
    assert all("net.0.weight" in encoder.params for encoder in checkpoint.model.encoders)


def test_hybrid_prefix():
    written = read_torch_zip(GOLDEN / "hybrid.pt")["state_dict"]["model"]
    assert all(name.startswith("module.") for name in written)
    checkpoint = golden("hybrid")
    assert checkpoint.settings["hybrid"] is True
    assert not checkpoint.is_multisession
    assert len(checkpoint.history["total"]) == 3


def test_learned_temperature_is_clamped():
    criterion = golden(AUTO).model.criterion
    assert criterion.learned
    np.testing.assert_allclose(criterion.temperature, 0.2, rtol=1e-6)
    np.testing.assert_allclose(criterion.min_temperature, 0.4, rtol=1e-6)
    np.testing.assert_allclose(criterion.effective_temperature, 0.4, rtol=1e-6)


def test_old_file(edited):
    def age(payload):
        del payload["args"]["masking_kwargs"]
        del payload["state"]["num_sessions_"]
        del payload["state_dict"]["num_sessions"]
        del payload["metadata"]

    old, new = edited(MULTI, age), golden(MULTI)
    assert old.settings["num_sessions"] == 2
    assert dict(old.settings) == dict(new.settings)
    assert_same(dataclasses.replace(old, metadata=new.metadata), new)


def test_files_without_a_log(edited):
    checkpoint = edited(SINGLE, lambda payload: payload["state_dict"].pop("log"))
    assert set(checkpoint.history) == {"total"}
    np.testing.assert_array_equal(checkpoint.history["total"], golden(SINGLE).history["total"])


def test_half_precision_files(edited):
    def halve(payload):
        model = payload["state_dict"]["model"]
        model.update({name: value.astype(np.float16) for name, value in model.items()})

    params = edited(SINGLE, halve).model.encoders[0].params
    for name, value in golden(SINGLE).model.encoders[0].params.items():
        assert params[name].dtype == jnp.float32
        np.testing.assert_array_equal(params[name], value.astype(jnp.float16).astype(jnp.float32))


ZEROS = np.zeros(6, np.float32)
CYCLE = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("state", "solver_name_", "supervised-solver"), "solver supervised-solver"),
        (put("state", "solver_name_", None), "solver .NoneType"),
        (argument("criterion", "infomse"), "criterion.*'infomse'"),
        (argument("distance", "manhattan"), "distance.*'manhattan'"),
        (argument("temperature_mode", "cold"), "temperature_mode.*'cold'"),
        (argument("temperature", 0.0), "temperature has to be a finite number above 0"),
        (argument("temperature", float("nan")), "temperature has to be a finite number above 0"),
        (argument("temperature", "1"), "temperature.*'1'"),
        (argument("temperature", 10**400), "temperature|too large"),
        (argument("min_temperature", 10**400), "min_temperature|too large"),
        (argument("min_temperature", "low"), "min_temperature.*'low'"),
        (argument("batch_size", 2.5), r"batch_size.*2\.5"),
        (argument("batch_size", True), "batch_size.*True"),
        (argument("delta", "0.1"), "delta.*'0.1'"),
        (argument("conditional", 3), "conditional.*3"),
        (argument("hybrid", 1), "hybrid.*1"),
        (argument("pad_before_transform", "yes"), "pad_before_transform.*'yes'"),
        (argument("model_architecture", 3), "model_architecture.*3"),
        (argument("num_hidden_units", 7), r"net.0.weight has shape \(6, 7, 2\), not \(7, 7, 2\)"),
        (argument("num_hidden_units", 2**62), "num_hidden_units is too large: 4611686018427387904"),
        (argument("num_hidden_units", -1), "hidden units"),
        (argument("output_dimension", 0), "[Oo]utput dimension"),
        (argument("output_dimension", None), "output_dimension.*None"),
        (put("args", None), "laid out"),
        (put("args", [1]), "laid out"),
        (put("state", None), "laid out"),
        (put("state", "label_types_", 3), "label_types_"),
        (put("state", "label_types_", [("f4",)]), "label_types_"),
        (put("state", "label_types_", [("f4", "ab")]), "label_types_"),
        (put("state", "label_types_", CYCLE), "again and again"),
        (put("metadata", None), "laid out"),
        (put("state_dict", None), "laid out"),
        (put("state_dict", "model", None), "laid out"),
        (put("state_dict", "model", {}), "net.0.weight is missing"),
        (put("state_dict", "model", {0: ZEROS}), "0 is not a parameter"),
        (parameter("net.0.weight", ZEROS[0]), "net.0.weight"),
        (parameter("net.0.bias", None), "net.0.bias"),
        (parameter("net.0.bias", "six"), "net.0.bias"),
        (parameter("net.0.bias", {}), "net.0.bias"),
        (parameter("net.0.bias", [[1.0], [1.0, 2.0]]), "net.0.bias"),
        (parameter("net.0.bias", np.zeros(6, int)), "net.0.bias is of dtype int64"),
        (parameter("net.0.bias", np.zeros(6, bool)), "net.0.bias is of dtype bool"),
        (parameter("net.0.bias", np.zeros(6, complex)), "net.0.bias is of dtype complex128"),
        (put("state_dict", "log", None), "laid out"),
        (put("state_dict", "log", {"total": 1}), "history|laid out"),
        (put("state_dict", "log", {"total": ["a"]}), "history"),
        (put("state_dict", "log", {"total": [[1.0], [1.0, 2.0]]}), "history"),
        (put("state_dict", "log", {"total": [[1.0]]}), "history"),
        (put("state_dict", "log", {"total": CYCLE}), "again and again"),
    ],
)
def test_damaged_cebra_files(edited, edit, message):
    with pytest.raises(CheckpointError, match=rf"(?s){SINGLE}\.pt.*({message})"):
        edited(SINGLE, edit)


@pytest.mark.parametrize("value", [[1.0, 2.0], {}, "cold", None])
def test_damaged_temperature(edited, value):
    criterion = {} if value is None else {"log_inverse_temperature": value}
    with pytest.raises(CheckpointError, match=rf"{AUTO}\.pt.*(number|log_inverse_temperature)"):
        edited(AUTO, put("state_dict", "criterion", criterion))


@pytest.mark.parametrize("key", ["args", "state", "state_dict"])
def test_missing_parts(edited, key):
    with pytest.raises(CheckpointError, match=f"Missing keys.*: {key}"):
        edited(SINGLE, lambda payload: payload.pop(key))


def test_mixed_up_sessions(edited):
    with pytest.raises(CheckpointError, match="mixed up"):
        edited(MULTI, parameter("net.0.bias", ZEROS))
    with pytest.raises(CheckpointError, match=r"1\.net\.0\.bias is missing"):
        edited(MULTI, lambda payload: payload["state_dict"]["model"].pop("1.net.0.bias"))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("supervised10-model", "supervised models predict labels"),
        ("offset11-model", r"Did you mean 'offset1.*register_architecture\("),
        ("my-own", r"register_architecture\('my-own', init="),
    ],
)
def test_architectures_that_cannot_be_used(edited, architecture, message):
    with pytest.raises(ValueError, match=f"'{architecture}'.*{message}"):
        edited(SINGLE, argument("model_architecture", architecture))
    with pytest.raises(ValueError, match=f"'{architecture}'.*{message}"):
        cjm.from_state_dict({"net.0.weight": ZEROS[None]}, model_architecture=architecture)


def test_registered_architectures_in_cebra_files(edited, custom_architecture):
    """The file says how many neurons there are; the layout of custom parameters does not."""

    def replace_model(payload):
        weight = np.arange(21, dtype=np.float32).reshape(7, 3)
        payload["args"]["model_architecture"] = custom_architecture
        payload["state_dict"]["model"] = {"bias": ZEROS[:3], "weight": weight}

    (encoder,) = edited(SINGLE, replace_model).model.encoders
    assert encoder.num_neurons == 7
    assert encoder.encode(jnp.ones((4, 7))).shape == (4, 3)


def refusal(path):
    try:
        cjm.load(path)
    except ValueError as error:
        return error
    return None


def test_flipped_bytes(tmp_path):
    """A damaged file is refused, or read as another model; nothing else happens."""
    with zipfile.ZipFile(GOLDEN / f"{AUTO}.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in files if name.endswith("data.pkl"))
    # Adam's state, by far the longest part, is not used: flip what comes before and after it.
    places = {arg: place for _, arg, place in pickletools.genops(files[pickled])}
    used = [*range(places["optimizer"]), *range(places["param_groups"], len(files[pickled]))]
    rng = np.random.default_rng(0)
    for position, flip in zip(
        rng.choice(used, 500, replace=False), rng.integers(1, 256, 500), strict=True
    ):
        damaged = bytearray(files[pickled])
        damaged[position] ^= flip
        with zipfile.ZipFile(tmp_path / "damaged.pt", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, bytes(damaged) if name == pickled else data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers too large for float32
            error = refusal(tmp_path / "damaged.pt")
        allowed = isinstance(error, CheckpointError) or "Unknown architecture" in str(error)
        assert error is None or allowed, f"byte {position} ^ {flip}"


# Files of other kinds


@pytest.mark.parametrize("content", [b"", b"P", b"PK", b"text", bytes(100), b"\x80\x02N."])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}.*neither"):
        cjm.load(path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        cjm.load(tmp_path / "nothing.pt")
    with pytest.raises(OSError, match="directory"):
        cjm.load(tmp_path)


# State dicts


@pytest.mark.parametrize("name", [SINGLE, MULTI, TIED, AUTO, "offset1-model-mse"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda x: x.tolist()])
def test_state_dict_round_trip(name, kind):
    checkpoint = golden(name)
    settings = {key: checkpoint.settings[key] for key in cebra_files.SETTINGS}
    state_dict = {key: kind(value) for key, value in cjm.to_state_dict(checkpoint).items()}
    if checkpoint.model.criterion.learned:
        state_dict["log_inverse_temperature"] = -np.log(checkpoint.model.criterion.temperature)
    back = cjm.from_state_dict(state_dict, **settings)
    others = {"history": checkpoint.history, "metadata": checkpoint.metadata}
    expected = {**checkpoint.settings, "label_types": None}
    assert_same(
        dataclasses.replace(back, **others), dataclasses.replace(checkpoint, settings=expected)
    )


@pytest.mark.parametrize("order", [sorted, reversed])
def test_state_dict_in_any_order(order):
    state_dict = cjm.to_state_dict(golden(SINGLE))
    shuffled = {name: state_dict[name] for name in order(list(state_dict))}
    back = cjm.from_state_dict(shuffled, model_architecture="offset10-model", **SIZES)
    assert back.model.encoders[0].num_neurons == 7


def test_state_dict_of_a_transformed_model():
    """JAX sorts the keys of dictionaries that pass through it."""
    model = jax.tree.map(lambda leaf: 2 * leaf, golden(SINGLE).model)
    back = cjm.from_state_dict(
        cjm.to_state_dict(model), model_architecture="offset10-model", **SIZES
    )
    doubled = 2 * golden(SINGLE).model.encoders[0].params["net.0.weight"]
    np.testing.assert_array_equal(back.model.encoders[0].params["net.0.weight"], doubled)


def test_state_dict_of_one_of_several_sessions():
    state_dict = {f"0.{k}": v for k, v in cjm.to_state_dict(golden(SINGLE)).items()}
    back = cjm.from_state_dict(state_dict, model_architecture="offset10-model", **SIZES)
    assert back.is_multisession
    assert cjm.to_state_dict(back).keys() == state_dict.keys()


def test_state_dict_values_are_its_own():
    checkpoint = golden(SINGLE)
    state_dict = cjm.to_state_dict(checkpoint)
    state_dict["net.0.bias"][:] = 7
    assert not np.any(checkpoint.model.encoders[0].params["net.0.bias"] == 7)


def test_tied_parameters_are_one_leaf():
    checkpoint = golden(TIED)
    state_dict = cjm.to_state_dict(checkpoint)
    repeated = set(state_dict) - set(checkpoint.model.encoders[0].params)
    assert repeated
    for name in repeated:
        kind = name.rpartition(".")[2]
        assert any(
            np.array_equal(state_dict[name], value)
            for owner, value in checkpoint.model.encoders[0].params.items()
            if owner.endswith(kind)
        )


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (SINGLE, {"net.0.bias": None}, "net.0.bias is missing"),
        (SINGLE, {"net.9.bias": ZEROS}, "net.9.bias is not a parameter"),
        (SINGLE, {"net.0.bias": ZEROS[:5]}, r"net.0.bias has shape \(5,\), not \(6,\)"),
        (SINGLE, {"net.0.bias": ZEROS.astype(int)}, "net.0.bias is of dtype int64"),
        (SINGLE, {"net.0.bias": None, "x": ZEROS}, "(?=.*bias is missing)(?=.*x is not a param)"),
        (MULTI, {"1.net.5.bias": None}, r"1\.net\.5\.bias is missing"),
        (TIED, {"net.7.bias": ZEROS + 1}, "net.7.bias differs from net.[35].bias"),
    ],
)
def test_state_dict_mistakes(name, edit, message):
    state_dict = {**cjm.to_state_dict(golden(name)), **edit}
    state_dict = {key: value for key, value in state_dict.items() if value is not None}
    architecture = golden(name).settings["model_architecture"]
    with pytest.raises(ValueError, match=message):
        cjm.from_state_dict(state_dict, model_architecture=architecture, **SIZES)


def test_settings_of_a_state_dict():
    state_dict = cjm.to_state_dict(golden(SINGLE))
    with pytest.raises(TypeError, match="'batchsize'"):
        cjm.from_state_dict(state_dict, model_architecture="offset10-model", batchsize=3)
    with pytest.raises(ValueError, match="'manhattan'"):
        cjm.from_state_dict(
            state_dict, model_architecture="offset10-model", distance="manhattan", **SIZES
        )
    checkpoint = cjm.from_state_dict(
        state_dict, model_architecture="offset10-model", batch_size=64, temperature=0.3, **SIZES
    )
    assert checkpoint.settings["batch_size"] == 64
    assert checkpoint.settings["conditional"] is None
    np.testing.assert_allclose(checkpoint.model.criterion.temperature, 0.3, rtol=1e-6)


# Estimators


class Estimator(BaseEstimator):
    """What ``from_cebra`` sees of a fitted ``cebra.CEBRA``."""

    def __init__(self, **arguments):
        self.__dict__.update(arguments)

    def get_params(self, deep=True):
        return dict(self.arguments)

    def fit(self, X, *y):
        return self


def test_from_cebra():
    payload = read_torch_zip(GOLDEN / f"{MULTI}.pt")
    estimator = Estimator(arguments=payload["args"], **payload["state"])
    estimator.state_dict_ = payload["state_dict"]
    before = dict(estimator.__dict__)
    checkpoint = cjm.from_cebra(estimator)
    assert estimator.__dict__ == before
    assert checkpoint.metadata == {"cebra_version": "0.6.1"}
    expected = golden(MULTI)
    assert_same(dataclasses.replace(checkpoint, metadata=expected.metadata), expected)


def test_from_cebra_mistakes():
    with pytest.raises(NotFittedError):
        cjm.from_cebra(Estimator(arguments={}))
    with pytest.raises(TypeError, match="dict"):
        cjm.from_cebra({})


# The library's own file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(path, recording, name):
    checkpoint = golden(name)
    cjm.save(checkpoint, path)
    back = cjm.load(path)
    assert_same(checkpoint, back)
    session, X = (1, "X_1") if name == MULTI else (None, "X")
    embeddings = [cjm.embed(model, recording[X], session) for model in (checkpoint, back)]
    np.testing.assert_array_equal(*embeddings, strict=True)


def test_saving_twice_gives_the_same_arrays_and_text(path):
    cjm.save(golden(MULTI), path)
    again = path.with_name("again")
    cjm.save(cjm.load(str(path)), str(again))
    assert path.stat().st_size == again.stat().st_size
    assert_same(cjm.load(path), cjm.load(again))


def small_model(dtype=jnp.float32, **criterion):
    encoder = cjm.Encoder.init(jax.random.key(0), "offset1-model", 3, 2, 2)
    params = {name: value.astype(dtype) for name, value in encoder.params.items()}
    criterion = {"temperature": jnp.float32(1), "min_temperature": jnp.float32(0), **criterion}
    return cjm.Model((dataclasses.replace(encoder, params=params),), cjm.Criterion(**criterion))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
def test_dtypes_survive(path, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        checkpoint = cjm.Checkpoint(small_model(dtype))
        cjm.save(checkpoint, path)
        back = cjm.load(path)
        assert_same(checkpoint, back)
        assert back.model.encoders[0].params["net.1.bias"].dtype == dtype


@pytest.mark.parametrize(
    "criterion",
    [
        {"temperature": 1.0},
        {"temperature": 1},
        {"temperature": 0.5, "learned": True, "min_temperature": 0},
        {"similarity": "euclidean", "temperature": jnp.float32(2)},
        {"temperature": np.float64(0.1)},
    ],
)
def test_criteria_survive(path, criterion):
    model = small_model(**criterion)
    cjm.save(cjm.Checkpoint(model), path)
    back = cjm.load(path).model.criterion
    assert back.similarity == model.criterion.similarity
    assert back.learned == model.criterion.learned
    np.testing.assert_allclose(back.temperature, model.criterion.temperature, rtol=1e-6)
    np.testing.assert_allclose(back.min_temperature, model.criterion.min_temperature, rtol=1e-6)


def test_values_that_are_not_finite_survive(path):
    model = jax.tree.map(lambda leaf: leaf * jnp.nan, small_model())
    history = {"total": np.array([1.0, np.nan, np.inf])}
    cjm.save(cjm.Checkpoint(model, {"delta": float("inf")}, history), path)
    back = cjm.load(path)
    assert np.isnan(back.model.encoders[0].params["net.1.bias"]).all()
    np.testing.assert_array_equal(back.history["total"], history["total"])
    assert back.settings == {"delta": float("inf")}


def test_history_survives(path):
    history = {"total": np.array([3, 2, 1]), "pos": np.zeros(0), "neg": [0.5]}
    cjm.save(cjm.Checkpoint(small_model(), history=history), path)
    for name, values in cjm.load(path).history.items():
        np.testing.assert_array_equal(values, history[name])


def test_registered_architectures_survive(path, custom_architecture, recording):
    encoder = cjm.Encoder.init(jax.random.key(0), custom_architecture, 7, 2, 3)
    checkpoint = cjm.Checkpoint(cjm.Model((encoder,), golden(SINGLE).model.criterion))
    cjm.save(checkpoint, path)
    assert_same(checkpoint, cjm.load(path))
    embeddings = [cjm.embed(c, recording["X"]) for c in (checkpoint, cjm.load(path))]
    np.testing.assert_array_equal(*embeddings)


def test_architectures_have_to_be_registered(path, custom_architecture, monkeypatch):
    encoder = cjm.Encoder.init(jax.random.key(0), custom_architecture, 7, 2, 3)
    cjm.save(cjm.Checkpoint(cjm.Model((encoder,))), path)
    monkeypatch.delitem(architectures._ARCHITECTURES, custom_architecture)
    with pytest.raises(ValueError, match=r"register_architecture\('test-linear', init="):
        cjm.load(path)


# Damaged files of our own


def header(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


@pytest.fixture
def damaged(path):
    """Write a golden checkpoint with other arrays, header entries or description, and load it."""

    def load(arrays=None, entries=None, edit=lambda description: None):
        cjm.save(golden(SINGLE), path)
        texts = header(path)
        description = json.loads(texts["checkpoint"])
        edit(description)
        texts |= {"checkpoint": json.dumps(description), **(entries or {})}
        contents = {**safetensors.numpy.load_file(path), **(arrays or {})}
        contents = {name: value for name, value in contents.items() if value is not None}
        texts = {name: text for name, text in texts.items() if text is not None}
        safetensors.numpy.save_file(contents, path, texts)
        return cjm.load(path)

    return load


def test_rewritten_files_load(damaged):
    assert_same(damaged(), golden(SINGLE))


BIAS = "encoders.0.net.0.bias"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (BIAS, None, f"{BIAS} is missing"),
        ("criterion.temperature", None, "criterion.temperature is missing"),
        ("history.total", None, "history.total is missing"),
        ("encoders.0.net.9.bias", ZEROS, r"belong to nothing.*encoders\.0\.net\.9\.bias"),
        ("encoders.1.net.0.bias", ZEROS, r"belong to nothing.*encoders\.1\.net\.0\.bias"),
        (BIAS, ZEROS[:5], rf"{BIAS} has shape \(5,\), not \(6,\)"),
        ("criterion.temperature", ZEROS, r"criterion.temperature has shape \(6,\)"),
        (BIAS, ZEROS.astype(np.int32), f"{BIAS} is of dtype int32"),
        (BIAS, ZEROS.astype(bool), f"{BIAS} is of dtype bool"),
        ("history.total", np.zeros((2, 2)), "not one-dimensional"),
    ],
)
def test_damaged_arrays(damaged, path, name, value, message):
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        damaged({name: value})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": None}, "did not write it; use from_state_dict"),
        ({"format": "pt"}, "did not write it; use from_state_dict"),
        ({"version": "2"}, "format version is 2.*upgrade"),
        ({"version": None}, "format version is None"),
        ({"checkpoint": None}, "damaged.*checkpoint"),
        ({"checkpoint": "{"}, "damaged.*line 1"),
        ({"checkpoint": "[" * 100_000}, "damaged"),
        ({"checkpoint": "[]"}, "damaged"),
        ({"checkpoint": "null"}, "damaged"),
        ({"checkpoint": "{}"}, "damaged.*criterion"),
    ],
)
def test_damaged_headers(damaged, path, entries, message):
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        damaged(entries=entries)


@pytest.mark.parametrize(
    ("keys_and_value", "message"),
    [
        (("encoders", []), "no encoder"),
        (("encoders", "abc"), "damaged"),
        (("encoders", 0, {}), "damaged"),
        (("encoders", 0, "num_neurons", 8), r"net.0.weight has shape \(6, 7, 2\), not \(6, 8, 2\)"),
        (("encoders", 0, "num_neurons", -1), "neurons"),
        (("encoders", 0, "num_neurons", "7"), "damaged|num_neurons"),
        (("encoders", 0, "num_neurons", 7.0), "damaged|num_neurons"),
        (("encoders", 0, "architecture", ["offset10-model"]), "damaged|architecture"),
        (("encoders", 0, "architecture", "my-own"), "Unknown architecture 'my-own'"),
        (("criterion", None), "damaged|criterion"),
        (("criterion", "similarity", "manhattan"), "damaged.*criterion"),
        (("criterion", "similarity", ["cosine"]), "damaged|similarity"),
        (("criterion", "learned", "no"), "damaged|learned"),
        (("history", 3), "damaged|history"),
        (("history", "total"), "history"),
        (("settings", None), "damaged|settings"),
        (("settings", [1]), "damaged|settings"),
        (("settings", "batch_size", 2.5), "setting batch_size.*2.5"),  # found by fuzzing
        (("settings", "batch_size", 10**300), "batch_size is too large: 1000"),
        (("settings", "num_sessions", 2**31), "num_sessions is too large"),
        (("settings", "num_sessions", "2"), "setting num_sessions.*'2'"),
        (("settings", "delta", "a" * 10_000), "setting delta.{,100}$"),
        (("settings", "label_types", 3), "damaged: settings"),
        (("settings", "label_types", [3]), "damaged: settings"),
        (("settings", "label_types", [{"dtype": "float32"}]), "damaged: settings"),
        (("settings", "label_types", [{"dtype": 4, "shape": [3]}]), "damaged: settings"),
        (("settings", "label_types", [[{"dtype": "f4", "shape": [2.5]}]]), "damaged: settings"),
        (("metadata", "text"), "damaged|metadata"),
    ],
)
def test_damaged_descriptions(damaged, path, keys_and_value, message):
    with pytest.raises(CheckpointError, match=f"(?s){path}.*({message})"):
        damaged(edit=put(*keys_and_value))


def test_foreign_safetensors_files(path):
    safetensors.numpy.save_file(cjm.to_state_dict(golden(SINGLE)), path)
    with pytest.raises(CheckpointError, match=f"{path}.*from_state_dict"):
        cjm.load(path)


def test_truncated_files(path):
    cjm.save(golden("offset1-model"), path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 13), *range(64), *range(len(whole) - 64, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            cjm.load(path)


# Writing


def fail(*arguments, **options):
    raise OSError("no space left on device")


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("exists", [True, False])
def test_failing_writes_change_nothing(path, monkeypatch, owner, function, exists):
    if exists:
        cjm.save(golden(SINGLE), path)
    before = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    checkpoint = golden(MULTI)
    monkeypatch.setattr(owner, function, fail)
    with pytest.raises(OSError, match="no space left"):
        cjm.save(checkpoint, path)
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == before


def test_writing_replaces_and_leaves_one_file(path):
    path.write_text("something else")
    cjm.save(golden(SINGLE), path)
    cjm.save(golden(MULTI), path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert_same(cjm.load(path), golden(MULTI))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_file_mode_follows_the_umask(path, umask):
    before = os.umask(umask)
    try:
        cjm.save(golden(SINGLE), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_longest_file_name(tmp_path):
    longest = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    cjm.save(golden(SINGLE), longest)
    assert_same(cjm.load(longest), golden(SINGLE))


def test_only_checkpoints_are_saved(path):
    for thing in (golden(SINGLE).model, {}, None, "model.safetensors"):
        with pytest.raises(TypeError, match=f"Expected a Checkpoint, got {type(thing).__name__}"):
            cjm.save(thing, path)
    assert not path.exists()


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1), DType(np.dtype("f4"))])
def test_settings_that_json_cannot_hold(path, value):
    with pytest.raises(TypeError, match="JSON"):
        cjm.save(cjm.Checkpoint(small_model(), {"delta": value}), path)
    assert not any(path.parent.iterdir())


def test_places_that_cannot_be_written(path, tmp_path):
    path.write_text("a file")
    for target in (tmp_path, path / "model", tmp_path / "nothing" / "model"):
        with pytest.raises(OSError, match="directory"):
            cjm.save(golden(SINGLE), target)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_stacked_models_are_not_written(tmp_path):
    checkpoint = cjm.load(GOLDEN / "offset10-model.pt")
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), checkpoint.model)
    with pytest.raises(cjm.CheckpointError, match="has shape"):
        cjm.save(cjm.Checkpoint(stacked), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_learned_temperature_needs_its_mode():
    state = cjm.to_state_dict(cjm.load(GOLDEN / "offset10-model.pt"))
    state["log_inverse_temperature"] = np.float32(3.0)
    with pytest.raises(cjm.CheckpointError, match="temperature_mode is not 'auto'"):
        cjm.from_state_dict(
            state, model_architecture="offset10-model", num_hidden_units=6, output_dimension=3
        )


def test_names_that_start_with_a_digit_need_not_be_sessions(monkeypatch):
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    cjm.register_architecture(
        "sequential",
        init=lambda key, n, h, d: {"0.weight": jax.random.normal(key, (n, d))},
        apply=lambda params, X: X @ params["0.weight"],
        offset=(0, 1),
    )
    encoder = cjm.Encoder.init(jax.random.key(0), "sequential", 4, 1, 3)
    state = cjm.to_state_dict(cjm.Model((encoder,)))
    checkpoint = cjm.from_state_dict(
        state, model_architecture="sequential", num_neurons=4, output_dimension=3
    )
    X = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    np.testing.assert_allclose(cjm.embed(checkpoint, X), encoder.encode(X), rtol=1e-5, atol=1e-6)


def test_state_dict_of_a_hybrid_model_has_a_prefix():
    expected = cjm.load(GOLDEN / "hybrid.pt").model.encoders[0]
    state = {f"module.{name}": value for name, value in expected.params.items()}
    checkpoint = cjm.from_state_dict(
        state, model_architecture="offset10-model", num_hidden_units=6, output_dimension=4
    )
    jax.tree.map(np.testing.assert_array_equal, checkpoint.model.encoders[0], expected)
