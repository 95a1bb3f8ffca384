"""The package as installed without any extra: the demo works, optional parts name their extra.

Run by .ci/run outside of the checkout, with the Python of an environment that has no more than the
run-time dependencies.
"""

import sys
from importlib.util import find_spec

import jax
import numpy as np

import cebra_jax_metrics as cjm
from cebra_jax_metrics.demo import describe_demo

OPTIONAL = ("optax", "matplotlib", "torch", "cebra", "pytest", "nbclient")


def refusal(function, *arguments, **options):
    """What the ImportError says that has to come."""
    try:
        function(*arguments, **options)
    except ImportError as error:
        return str(error)
    sys.exit(f"{function.__name__} raised no ImportError without its extra")


def main():
    """End with an error at the first thing that is not so."""
    installed = [name for name in OPTIONAL if find_spec(name)]
    if installed:
        sys.exit(f"not an environment without extras, it has {', '.join(installed)}")
    missing = [name for name in cjm.__all__ if not hasattr(cjm, name)]
    if missing:
        sys.exit(f"names of __all__ that do not exist: {', '.join(missing)}")
    if "Goodness of fit" not in describe_demo():
        sys.exit("the demo does not say what it should")

    if "site-packages" not in cjm.__file__:
        sys.exit(f"not the installed package but {cjm.__file__}")

    X = np.random.default_rng(0).normal(size=(100, 2))
    runs = cjm.consistency_score([X, X + 1], between="runs")
    sampler = cjm.samplers.Time(len(X))
    settings = {"architecture": "offset1-model", "batch_size": 8, "num_steps": 1}
    for extra, message in (
        ("plot", refusal(cjm.plot_consistency, *runs)),
        ("plot", refusal(cjm.plot_embedding, X)),
        ("fit", refusal(cjm.fit, jax.random.key(0), X, sampler, **settings)),
    ):
        if f"pip install 'cebra-jax-metrics[{extra}]'" not in message:
            sys.exit(f"this does not say how to get [{extra}]: {message}")
    print(f"{cjm.__file__}: works without extras; what needs one names it")


if __name__ == "__main__":
    main()
