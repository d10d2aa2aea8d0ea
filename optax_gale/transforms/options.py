"""The options of the projection, checked as far as they can be without parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from optax_gale._averages import AxisName, checked_axis_name
from optax_gale.transforms import moments as moments_lib
from optax_gale.transforms import range_finders, refresh, selection
from optax_gale.transforms.matrices import MatrixView
from optax_gale.transforms.moments import Moments
from optax_gale.transforms.range_finders import RangeFinder, RangeFinderName
from optax_gale.transforms.refresh import RefreshSchedule
from optax_gale.transforms.residual import Residual
from optax_gale.transforms.selection import Select, Side


@dataclass(frozen=True)
class Options:
    """What `gale`, `gale_project` and the aliases have in common; documented at `gale`.

    ``shape_scale`` is for optimizers whose step depends on the shape of the whole matrix, which
    their inner does not see.
    """

    rank: Any = 128
    update_proj_gap: Any = 200
    scale: Any = 1.0
    side: Side = "short"
    range_finder: RangeFinderName | RangeFinder = "gale"
    moments: Moments = "rotate"
    residual: Residual = None
    refresh_schedule: RefreshSchedule = "together"
    select: Select = None
    weight_dimension_numbers: Any = None
    state_dtype: Any = None
    projector_dtype: Any = "float32"
    seed: Any = 0
    axis_name: AxisName = None
    shape_scale: Callable[[MatrixView], float] | None = None

    def __post_init__(self):
        """Raises ValueError or TypeError on a bad option."""
        if isinstance(self.rank, (int, float, str)) or self.rank is None:
            selection.check_rank(self.rank)
        if isinstance(self.update_proj_gap, (int, float, str)):
            refresh.check_gap(self.update_proj_gap)
        check_one_of("side", self.side, ("short", "long"))
        check_one_of("residual", self.residual, (None, "fira"))
        check_one_of("refresh_schedule", self.refresh_schedule, ("together", "staggered"))
        if isinstance(self.scale, str) or self.scale is None:
            check_scale(self.scale)
        check_seed(self.seed)
        object.__setattr__(self, "axis_name", checked_axis_name(self.axis_name))
        if self.axis_name is not None and self.residual is not None:
            raise ValueError(
                f"residual={self.residual!r} needs the whole gradient in every step, and with "
                f"axis_name={self.axis_name!r} only what is projected is averaged. Average the "
                "gradients yourself, without `axis_name`, or use residual=None."
            )
        moments_lib.check(self.moments)
        range_finders.resolve(self.range_finder)
        if self.state_dtype is not None:
            check_computing_dtype("state_dtype", self.state_dtype, ("int8",))
        _check_dtype("projector_dtype", self.projector_dtype, ("int8", "int4"))

    @property
    def quantizes_states(self) -> bool:
        """Whether the inner's moments are kept in 8 bits."""
        return self.state_dtype is not None and jnp.dtype(self.state_dtype).name == "int8"

    @property
    def inner_dtype(self) -> Any:
        """The dtype in which the inner runs; None for the parameters'."""
        return jnp.float32 if self.quantizes_states else self.state_dtype

    @property
    def projector_code(self) -> Literal["int8", "int4"] | None:
        """In which code projectors are kept; None if in a floating type."""
        name = jnp.dtype(self.projector_dtype).name
        return cast(Any, name) if name in ("int8", "int4") else None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> "Options":
        """Picks the options out of a function's arguments."""
        names = {option.name for option in fields(cls)}
        return cls(**{k: v for k, v in arguments.items() if k in names}, **others)

    def key(self) -> jax.Array:
        """The key that every random choice derives from."""
        return jax.random.key(self.seed, impl="threefry2x32")


def check_seed(seed: Any) -> None:
    """Raises TypeError unless ``seed`` is an integer (or traced)."""
    if not _is_integer(seed):
        raise TypeError(f"`seed` must be an int, got {seed!r}.")


def check_scale(scale: Any, where: str = "") -> None:
    """Raises TypeError unless ``scale`` is a number (or traced)."""
    if isinstance(scale, str) or np.ndim(scale) or not hasattr(scale, "__mul__"):
        raise TypeError(f"`scale`{where} must be a number, got {scale!r}.")


def _is_integer(x: Any) -> bool:
    if isinstance(x, (jax.Array, np.ndarray)):
        return bool(jnp.issubdtype(x.dtype, jnp.integer)) and not x.ndim
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def check_computing_dtype(name: str, dtype: Any, integers: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless a dtype is one to compute in, or one of a few integer ones."""
    _check_dtype(name, dtype, integers)
    if jnp.dtype(dtype).name not in integers and jnp.dtype(dtype).itemsize < 2:
        remedy = " 'int8' keeps moments in 8 bits." if "int8" in integers else ""
        raise ValueError(
            f"`{name}` must be a floating type of 16 bits or more, got {jnp.dtype(dtype).name}: "
            f"smaller ones are for storage, and neither sum nor mix with others.{remedy}"
        )


def _check_dtype(name: str, dtype: Any, integers: tuple[str, ...]) -> None:
    """Raises ValueError unless a dtype is a floating type or one of a few integer ones."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not (found.name in integers or jnp.issubdtype(found, jnp.floating)):
        allowed = " or ".join(
            ["a floating type ('float32', 'bfloat16', ...)", *map(repr, integers)]
        )
        raise ValueError(f"`{name}` must be {allowed}, got {dtype!r}.")


def check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError unless an option has one of its values."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
