"""CEBRA's encoders as pure functions over dictionaries of parameters."""

from cebra_jax_metrics.encoders.architectures import (
    architecture_names,
    get_architecture,
    register_architecture,
)
from cebra_jax_metrics.encoders.encoder import Encoder

__all__ = ["Encoder", "architecture_names", "get_architecture", "register_architecture"]
