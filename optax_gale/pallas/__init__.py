"""GPU kernels for what a step and a refresh spend their time on, and XLA's form of each.

A step takes two passes over weights and gradients; a refresh factors small matrices.

A folder a kernel: ``reference.py`` defines it in a few lines, the other modules are backends with
the same signature. The package knows arrays only, nothing of optimizers.
"""

from optax_gale.pallas.back_project_apply import back_project_apply
from optax_gale.pallas.back_project_apply.xla import back_project
from optax_gale.pallas.cholesky_and_inverse import cholesky_and_inverse
from optax_gale.pallas.dispatch import Implementation, UnsupportedError, check_implementation
from optax_gale.pallas.elementwise import Elementwise
from optax_gale.pallas.project_update import choose as choose_project_update
from optax_gale.pallas.project_update import project_update
from optax_gale.pallas.project_update.xla import project

__all__ = [
    "Elementwise",
    "Implementation",
    "UnsupportedError",
    "back_project",
    "back_project_apply",
    "check_implementation",
    "cholesky_and_inverse",
    "choose_project_update",
    "project",
    "project_update",
]
