"""Write `draws.json`: draws and a loss by which versions of JAX are compared.

Run as `python -m tests.golden.make_draws`, with the oldest supported JAX, and only when the
library means to draw differently.
"""

import json
from pathlib import Path

import numpy as np

from cebra_jax_metrics import draw, estimate_infonce
from tests.test_estimation import KEY, MODEL, SAMPLER, SIZES, X

if __name__ == "__main__":
    batch = draw(KEY, SAMPLER, 5, 2)._asdict()
    result = {name: np.asarray(steps).tolist() for name, steps in batch.items()}
    result["loss"] = float(estimate_infonce(KEY, MODEL, X, SAMPLER, **SIZES).loss)
    Path(__file__).with_name("draws.json").write_text(json.dumps(result) + "\n")
