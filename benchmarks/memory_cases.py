"""The trainings of `benchmarks.training_memory`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Options = Mapping[str, Any]
RunName = Literal["limited", "free"]

PEAK_STEPS = 4  # one that refreshes, and some that do not


@dataclasses.dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
      options: the example's.
      steps: of the training.
      needs: GiB without which it is not tried.
      limit: GiB in which it must finish; None for no limit.
      measures_peak: whether a limited case runs again without the limit, for its peak.
      seconds: after which a run is given up.
    """

    options: Options
    steps: int
    needs: float
    limit: float | None = None
    measures_peak: bool = False
    seconds: int = 400

    @property
    def runs(self) -> tuple[RunName, ...]:
        """The runs that it takes."""
        if self.limit is None:
            return ("free",)
        return ("limited", "free") if self.measures_peak else ("limited",)


_GALE: Options = {"optimizer": "gale_adamw", "update-proj-gap": 25, "learning-rate": 0.002}
_BF16: Options = {
    "param-dtype": "bfloat16",
    "attention-backend": "cudnn",
    "loss-chunks": 8,
    "sequence-length": 256,
    "batch-size": 16,
    "validation-limit": 64,
}
# The last step's norm costs neither time nor memory, and two programs have no conditional.
_LAYERS: Options = {"layerwise": True, "layerwise-clip": "previous", "host-refresh": True}
_7B: Options = {"size": "7b", **_GALE, **_BF16}
_8BIT: Options = {"state-dtype": "int8", "projector-dtype": "int8"}
_SPEED: Options = {**_7B, "rank": 128, "host-refresh": True, "update-proj-gap": 200}
_60M: Options = {
    "size": "60m",
    "optimizer": "gale_adamw",
    "learning-rate": 0.01,
    "rank": 128,
    "batch-size": 128,
    "attention-backend": "cudnn",
    "loss-chunks": 4,
    "host-refresh": True,
    "log-every": 100,
}

BIG = "7b, r = 1024, 8-bit states"
BIG_4 = "7b, r = 1024, 8-bit states, 4-bit projectors"
LONG = "7b, r = 128, bf16 states, 1 × 2048"
SMALL = "7b, r = 128, 8-bit states, 4-bit projectors, 1 × 256"
SMALLEST = "7b, 8-bit weights, r = 128, 8-bit states, 4-bit projectors, 1 × 256"
THIRTEEN = "13b, r = 256, 8-bit states"
ADAMW = "7b, AdamW, bf16 states"
LAYERS_SPEED = "7b, r = 128, layer by layer"
KEPT_SPEED = "7b, r = 128, layer by layer, activations kept"
REMAT_SPEED = "7b, r = 128, ordinary, layers recomputed"
WHOLE_SPEED = "7b, r = 128, ordinary"
SMALL_MODEL = "60m, float32 states"
SMALL_MODEL_8 = "60m, 8-bit states"
SMALL_MODEL_LAYERS = "60m, float32 states, layer by layer"

# What matters most comes first.
CASES: dict[str, Case] = {
    BIG: Case({**_7B, **_LAYERS, **_8BIT, "rank": 1024}, 50, 24, limit=24, measures_peak=True),
    LONG: Case(
        {
            **{**_7B, **_LAYERS, "rank": 128, "batch-size": 1, "sequence-length": 2048},
            **{"state-dtype": "bfloat16", "projector-dtype": "bfloat16"},
        },
        8,
        needs=17,
    ),
    SMALL: Case(
        {
            **{**_7B, **_LAYERS, "rank": 128, "batch-size": 1},
            **{"state-dtype": "int8", "projector-dtype": "int4"},
        },
        8,
        needs=15,
    ),
    SMALLEST: Case(
        {
            **{**_7B, **_LAYERS, "rank": 128, "batch-size": 1, "param-dtype": "int8"},
            **{"state-dtype": "int8", "projector-dtype": "int4"},
        },
        8,
        needs=12,
    ),
    THIRTEEN: Case(
        {
            **_7B,
            **_LAYERS,
            **_8BIT,
            "size": "13b",
            "rank": 256,
            "batch-size": 8,
            "learning-rate": 5e-4,
        },
        20,
        32,
        limit=32,
    ),
    # Of steps that do not refresh: the first does, and is not timed.
    LAYERS_SPEED: Case({**_SPEED, **_LAYERS}, 27, needs=24),
    KEPT_SPEED: Case({**_SPEED, **_LAYERS, "layerwise-activations": "keep"}, 27, needs=60),
    REMAT_SPEED: Case({**_SPEED, "remat": True}, 27, needs=45),
    ADAMW: Case(
        {
            **{"size": "7b", "optimizer": "adamw", "learning-rate": 2e-4, **_BF16},
            **{"layerwise": True, "layerwise-clip": "previous"},
        },
        PEAK_STEPS,
        needs=48,
    ),
    BIG_4: Case(
        {**_7B, **_LAYERS, **_8BIT, "projector-dtype": "int4", "rank": 1024}, PEAK_STEPS, needs=24
    ),
    WHOLE_SPEED: Case(_SPEED, 27, needs=72),
    SMALL_MODEL: Case(_60M, 2000, needs=24, seconds=580),
    SMALL_MODEL_8: Case({**_60M, **_8BIT}, 2000, needs=24, seconds=580),
    SMALL_MODEL_LAYERS: Case({**_60M, "layerwise": True}, 2000, needs=24, seconds=580),
}
