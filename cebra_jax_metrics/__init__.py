"""CEBRA's metrics in JAX: InfoNCE, goodness of fit and consistency; fast, with error bars."""

from cebra_jax_metrics import samplers
from cebra_jax_metrics.alignment import align_embeddings
from cebra_jax_metrics.checkpoints import (
    CheckpointError,
    from_cebra,
    from_state_dict,
    load,
    save,
    to_state_dict,
)
from cebra_jax_metrics.consistency import NullTest, consistency_matrix, shifted_consistency
from cebra_jax_metrics.encoders import Encoder, architecture_names, register_architecture
from cebra_jax_metrics.estimation import Estimate, estimate_infonce
from cebra_jax_metrics.evaluation import evaluate
from cebra_jax_metrics.infonce import (
    InfoNCE,
    chance_level,
    dot_similarity,
    euclidean_similarity,
    goodness_of_fit,
    infonce,
)
from cebra_jax_metrics.metrics import (
    Consistency,
    ConsistencyTest,
    bootstrap_consistency,
    consistency_score,
    consistency_test,
    goodness_of_fit_history,
    goodness_of_fit_score,
    infonce_loss,
    infonce_to_goodness_of_fit,
    multisession_infonce_loss,
)
from cebra_jax_metrics.model import Checkpoint, Criterion, Model, embed
from cebra_jax_metrics.nulls import GoodnessOfFitTest, goodness_of_fit_test
from cebra_jax_metrics.plotting import (
    compare_models,
    plot_consistency,
    plot_distribution,
    plot_embedding,
    plot_goodness_of_fit,
    plot_loss,
    plot_temperature,
)
from cebra_jax_metrics.samplers.drawing import draw
from cebra_jax_metrics.sharding import spread
from cebra_jax_metrics.training import TrainingError, TrainingState, fit
from cebra_jax_metrics.uncertainty import (
    Bootstrap,
    Comparison,
    bootstrap_goodness_of_fit,
    compare_goodness_of_fit,
    optimal_block_length,
    required_gap,
    time_folds,
    time_split,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (grouped as in README)
    # for CEBRA users
    "infonce_loss",
    "goodness_of_fit_score",
    "goodness_of_fit_history",
    "infonce_to_goodness_of_fit",
    "multisession_infonce_loss",
    "Consistency",
    "consistency_score",
    "align_embeddings",
    # pictures
    "plot_consistency",
    "plot_loss",
    "plot_temperature",
    "plot_goodness_of_fit",
    "plot_embedding",
    "compare_models",
    "plot_distribution",
    # arrays and pytrees
    "InfoNCE",
    "infonce",
    "dot_similarity",
    "euclidean_similarity",
    "chance_level",
    "goodness_of_fit",
    "consistency_matrix",
    "shifted_consistency",
    "Estimate",
    "draw",
    "evaluate",
    "estimate_infonce",
    # training
    "fit",
    "TrainingState",
    "TrainingError",
    # uncertainty and inference
    "goodness_of_fit_test",
    "GoodnessOfFitTest",
    "consistency_test",
    "ConsistencyTest",
    "NullTest",
    "bootstrap_goodness_of_fit",
    "bootstrap_consistency",
    "Bootstrap",
    "optimal_block_length",
    "compare_goodness_of_fit",
    "Comparison",
    "time_split",
    "time_folds",
    "required_gap",
    # models
    "Model",
    "Encoder",
    "Criterion",
    "embed",
    "Checkpoint",
    "CheckpointError",
    "load",
    "save",
    "from_cebra",
    "from_state_dict",
    "to_state_dict",
    "architecture_names",
    "register_architecture",
    # many devices
    "spread",
    # sampling
    "samplers",
]
