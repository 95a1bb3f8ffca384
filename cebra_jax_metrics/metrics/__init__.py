"""The functions of ``cebra.sklearn.metrics``, with their signatures."""

from cebra_jax_metrics.metrics.consistency import (
    NULL_QUANTILES,
    Consistency,
    ConsistencyTest,
    bootstrap_consistency,
    consistency_score,
    consistency_test,
)
from cebra_jax_metrics.metrics.scores import (
    goodness_of_fit_history,
    goodness_of_fit_score,
    infonce_loss,
    infonce_to_goodness_of_fit,
    multisession_infonce_loss,
    score,
)
from cebra_jax_metrics.metrics.settings import as_checkpoint, sampler_for

__all__ = [
    "NULL_QUANTILES",
    "Consistency",
    "ConsistencyTest",
    "as_checkpoint",
    "bootstrap_consistency",
    "consistency_score",
    "consistency_test",
    "goodness_of_fit_history",
    "goodness_of_fit_score",
    "infonce_loss",
    "infonce_to_goodness_of_fit",
    "multisession_infonce_loss",
    "sampler_for",
    "score",
]
