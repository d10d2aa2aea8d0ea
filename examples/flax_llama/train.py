"""One training run, from options to results."""

import dataclasses
import fcntl
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

import optax_gale
from examples.flax_llama import data, memory, optimizers, plots, processes, step_memory
from examples.flax_llama.checkpoint import Checkpoints, Progress
from examples.flax_llama.config import TrainConfig, check_same_run
from examples.flax_llama.errors import UserError, flag
from examples.flax_llama.layout import Layout, bytes_on_a_device, shaped
from examples.flax_llama.meter import DivergedError, Meter
from examples.flax_llama.metrics import (
    Display,
    MetricsLog,
    NoLog,
    device_memory,
    human_bytes,
    replace_text,
)
from examples.flax_llama.model import Llama
from examples.flax_llama.prefetch import Prefetch
from examples.flax_llama.sizes import count_params
from examples.flax_llama.step import (
    Evaluation,
    TrainState,
    Walk,
    check_backend,
    first_state,
    make_evaluate,
    make_train_step,
    trace_init,
)

# Options that change at most the rounding of a run's numbers, and those whose effect is in the
# data's fingerprints: the same data may lie elsewhere.
_IRRELEVANT = {
    *("host_refresh", "remat", "layerwise_activations", "loss_chunks", "attention_backend"),
    *("path", "validation_path", "tokenizer", "cache_dir"),
}


# Tells which program takes a step, numbered from 1.
Programs = Callable[[int], Callable[[TrainState, Any], Any]]


class Result(NamedTuple):
    """What a finished run has to show.

    Attributes:
      loss: validation loss after the last step.
      perplexity: its exponential.
      tokens_per_second: training speed, without compilation, validation and saving.
      seconds: training time, likewise.
      optimizer_bytes: size of the optimizer's state.
    """

    loss: float
    perplexity: float
    tokens_per_second: float
    seconds: float
    optimizer_bytes: int


def run(
    config: TrainConfig, *, corpus: data.Corpus | None = None, console: Console | None = None
) -> Result:
    """Trains, or goes on training, until the last step.

    Args:
      config: the options.
      corpus: the data, if it is loaded already.
      console: where to report.

    Returns:
      The results, which are also in ``result.json``.

    Raises:
      UserError: for anything that the person at the terminal can put right.
    """
    processes.start(config.devices)
    with processes.explained():
        check(config)
        corpus = corpus or data.load(config.data)
        trainer = Trainer(config, corpus, console or Console())
        identity = trainer.identity()
        processes.agree({**identity, **dataclasses.asdict(config.output)})
        with locked(config.folder) if processes.leads() else nullcontext():
            if config.overwrite and processes.leads():
                _clear(config.folder)
            processes.meet("the folder is ready")
            _check_result(config.folder / "result.json", identity)
            return trainer.run()


def check(config: TrainConfig) -> None:
    """Finds what is wrong with the options before the data is loaded, which may take long.

    Raises:
      UserError: at the first value that makes no sense.
    """
    config.check()
    check_backend(config.model.attention_backend)
    settings = optimizers.resolve(
        config.optimizer, config.optimization, config.model.shape(), config.training.steps
    )
    optimizers.build(config.optimizer, settings, config.training)
    rows, training = layout_of(config, settings).rows, config.training
    if training.batch_size // training.micro_batches % rows:
        raise UserError(
            f"--mesh spreads the {training.batch_size // training.micro_batches} sequences of a "
            f"micro-batch over {rows} devices, which must divide them; change --batch-size, "
            "--micro-batches or --mesh"
        )


def layout_of(config: TrainConfig, settings: Mapping[str, Any]) -> Layout:
    """The devices that train, and what lies where.

    Args:
      config: the options.
      settings: of the optimizer.

    Raises:
      UserError: if there are not as many as the options say.
    """
    everybody = jax.device_count() if jax.process_count() > 1 else 1
    axes = config.devices.axes() or {"data": everybody, "fsdp": 1, "tensor": 1}
    training = config.training
    return Layout.of(
        axes,
        side=settings.get("side", "short"),
        # Where the host does not choose the steps that refresh, there is a conditional in each.
        kernels=training.host_refresh and not training.layerwise,
    )


class Trainer:
    """The parts of one run and their order."""

    def __init__(
        self, config: TrainConfig, corpus: data.Corpus, console: Console, *, details: bool = True
    ):
        """Builds the parts; nothing is computed or written yet.

        Args:
          config: the options.
          corpus: the data.
          console: where to report.
          details: whether to begin with the memory of every weight.
        """
        self.details = details
        self.config = config
        self.corpus = corpus
        self.console = console if processes.leads() else Console(quiet=True)
        self.steps = config.training.steps
        self.size = dataclasses.replace(config.model.shape(), vocab_size=corpus.vocab_size)
        self.settings = optimizers.resolve(
            config.optimizer, config.optimization, self.size, self.steps
        )
        self.layout = layout_of(config, self.settings)
        size, seed = config.training.batch_size, config.training.seed
        self.rows = self.layout.own_rows(size)
        self.batches = data.train_batches(corpus, size, seed, rows=self.rows)
        self.validation = data.validation_batches(corpus, size, rows=self.rows)
        self.tx = optimizers.build(config.optimizer, self.settings, config.training)
        self.model = Llama(
            self.size,
            dtype=jnp.dtype(config.model.dtype),
            param_dtype=jnp.dtype(config.model.float_dtype),
            remat=config.model.remat,
            attention_backend=config.model.attention_backend,
            stream=self._stream(),
        )
        with optimizers.refusals(config.optimizer):
            self.walk = Walk.of(config.training, config.model, self.layout.mesh)
            self.init = trace_init(self.model, self.tx, config.training.seed, self.walk)
            self.shardings = self._shardings(self.init.out_info)
        self.shapes: TrainState = shaped(self.init.out_info, self.shardings)
        self.memory = memory.breakdown(self.shapes.params, self.shapes.opt_state)
        memory.check_projects(config.optimizer, self.settings, self.memory)
        self.held: int | None = None
        self.checkpoints: Checkpoints | None = None

    def _stream(self) -> jax.sharding.NamedSharding | None:
        own = self.config.training.average == "projections"  # each device on its own
        return None if own or self.layout.mesh.size == 1 else self.layout.batch

    def run(self) -> Result:
        """Trains; see `run`."""
        self._introduce()
        output = self.config.output
        if output.checkpoint_every or (self.config.folder / "checkpoints").exists():
            self.checkpoints = Checkpoints(
                self.config.folder, self.identity(), keep=output.keep_checkpoints
            )
            self.checkpoints.check(self.shapes)
        # Before anything is allocated: the compiler's trials would come on top of it.
        self._say("Compiling.")
        finished = self.checkpoints is not None and (self.checkpoints.latest or 0) >= self.steps
        programs = None if finished else self._compile()
        shapes = (self.shapes.params, self._batch_shapes())
        self.evaluate = make_evaluate(
            self.model, self.config.model.loss_chunks, shapes, self.layout.whole
        )
        state, seconds = self._start()
        start = int(state.step)
        with closing(self._open_log(start)) as log:
            if programs is not None:
                state, seconds, evaluation = self._train(state, seconds, programs, log)
                self._store_memory()
            else:
                self._say(f"{self.config.folder} is finished: {start} steps. Validating only.")
                evaluation = self._evaluate(state)
        if self.checkpoints is not None:
            self.checkpoints.close()
        return self._conclude(state, seconds, evaluation)

    def _open_log(self, step: int) -> MetricsLog:
        if not processes.leads():
            return NoLog()
        tensorboard = self.config.output.tensorboard
        return MetricsLog(self.config.folder, step=step, tensorboard=tensorboard)

    def _introduce(self) -> None:
        """Prints what is going to run, and where the memory will go."""
        model = self.config.model
        self._say(
            f"LLaMA {model.size}: {count_params(self.size):,} parameters, {model.param_dtype} "
            f"weights, {model.dtype} compute. Data: {self.corpus.description}"
        )
        if self.layout.mesh.size > 1:
            self._say(self.layout.describe())
            whole = self.layout.unspread(self.shapes.params)
            if whole:
                self._say(f"Not divisible by the mesh, and held in full: {', '.join(whole)}.")
        if self.details:
            self._say(memory.report(self.config.optimizer, self.tx, self.shapes.params))

    def identity(self) -> dict[str, Any]:
        """Everything that determines the run's numbers, under the options' names."""
        config = self.config
        options = {
            "optimizer": config.optimizer,
            **self.settings,
            **dataclasses.asdict(config.training),
            **dataclasses.asdict(config.model),
            **dataclasses.asdict(config.data),
            "vocab_size": self.size.vocab_size,
            "kv_heads": self.size.kv_heads,
        }
        identity = {flag(key): value for key, value in options.items() if key not in _IRRELEVANT}
        if config.training.average == "projections":  # each device's part is clipped by itself
            identity["--mesh"] = f"data={self.layout.mesh.shape['data']}"
        identity["the training data's hash"] = self.corpus.fingerprint
        identity["the validation data's hash"] = self.corpus.validation_fingerprint
        return json.loads(json.dumps(identity, default=str))

    def _start(self) -> tuple[TrainState, float]:
        """The state to start from and the seconds behind it; moves the data there."""
        if self.checkpoints is None or self.checkpoints.latest is None:
            seed = self.config.training.seed
            state = first_state(self.model, self.tx, seed, self.walk, self.shardings)
            jax.block_until_ready(state)
            self.held = device_memory().get("bytes_in_use")
            return state, 0.0
        state, progress = self.checkpoints.restore(self.shapes)
        self.batches.set_state(progress.position)
        self._say(f"Going on from the checkpoint of step {int(state.step)}.")
        return state, progress.seconds

    def _train(
        self, state: TrainState, seconds: float, programs: Programs, log: MetricsLog
    ) -> tuple[TrainState, float, Evaluation]:
        """The loop. Returns the last state, the seconds behind it and its validation."""
        start, output = int(state.step), self.config.output
        # The first run of a program may load cuDNN's graphs, which fails on a busy device.
        begun = set[Callable[..., Any]]()
        display = Display(self.console, steps=self.steps, start=start, bar=output.progress)
        tokens_per_step = self.config.training.batch_size * self.corpus.sequence_length
        meter = Meter(log, display, step=start, tokens_per_step=tokens_per_step, seconds=seconds)
        evaluation = Evaluation(math.nan, 0)

        def due(every: int) -> bool:
            return step == self.steps or (every > 0 and step % every == 0)

        with closing(Prefetch(self.batches, place=self._place)) as batches, closing(display):
            meter.run()
            for step in range(start + 1, self.steps + 1):
                program, batch = programs(step), next(batches)
                if program in begun:
                    state, metrics = program(state, batch)
                else:
                    begun.add(program)
                    with batches.paused():
                        jax.block_until_ready(state)
                        state, metrics = jax.block_until_ready(program(state, batch))
                meter.add(metrics)
                if not (due(output.eval_every) or due(output.checkpoint_every)):
                    if (step - 1) % output.log_every == 0:
                        meter.report(leave=1)
                        self._poll_checkpoints()
                    continue
                meter.report()
                if due(output.eval_every):
                    with batches.paused():
                        evaluation = self._validate(step, state, log)
                    display.say(
                        f"step {step}: validation loss {evaluation.loss:.4f}, "
                        f"perplexity {evaluation.perplexity:.2f}"
                    )
                if self.checkpoints is not None and due(output.checkpoint_every):
                    progress = Progress(batches.position, meter.seconds)
                    self.checkpoints.save(step, state, progress)
                meter.run()
        return state, meter.seconds, evaluation

    def _compile(self) -> Programs:
        """Compiles the step."""
        training = self.config.training
        schedule = optimizers.schedule(self.settings["learning_rate"], training)
        chunks = self.config.model.loss_chunks
        shardings = (self.shardings, self.layout.whole)
        train_step = make_train_step(self.model, self.tx, schedule, chunks, self.walk, shardings)
        batch = self._batch_shapes()
        gap = self.settings["update_proj_gap"] if training.host_refresh else None
        refreshes = (None,) if gap is None else (True, False)
        with optimizers.refusals(self.config.optimizer):  # what cannot be walked layer by layer
            lowered = {r: train_step.lower(self.shapes, batch, refresh=r) for r in refreshes}
        compiled = {r: step.compile() for r, step in lowered.items()}
        if self.layout.mesh.size > 1:
            self._say(self._shared(compiled))

        def program(step: int) -> Callable[[TrainState, Any], Any]:
            return compiled[None if gap is None else (step - 1) % gap == 0]

        return program

    def _shared(self, compiled: Mapping[bool | None, Any]) -> str:
        """What each device holds, needs and sends."""
        weights, state = (
            human_bytes(bytes_on_a_device(tree, where))
            for tree, where in (
                (self.shapes.params, self.shardings.params),
                (self.shapes.opt_state, self.shardings.opt_state),
            )
        )
        where = lambda state, batch: (state.params, state.opt_state)
        peak = max(
            optax_gale.step_memory_report(step, where=where).peak for step in compiled.values()
        )
        reports = [optax_gale.traffic_report(step) for step in compiled.values()]
        sent = min(report.sent for report in reports)
        most = max(report.sent_at_most for report in reports)
        text = (
            f"Each device holds {weights} of weights and {state} of the optimizer's state, needs "
            f"{human_bytes(peak)} in a step, and sends {human_bytes(sent)} in one"
        )
        if most == sent:
            return f"{text}."
        if self.config.training.micro_batches > 1:  # branches in the loop: nobody knows how often
            return f"{text}, or more: at most {human_bytes(most)}."
        return f"{text}, {human_bytes(most)} where projectors are refreshed."

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.training.batch_size, self.corpus.sequence_length)
        shapes = step_memory.batch_shapes(shape)
        return shaped(shapes, dict.fromkeys(shapes, self.layout.batch))

    def _shardings(self, shapes: TrainState) -> Any:
        params, layout = shapes.params, self.layout
        of_state = layout.state(functools.partial(self.walk.init, self.tx), params)
        return TrainState(layout.whole, layout.weights(params), of_state)  # type: ignore[arg-type]

    def _validate(self, step: int, state: TrainState, log: MetricsLog) -> Evaluation:
        evaluation = self._evaluate(state)
        if not math.isfinite(evaluation.loss):
            raise DivergedError(f"diverged: validation loss {evaluation.loss} after step {step}")
        log.write(
            "validation",
            step,
            {**evaluation._asdict(), "perplexity": evaluation.perplexity},
        )
        log.flush()
        return evaluation

    def _evaluate(self, state: TrainState) -> Evaluation:
        return self.evaluate(state.params, map(self._place, self.validation))

    def _place(self, batch: Any) -> Any:
        return self.layout.place(batch, self.config.training.batch_size, self.rows)

    def _poll_checkpoints(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.poll()

    def _store_memory(self) -> None:
        """Writes what this process needed, which another that goes on will not."""
        if not processes.leads():
            return
        device = device_memory()  # empty where there is no count
        needed = {
            "device": jax.devices()[0].device_kind,
            "limit_bytes": device.get("bytes_limit"),
            "peak_bytes": device.get("peak_bytes_in_use"),
            "first_state_bytes": self.held,
            "weights_bytes": self.memory.weights,
        }
        replace_text(self.config.folder / "memory.json", json.dumps(needed, indent=2) + "\n")

    def _conclude(self, state: TrainState, seconds: float, evaluation: Evaluation) -> Result:
        """Writes and prints the results."""
        folder = self.config.folder
        tokens = self.steps * self.config.training.batch_size * self.corpus.sequence_length
        result = Result(
            evaluation.loss,
            evaluation.perplexity,
            tokens / seconds,
            seconds,
            self.memory.optimizer,
        )
        if not processes.leads():
            return result
        about = {"data": self.corpus.description, "settings": self.identity()}
        stored = {**result._asdict(), **about}
        replace_text(folder / "result.json", json.dumps(stored, indent=2) + "\n")
        curves = plots.Curves.read(folder / "metrics.jsonl")
        plots.plot_run(folder / "report.png", curves, self.memory)
        self._say(
            f"Validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
            f"({evaluation.tokens:,} tokens); {result.tokens_per_second:,.0f} tokens/s, "
            f"{seconds:.0f} s of training. See {folder / 'report.png'}"
        )
        return result

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the system lifts the lock when this one ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {folder} cannot be a folder: {error.strerror}") from error
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}") from None
        yield


def _check_result(path: Path, identity: dict[str, Any]) -> None:
    """Refuses to replace the result of another run, which may have left no checkpoint."""
    if not path.exists():
        return
    try:
        settings = dict(json.loads(path.read_text())["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not readable: {error!r}; delete it") from error
    check_same_run(str(path), identity, settings)


def _clear(folder: Path) -> None:
    """Deletes what runs write into their folder, and nothing else."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "result.json", "memory.json", "report.png"):
        (folder / name).unlink(missing_ok=True)
