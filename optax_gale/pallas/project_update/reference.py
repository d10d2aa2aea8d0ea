"""The definition."""

import numpy as np


def project_update(gradients, projectors, moments, scalars, inner, *, rows):
    """See `optax_gale.pallas.project_update`; ``inner`` computes with NumPy, in float64."""
    updates, new = [], []
    for g, p, old, numbers in zip(gradients, projectors, moments, scalars, strict=True):
        g, p, *old = (np.asarray(x, np.float64) for x in (g, p, *old))
        r = np.swapaxes(p, -2, -1) @ g if rows else g @ p
        u, *changed = inner(r, *old, *(float(x) for x in numbers))
        updates.append(u)
        new.append(tuple(changed))
    return updates, new
