"""The definition."""

import numpy as np


def back_project_apply(weights, projectors, updates, scales, decays, *, rows):
    """See `optax_gale.pallas.back_project_apply`; in float64, on NumPy arrays."""
    out = []
    for w, p, u, scale, decay in zip(weights, projectors, updates, scales, decays, strict=True):
        w, p, u = (np.asarray(x, np.float64) for x in (w, p, u))
        step = p @ u if rows else u @ np.swapaxes(p, -2, -1)
        out.append(w + float(decay) * w + float(scale) * step)
    return out
