"""Draw the picture of README: ``python examples/picture.py [FILE]``."""

import sys
from pathlib import Path

import jax
from matplotlib.figure import Figure

import cebra_jax_metrics as cjm
from cebra_jax_metrics.demo import load_demo

FILE = Path(__file__).parent.parent / "docs" / "picture.png"


def draw(path: Path) -> None:
    """The embedding of a model that is trained here, its training, and its test on unseen rows."""
    demo = load_demo()
    X, position = demo.spikes, demo.position
    sampler = cjm.samplers.TimeDelta(position, time_offset=10)
    gap = cjm.required_gap(demo.checkpoint, sampler)
    rows, unseen = cjm.time_split(len(X), gap=gap)
    sizes = {"architecture": "offset10-model", "output_dimension": 3, "batch_size": 512}
    model = cjm.fit(
        jax.random.key(0),
        X,
        cjm.samplers.TimeDelta(position, 10, steps=rows),
        num_steps=1000,
        temperature=0.5,
        **sizes,
    )
    figure = Figure(figsize=(12, 3.8), dpi=130, layout="constrained")
    embedding = cjm.embed(model, X)
    ax = figure.add_subplot(1, 3, 1, projection="3d")
    where = {"colorbar_label": "position on the track (m)", "title": "What the model learned"}
    cjm.plot_embedding(embedding, position[:, 0], ax, markersize=2, **where)
    ax = figure.add_subplot(1, 3, 2)
    cjm.plot_goodness_of_fit(model, ax=ax).set_title("How well it fits, in training")
    ax = figure.add_subplot(1, 3, 3)
    test = cjm.goodness_of_fit_test(
        jax.random.key(0), model, X, sampler, held_out=unseen, batch_size=512, num_samples=200
    )
    cjm.plot_distribution(test, ax).set_title("On unseen rows, labels shifted in time")
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
