"""Matrices whose singular values are known."""

import numpy as np

RANK = 10


def decays(size: int) -> dict[str, np.ndarray]:
    """Spectra of the kinds that the literature tests on, the largest singular value 1."""
    j = np.arange(size)
    return {
        "fast": 2.0**-j,
        "slow": 1.0 / (1 + 0.1 * j),
        "power law": (1.0 + j) ** -2,
        "step": np.where(j < RANK, 1.0, 1e-3),
    }


def with_spectrum(singular_values: np.ndarray, m: int, n: int, seed: int = 0) -> np.ndarray:
    """Returns a float64 ``(m, n)`` matrix with these singular values and random vectors."""
    rng = np.random.default_rng(seed)
    size = len(singular_values)
    u = np.linalg.qr(rng.standard_normal((m, size)))[0]
    v = np.linalg.qr(rng.standard_normal((n, size)))[0]
    return (u * singular_values) @ v.T


def orthogonality_error(q) -> np.ndarray:
    """Returns the largest entry of ``|QᵀQ - I|`` of each matrix, in float64."""
    q = np.asarray(q, np.float64)
    gram = np.swapaxes(q, -1, -2) @ q
    return np.abs(gram - np.eye(q.shape[-1])).max(axis=(-2, -1))


def sine(p, q) -> float:
    """Returns the sine of the largest angle between the range of ``q`` and that of ``p``."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    p, q = np.linalg.qr(p)[0], np.linalg.qr(q)[0]
    return float(np.linalg.norm(q - p @ (p.T @ q), 2))
