"""Write `draws.json`: draws and a loss by which versions of JAX are compared.

Run as `python -m tests.golden.make_draws`, with the oldest supported JAX, and only when the
library means to draw differently.
"""

import json
from pathlib import Path

import numpy as np

from cebra_jax_metrics import draw, estimate_infonce
from tests.test_estimation import KEY, MODEL, SAMPLER, SIZES, X
from tests.test_samplers import SAMPLERS

if __name__ == "__main__":
    result = {"loss": float(estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES).loss)}
    for kind, sampler in SAMPLERS.items():
        batch = draw(KEY, sampler, 5, 2)._asdict()
        result[kind] = {name: np.asarray(steps).tolist() for name, steps in batch.items()}
    Path(__file__).with_name("draws.json").write_text(json.dumps(result) + "\n")
