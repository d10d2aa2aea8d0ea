"""Everything that the command line can set.

The classes are plain data: nothing here imports JAX, so that ``--help`` and mistyped options
answer at once. Each class is one group of options in the help.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.flax_llama.data import DataConfig
from examples.flax_llama.errors import UserError, flag
from examples.flax_llama.sizes import SIZES, LlamaSize, get_size

FloatName = Literal["float32", "bfloat16"]
ClipName = Literal["hold", "two_pass", "previous"]
ActivationsName = Literal["recompute", "keep"]

MESH_AXES = ("data", "fsdp", "tensor")

_MOST_DIFFERENCES = 3  # an error is one line
_PICTURES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model and the precision it runs in."""

    size: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SIZES) + "}")] = "tiny"
    """Model size."""
    kv_heads: int | None = None
    """Heads of the keys and values, each shared by equally many heads of the queries (grouped-query
    attention). By default as many as those."""
    dtype: FloatName = "bfloat16"
    """Precision of the forward and backward pass."""
    param_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of the weights and gradients. int8: the layers' matrices in 8 bits, rounded at
    random; gradients and all other weights in bfloat16. Needs --layerwise."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    attention_backend: Literal["xla", "cudnn"] = "xla"
    """cudnn: the fused kernel of NVIDIA GPUs (bfloat16 only)."""
    loss_chunks: int = 1
    """Compute the logits in so many pieces, one at a time: less memory, more time."""

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        if self.size not in SIZES:
            raise UserError(f"--size must be one of {', '.join(SIZES)}, got '{self.size}'")
        heads = SIZES[self.size].heads
        if self.kv_heads is not None and (self.kv_heads < 1 or heads % self.kv_heads):
            raise UserError(
                f"--kv-heads must divide the {heads} heads of {self.size}, got {self.kv_heads}"
            )
        _positive("--loss-chunks", self.loss_chunks)
        if self.attention_backend == "cudnn" and self.dtype != "bfloat16":
            raise UserError("--attention-backend cudnn needs --dtype bfloat16")

    @property
    def in_8_bits(self) -> bool:
        """Whether the layers' matrices are kept in 8 bits."""
        return self.param_dtype == "int8"

    @property
    def float_dtype(self) -> FloatName:
        """Precision of weights where they are used."""
        return "bfloat16" if self.param_dtype == "int8" else self.param_dtype

    def shape(self) -> LlamaSize:
        """The model's shape, with the vocabulary that the size has by itself."""
        size = get_size(self.size)
        return size if self.kv_heads is None else dataclasses.replace(size, kv_heads=self.kv_heads)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer's settings; "None" stands for the optimizer's own default.

    An option that the chosen optimizer does not have is refused.
    """

    learning_rate: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Decoupled weight decay, of everything but the norms."""
    b1: float | None = None
    """Adam, Lion: decay of the first moment."""
    b2: float | None = None
    """Adam, Lion: decay of the second moment."""
    eps: float | None = None
    """Adam: added to the root of the second moment."""
    eps_root: float | None = None
    """Adam: added under the root of the second moment."""
    nesterov: bool | None = None
    """Look one step ahead along the momentum."""
    momentum: float | None = None
    """SGD, Adafactor: decay of the momentum."""
    beta: float | None = None
    """Muon: decay of the momentum."""
    ns_steps: int | None = None
    """Muon: Newton-Schulz iterations."""
    adam_learning_rate: float | None = None
    """Muon: peak learning rate of the embeddings, the head and the norms, which Adam trains."""
    adam_b1: float | None = None
    """Muon: that Adam's decay of the first moment."""
    adam_b2: float | None = None
    """Muon: that Adam's decay of the second moment."""
    adam_eps: float | None = None
    """Muon: that Adam's epsilon."""
    decay_rate: float | None = None
    """Adafactor: exponent of the second moment's decay."""
    min_dim_size_to_factor: int | None = None
    """Adafactor: shortest side of a matrix whose second moments are factored."""
    clipping_threshold: float | None = None
    """Adafactor: root mean square at which an update is clipped."""
    mu_dtype: FloatName | None = None
    """Precision of the first moment."""
    accumulator_dtype: FloatName | None = None
    """SGD: precision of the momentum."""

    rank: int | None = None
    """Columns of a projector. By default a quarter of the model's width."""
    update_proj_gap: int | None = None
    """Steps from one refresh of the projectors to the next. By default 200, or a quarter of the
    training if that is less."""
    scale: float | None = None
    """GaLore's alpha: factor on the update of projected weights."""
    side: Literal["short", "long"] | None = None
    """Which side of a matrix is projected. By default the shorter one; the longer one in models no
    wider than tiny."""
    range_finder: Literal["gale", "gale_approx", "warm", "svd", "random"] | None = None
    """How a gradient becomes a projector."""
    oversampling: int | None = None
    """Sketch: extra columns."""
    power_iterations: int | None = None
    """Sketch: steps of subspace iteration."""
    sketch: Literal["gaussian", "rademacher"] | None = None
    """Sketch: distribution of the random matrix."""
    sample_fraction: float | None = None
    """Sketch: share of the gradient that it reads."""
    warm_start: bool | None = None
    """Sketch: start from the projector in use."""
    align: bool | None = None
    """Sketch: turn the basis of a subspace towards the singular vectors."""
    moments: Literal["keep", "rotate", "reset"] | None = None
    """What a refresh does to the moments."""
    residual: Literal["none", "fira"] | None = None
    """What becomes of the gradient outside the subspace."""
    refresh_schedule: Literal["together", "staggered"] | None = None
    """Refresh all projectors in one step, or spread them over the gap."""
    select: str | None = None
    """Regular expression on the parameters' paths: which weights are projected."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Precision in which the optimizer runs in the subspace; int8: it runs in float32 and keeps its
    moments in 8 bits."""
    projector_dtype: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Precision of the projectors."""
    projection_seed: int | None = None
    """Seed of the sketches."""

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How long, how much at a time, and how the learning rate moves."""

    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences a step."""
    warmup_fraction: float = 0.1
    """Share of the steps during which the learning rate rises."""
    final_lr_fraction: float = 0.1
    """Where the cosine ends, as a share of the peak learning rate."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped, before any projection; 0 turns it off."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"
    """How new bfloat16 weights are rounded: to nearest, at random, or with what rounding takes kept
    beside them in as much memory as the weights."""
    micro_batches: int = 1
    """Parts of a batch, computed one after another. Low-rank optimizers sum their gradients in the
    subspace; each part is clipped by itself."""
    layerwise: bool = False
    """Let each layer take its step in the backward pass, so that there never is a gradient of the
    whole model."""
    layerwise_clip: ClipName = "hold"
    """With --layerwise, how the norm to clip by is known in time. hold: gradients wait in the
    subspace; two_pass: another backward pass before; previous: the last step's norm is taken."""
    layerwise_activations: ActivationsName = "recompute"
    """With --layerwise, what the backward pass reads of a layer. recompute: its input, from which
    all else is computed again; keep: all that its derivative needs: more memory, less time."""
    average: Literal["gradients", "projections"] = "gradients"
    """What devices along data average. projections: low-rank optimizers project before they
    average, and send that much less; each device's part of a batch is clipped by itself."""
    host_refresh: bool = False
    """Let the host choose the steps that refresh: two executables, no conditional in either."""

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        _positive("--steps", self.steps)
        if self.steps >= 2**31:
            raise UserError(f"--steps must be less than 2**31, got {self.steps}")
        _positive("--batch-size", self.batch_size)
        _positive("--micro-batches", self.micro_batches)
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"--micro-batches {self.micro_batches} must divide --batch-size {self.batch_size}"
            )
        if self.layerwise_clip != "hold" and not self.layerwise:
            raise UserError("--layerwise-clip is for --layerwise True; add that, or leave it out")
        if self.layerwise_activations != "recompute" and not self.layerwise:
            raise UserError("--layerwise-activations is for --layerwise True; see also --remat")
        _within("--warmup-fraction", self.warmup_fraction, 0.0, 1.0)
        _within("--final-lr-fraction", self.final_lr_fraction, 0.0, 1.0)
        if not (math.isfinite(self.clip_norm) and self.clip_norm >= 0):
            raise UserError(f"--clip-norm must be 0 (off) or more, got {self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Which devices train, and how they share the work.

    Nothing here changes a run's numbers by more than rounding, but with --average projections: it
    may go on with another mesh and another number of processes.
    """

    mesh: str | None = None
    """Devices along each axis, such as data=2,fsdp=4,tensor=1. Devices along data hold the same
    weights; along fsdp they share weights and optimizer state, and gather a layer when they need
    it; along tensor they share the work on every matrix. An axis that is left out has one. By
    default a single device, or, with several processes, data=ALL."""
    coordinator: str | None = None
    """Train in several processes: HOST:PORT of the first one, or auto where a cluster tells it
    (SLURM, Open MPI, Kubernetes)."""
    processes: int | None = None
    """Number of processes. With --coordinator auto the cluster tells it."""
    process_id: int | None = None
    """Number of this process, from 0. With --coordinator auto the cluster tells it."""
    lost_after: int = 60
    """Seconds without a sign of life after which a process counts as lost, and the others end."""

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        self.axes()
        _positive("--lost-after", self.lost_after)
        numbers = {"--processes": self.processes, "--process-id": self.process_id}
        if self.coordinator is None or self.coordinator == "auto":
            for name, value in numbers.items():
                if value is not None:
                    raise UserError(f"{name} goes with --coordinator HOST:PORT; add that")
            return
        for name, value in numbers.items():
            if value is None:
                raise UserError(f"--coordinator {self.coordinator} needs {name}")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator must be HOST:PORT or auto, got '{self.coordinator}'")
        _positive("--processes", self.processes or 0)
        if not 0 <= (self.process_id or 0) < (self.processes or 0):
            raise UserError(
                f"--process-id must be 0 to {(self.processes or 0) - 1}, got {self.process_id}"
            )

    def axes(self) -> dict[str, int] | None:
        """Devices along every axis of the mesh; None where no mesh is asked for."""
        if self.mesh is None:
            return None
        sizes = dict.fromkeys(MESH_AXES, 1)
        given = set[str]()
        for part in self.mesh.split(","):
            axis, _, number = (word.strip() for word in part.partition("="))
            if axis not in sizes or axis in given or not number.isdecimal() or not int(number):
                raise UserError(
                    f"--mesh must read like data=2,fsdp=4,tensor=1, each axis at most once, got "
                    f"'{self.mesh}'"
                )
            given.add(axis)
            sizes[axis] = int(number)
        return sizes


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is written, and how often."""

    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always is one. 0: no checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep."""
    eval_every: int = 50
    """Steps between validations; the last step always is one. 0: only the last."""
    log_every: int = 10
    """Steps between reports. Losses of single steps are kept whatever this is."""
    tensorboard: bool = True
    """Write TensorBoard events beside the JSON lines."""
    progress: bool = True
    """Show a progress bar where there is a terminal."""

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        _positive("--keep-checkpoints", self.keep_checkpoints)
        _positive("--log-every", self.log_every)
        for name in ("checkpoint_every", "eval_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag(name)} must be 0 or more, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train one model with one optimizer.

    Started again with the same options it goes on from the last checkpoint.
    """

    optimizer: str = "gale_adamw"
    """Which optimizer; they are listed below with their defaults."""
    out: Path | None = None
    """Folder of the run. Default: runs/SIZE-OPTIMIZER."""
    overwrite: bool = False
    """Delete what ``--out`` holds and start from step 0."""
    optimization: OptimizerOptions = OptimizerOptions()
    training: TrainingOptions = TrainingOptions()
    model: ModelOptions = ModelOptions()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    devices: DeviceOptions = DeviceOptions()
    output: OutputOptions = OutputOptions()

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.out or Path("runs") / f"{self.model.size}-{self.optimizer}"

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        self.devices.check()
        axes = self.devices.axes() or {}
        if (
            self.training.average == "projections"
            and axes.get("fsdp", 1) * axes.get("tensor", 1) > 1
        ):
            raise UserError("--average projections is for a --mesh of data alone")
        _check_run(self)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Train the same model on the same tokens with several optimizers.

    Every arm starts from the same weights. Results are stored after every run, and runs that are
    stored are not repeated.
    """

    optimizers: str = ""
    """Optimizers to compare, separated by commas: one arm each, with the options given below."""
    arm: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An arm with options of its own, for example "name=fira optimizer=gale_adamw residual=fira
    lr=5e-3,1e-2". Several learning rates make one run each, and the best one counts. May be given
    several times."""
    out: Path = Path("runs/compare")
    """Folder of the comparison."""
    optimization: OptimizerOptions = OptimizerOptions()
    training: TrainingOptions = TrainingOptions()
    model: ModelOptions = ModelOptions()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    output: OutputOptions = OutputOptions(checkpoint_every=0)

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        _check_run(self)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Print where the memory would go: nothing is allocated.

    From shapes alone, or, with --batch-size, from the training step's compiled program.
    """

    optimizers: str = "adamw,galore,gale_adamw"
    """Optimizers to tabulate, separated by commas."""
    details: bool = False
    """Also print what the optimizer does with each weight, and why."""
    batch_size: int | None = None
    """Compile the training step of so many sequences, and tell the memory of all that it needs:
    activations and work space too."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    micro_batches: int = 1
    """With --batch-size: parts of a batch, computed one after another."""
    layerwise: bool = False
    """With --batch-size: let each layer take its step in the backward pass."""
    clip_norm: float = TrainingOptions.clip_norm
    """With --batch-size: norm to which gradients are clipped; 0: not at all."""
    layerwise_clip: ClipName = TrainingOptions.layerwise_clip
    """With --layerwise: how the norm is known in time."""
    layerwise_activations: ActivationsName = TrainingOptions.layerwise_activations
    """With --layerwise: what the backward pass reads of a layer."""
    budget: str | None = None
    """Memory of the device, such as 24GiB or 24GB: tell whether the step fits, and the largest
    batch that does."""
    picture: Path | None = None
    """Also draw the step's memory to this file (.png, .svg or .pdf)."""
    optimization: OptimizerOptions = OptimizerOptions()
    model: ModelOptions = ModelOptions(param_dtype="bfloat16")

    def check(self) -> None:
        """Raises `UserError` at the first value that makes no sense."""
        self.model.check()
        if self.batch_size is None:
            for name in ("budget", "picture"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} is about the whole step: add --batch-size")
            return
        self.training().check()
        check_in_8_bits(self.model, self.training())
        _positive("--sequence-length", self.sequence_length)
        _check_length(self.model, self.sequence_length)
        if self.picture is not None and self.picture.suffix not in _PICTURES:
            raise UserError(f"--picture must end in {', '.join(_PICTURES)}, got {self.picture}")

    def training(self, batch_size: int | None = None) -> TrainingOptions:
        """What of a training's options matters to its memory."""
        size = self.batch_size if batch_size is None else batch_size
        return TrainingOptions(
            batch_size=TrainingOptions.batch_size if size is None else size,
            micro_batches=self.micro_batches,
            layerwise=self.layerwise,
            clip_norm=self.clip_norm,
            layerwise_clip=self.layerwise_clip,
            layerwise_activations=self.layerwise_activations,
        )


def check_in_8_bits(model: ModelOptions, training: TrainingOptions) -> None:
    """Raises `UserError` if weights in 8 bits would have to be there in full."""
    if model.in_8_bits and not training.layerwise:
        raise UserError("--param-dtype int8 reads weights layer by layer: add --layerwise True")


def _check_run(config: TrainConfig | CompareConfig) -> None:
    config.model.check()
    config.training.check()
    config.output.check()
    check_in_8_bits(config.model, config.training)
    if config.training.rounding != "nearest" and config.model.param_dtype == "float32":
        raise UserError("--rounding is for weights in half precision: add --param-dtype bfloat16")
    _check_length(config.model, config.data.sequence_length)


def _check_length(model: ModelOptions, length: int) -> None:
    longest = SIZES[model.size].max_length
    if length > longest:
        raise UserError(f"--sequence-length must be at most {longest}, got {length}")
    if length % model.loss_chunks:
        raise UserError(f"--loss-chunks {model.loss_chunks} must divide --sequence-length {length}")


def _positive(name: str, value: int) -> None:
    if value <= 0:
        raise UserError(f"{name} must be at least 1, got {value}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also catches NaN
        raise UserError(f"{name} must be between {low:g} and {high:g}, got {value}")


def check_same_run(stored: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuses to go on in the folder of another run, or to replace it.

    Args:
      stored: what holds the other settings.
      here: this run's settings.
      there: the other settings.

    Raises:
      UserError: if they differ; the first differences are named.
    """
    found = differences(here, there)
    if found:
        shown = "; ".join(found[:_MOST_DIFFERENCES])
        more = len(found) - _MOST_DIFFERENCES
        raise UserError(
            f"{stored} is of another run: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Choose another --out, or start over with --overwrite True"
        )


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Names every entry in which two flat mappings differ, with both values."""
    keys = [*here, *(key for key in there if key not in here)]
    return [
        f"{key} is {_shown(here.get(key))} here and {_shown(there.get(key))} there"
        for key in keys
        if here.get(key) != there.get(key)
    ]


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
