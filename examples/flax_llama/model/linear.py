"""The one kind of weight matrix that the model has."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

INIT = nn.initializers.normal(0.02)
"""Every matrix starts as N(0, 0.02²), as LLaMA pretraining codes do."""


def linear(features: int, dtype: DTypeLike, param_dtype: DTypeLike) -> nn.Dense:
    """A matrix without bias: ``x (..., in) -> x @ kernel (in, features)``."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        kernel_init=INIT,
    )
