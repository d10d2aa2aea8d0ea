"""The definition, in float64."""

import numpy as np


def cholesky_and_inverse(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `optax_gale.pallas.cholesky_and_inverse`."""
    lower = np.linalg.cholesky(a.astype(np.float64))
    return lower, np.linalg.inv(lower)
