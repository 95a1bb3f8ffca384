"""The demo: a small model and its recording that come with the package."""

import math
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

import cebra_jax_metrics as cjm
from cebra_jax_metrics import demo
from cebra_jax_metrics.demo import make_demo

MAX_BYTES = 400_000


@pytest.fixture(scope="module")
def place_cells():
    return demo.load_demo()


def score(place_cells, position, **options):
    return cjm.goodness_of_fit_score(
        place_cells.checkpoint, place_cells.spikes, position, return_estimate=True, **options
    )


def test_files_are_small():
    files = [file for file in resources.files(demo).iterdir() if file.name.startswith("place_")]
    assert sorted(file.name for file in files) == ["place_cells.npz", "place_cells.pt"]
    assert sum(len(file.read_bytes()) for file in files) < MAX_BYTES


def test_contents(place_cells):
    assert place_cells.spikes.shape == (make_demo.NUM_STEPS, make_demo.NUM_NEURONS)
    assert place_cells.position.shape == (make_demo.NUM_STEPS, 3)
    assert place_cells.cebra_version == "0.6.1"
    assert place_cells.checkpoint.metadata["cebra_version"] == place_cells.cebra_version
    (encoder,) = place_cells.checkpoint.model.encoders
    assert (encoder.architecture, encoder.sizes) == ("offset10-model", (40, 32, 3))
    assert len(place_cells.checkpoint.history["total"]) == make_demo.MAX_ITERATIONS


def test_score_agrees_with_cebra(place_cells):
    estimate = score(place_cells, place_cells.position, num_batches=make_demo.NUM_BATCHES)
    combined = math.sqrt(2) * float(estimate.bits_stderr)  # CEBRA's score had as many batches
    assert 0 < combined < 0.005
    assert abs(float(estimate.bits) - place_cells.cebra_bits) < 4 * combined + 0.005


@pytest.mark.parametrize("shift", [demo.SHIFT, *make_demo.SHIFTS])
def test_shifted_labels_score_at_or_below_chance(place_cells, shift):
    shifted = np.roll(place_cells.position, shift, axis=0)
    estimate = score(place_cells, shifted, num_batches=make_demo.SHIFT_BATCHES)
    assert float(estimate.bits) <= 0


def test_the_recording_is_reproducible(place_cells):
    rng = np.random.default_rng(make_demo.SEED)
    spikes, position = make_demo.simulate(rng, make_demo.NUM_STEPS, make_demo.NUM_NEURONS)
    np.testing.assert_array_equal(spikes, place_cells.spikes, strict=True)
    np.testing.assert_array_equal(position, place_cells.position, strict=True)


def test_the_script_needs_neither_torch_nor_cebra():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "cebra"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy
from cebra_jax_metrics.demo import make_demo
print(make_demo.simulate(numpy.random.default_rng(0), 50, 2)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(50, 2)\n"


def test_description(place_cells):
    text = demo.describe_demo()
    assert f"{make_demo.NUM_STEPS} steps of 25 ms, {make_demo.NUM_NEURONS} place cells" in text
    assert f"shifted by {demo.SHIFT} steps" in text
    assert f"{place_cells.cebra_bits:.4f} bits" in text
