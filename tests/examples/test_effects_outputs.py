"""What a run writes and shows is what happened in it; what it reads is what was asked for."""

import dataclasses
import io
import json
import re
import struct
from types import SimpleNamespace

import conftest
import datasets
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from examples.flax_llama import meter, metrics, plots, train
from examples.flax_llama.checkpoint import Checkpoints
from examples.flax_llama.config import (
    ModelOptions,
    OptimizerOptions,
    OutputOptions,
    TrainConfig,
    TrainingOptions,
)
from examples.flax_llama.data import DataConfig, c4, load
from examples.flax_llama.data.tokenizer import train_bpe
from examples.flax_llama.memory import Breakdown
from examples.flax_llama.metrics import Display, MetricsLog, read_records

STEPS = 12


def terminal():
    return Console(force_terminal=True, file=io.StringIO(), width=150, color_system=None)


def screen(console):
    """What was written to a terminal, without the codes that move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def figures(patch):
    """Collects the figures that are saved."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    patch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def lines(axes):
    """The curves with a name in the legend."""
    named = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    return {name: data for name, data in named.items() if not name.startswith("_")}


def bars(axes):
    """Bottom and height of each bar, in the order in which they were drawn."""
    return [(bar.get_y(), bar.get_height()) for bar in axes.patches]


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano_size():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.SIZES, "nano", conftest.NANO)
        yield


@pytest.fixture(scope="module")
def finished(nano_size, corpus_folder, tmp_path_factory):
    """A run on a terminal, with all outputs."""
    text = DataConfig("text", corpus_folder, cache_dir=corpus_folder / "cache", vocab_size=300)
    config = TrainConfig(
        optimizer="adamw",
        out=tmp_path_factory.mktemp("finished") / "run",
        optimization=OptimizerOptions(learning_rate=0.02),
        training=TrainingOptions(steps=STEPS, batch_size=4, warmup_fraction=0.5),
        model=ModelOptions(size="nano", dtype="float32"),
        data=dataclasses.replace(text, sequence_length=16),
        output=OutputOptions(checkpoint_every=STEPS, eval_every=5, log_every=4),
    )
    console = terminal()
    with pytest.MonkeyPatch.context() as patch:
        saved = figures(patch)
        result = train.run(config, console=console)
    (figure,) = saved
    trainer = train.Trainer(config, load(config.data), Console(quiet=True))
    return SimpleNamespace(
        folder=config.folder, trainer=trainer, figure=figure, result=result, screen=screen(console)
    )


def records(run, kind):
    return [r for r in read_records(run.folder / "metrics.jsonl") if r["kind"] == kind]


def events(folder):
    """The events of TensorBoard's files: TFRecords, each a length, two checksums and a message."""
    for path in folder.glob("events*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]


def test_tensorboard_gets_the_records(finished):
    got = {
        (value.tag, event.step): value.simple_value
        for event in events(finished.folder / "tensorboard")
        for value in event.summary.value
    }
    shown = {
        "train": ("loss", "grad_norm", "learning_rate"),
        "speed": ("tokens_per_second", "memory_bytes"),
        "validation": ("loss", "perplexity"),
    }
    expected = {
        (f"{kind}/{name}", record["step"]): record[name]
        for kind, names in shown.items()
        for record in records(finished, kind)
        for name in names
    }
    assert len(expected) == 3 * STEPS + 2 * 4 + 2 * 3
    assert got == pytest.approx(expected, rel=1e-6)


def test_the_learning_rate_is_recorded_as_scheduled(finished):
    rates = [r["learning_rate"] for r in records(finished, "train")]
    rising = 1 / 6 + 5 / 6 * np.arange(6) / 6
    falling = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    np.testing.assert_allclose(rates, 0.02 * np.concatenate([rising, falling]), rtol=1e-5)


def mean_loss(model, params, rows):
    """Cross-entropy of all but the first token of each row, in NumPy and float64."""
    tokens = np.stack([row["tokens"] for row in rows])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens), np.float64)[:, :-1]
    normalisers = np.log(np.sum(np.exp(logits), axis=-1))
    targets = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return np.mean(normalisers - targets)


def test_validation_is_the_loss_of_the_rows_held_out(finished):
    trainer, folder = finished.trainer, finished.folder
    checkpoints = Checkpoints(folder, trainer.identity(), keep=2)
    state, progress = checkpoints.restore(trainer.shapes)
    checkpoints.close()
    corpus = trainer.corpus
    count = len(corpus.validation)
    losses = [
        mean_loss(trainer.model, state.params, [rows[i] for i in range(count)])
        for rows in (corpus.validation, corpus.train)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3  # it matters which
    assert finished.result.loss == pytest.approx(losses[0], rel=1e-5)
    assert records(finished, "validation")[-1]["loss"] == finished.result.loss
    assert records(finished, "validation")[-1]["tokens"] == count * 15
    assert progress.seconds == pytest.approx(finished.result.seconds)


def test_the_first_loss_is_that_of_the_first_batch(finished):
    trainer = finished.trainer
    state = trainer.init.lower().compile()()
    batch = next(train.data.train_batches(trainer.corpus, 4, seed=0))
    rows = [{"tokens": tokens} for tokens in batch["tokens"]]
    expected = mean_loss(trainer.model, state.params, rows)
    assert records(finished, "train")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_result_adds_up(finished):
    result = finished.result
    stored = json.loads((finished.folder / "result.json").read_text())
    assert {key: stored[key] for key in result._fields} == result._asdict()
    assert result.perplexity == pytest.approx(np.exp(result.loss))
    assert result.tokens_per_second == pytest.approx(STEPS * 4 * 16 / result.seconds)
    assert result.seconds == records(finished, "speed")[-1]["seconds"]
    weights = sum(x.size for x in jax.tree.leaves(finished.trainer.shapes.params))
    # Two moments of float32, and the counters of Adam and of the schedule.
    assert result.optimizer_bytes == 2 * 4 * weights + 2 * 4


def test_the_picture_shows_training_and_validation(finished):
    loss, memory = finished.figure.axes
    steps, losses = (np.array([r[k] for r in records(finished, "train")]) for k in ("step", "loss"))
    # Twelve steps are too few to smooth.
    np.testing.assert_allclose(lines(loss)["training"], np.stack([steps, losses], axis=1))
    raw = [line.get_xydata() for line in loss.get_lines() if line.get_label().startswith("_")]
    np.testing.assert_allclose(raw, [np.stack([steps, losses], axis=1)])
    validation = [(r["step"], r["loss"]) for r in records(finished, "validation")]
    np.testing.assert_allclose(lines(loss)["validation"], validation)
    assert {text.get_text() for text in loss.get_legend().get_texts()} == {"training", "validation"}
    parts = np.array(finished.trainer.memory) / 2**20
    np.testing.assert_allclose([height for _, height in bars(memory)], parts)


def test_the_terminal_shows_the_progress(finished):
    last = records(finished, "train")[-1]["loss"]
    speed = records(finished, "speed")[-1]["tokens_per_second"]
    assert re.search(r"step 12/12 ━+ loss ", finished.screen)
    assert f"loss {last:.4f}  {speed:,.0f} tokens/s  " in finished.screen
    for record in records(finished, "validation"):
        shown = f"validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
        assert f"step {record['step']}: {shown}" in finished.screen


# --- the terminal ---------------------------------------------------------------------------------


@pytest.fixture
def gigabytes(monkeypatch):
    monkeypatch.setattr(metrics, "peak_memory", lambda: 3 * 2**30)
    return "3.00 GiB"


@pytest.mark.parametrize("bar", [True, False])
def test_a_bar_on_a_terminal_where_it_is_wanted(bar, gigabytes):
    console = terminal()
    display = Display(console, steps=9, start=2, bar=bar)
    display.report(3, 1.23456, 6789.4)
    display.say("in between")
    display.close()
    text = screen(console)
    assert f"loss 1.2346  6,789 tokens/s  {gigabytes}" in text
    assert "step 3/9" in text and "in between" in text
    assert ("━" in text) == bar
    assert ("step 2/9" in text) == bar  # the bar is there before the first report


def test_lines_where_there_is_no_terminal(gigabytes):
    console = Console(file=io.StringIO(), width=150)
    display = Display(console, steps=9, start=0, bar=True)
    for step in (3, 6):
        display.report(step, 1.5, 1000.0)
    display.close()
    numbers = f"loss 1.5000  1,000 tokens/s  {gigabytes}"
    assert console.file.getvalue() == f"step 3/9  {numbers}\nstep 6/9  {numbers}\n"


@pytest.mark.parametrize("progress", [True, False])
def test_the_option_decides_on_the_bar(progress, finished, monkeypatch):
    class Stop(Exception):
        pass

    def display(console, *, bar, **options):
        raise Stop(bar)

    monkeypatch.setattr(train, "Display", display)
    monkeypatch.setattr(train, "make_train_step", lambda *a: jax.jit(lambda *a, refresh: 0))
    trainer = finished.trainer
    output = OutputOptions(checkpoint_every=0, tensorboard=False, progress=progress)
    config = dataclasses.replace(trainer.config, out=finished.folder.parent / "bar", output=output)
    with pytest.raises(Stop, match=str(progress)):
        train.run(config, corpus=trainer.corpus, console=Console(quiet=True))


# --- the clock ------------------------------------------------------------------------------------


def test_the_meter_counts_training_time_only(tmp_path, monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(meter, "peak_memory", lambda: 12345)
    shown = []
    display = SimpleNamespace(report=lambda *numbers: shown.append(numbers))
    log = MetricsLog(tmp_path, step=4, tensorboard=False)
    clock = meter.Meter(log, display, step=4, tokens_per_step=50, seconds=7.0)

    def steps(*losses):
        for loss in losses:
            clock.add({"loss": jnp.float32(loss), "grad_norm": 2.0, "learning_rate": 0.5})

    clock.run()
    steps(4.0, 3.0)
    now.seconds += 5.0
    clock.report()
    now.seconds += 1000.0  # validation, saving
    clock.run()
    steps(2.0, 1.5, 1.0)
    now.seconds += 4.0
    clock.report(leave=1)
    now.seconds += 0.5
    clock.report()
    log.close()

    rows = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "speed"]
    assert [r["step"] for r in rows] == [6, 8, 9]
    assert [r["seconds"] for r in rows] == [7.0 + 5.0, 7.0 + 9.0, 7.0 + 9.5]
    speeds = [2 * 50 / 5.0, 2 * 50 / 4.0, 50 / 0.5]
    assert [r["tokens_per_second"] for r in rows] == speeds
    assert {r["memory_bytes"] for r in rows} == {12345}
    assert clock.seconds == 16.5
    assert shown == [(6, 3.0, speeds[0]), (8, 1.5, speeds[1]), (9, 1.0, speeds[2])]


# --- pictures -------------------------------------------------------------------------------------


def curves(offset):
    steps = np.arange(1.0, 101.0)
    losses = offset + np.cos(steps)
    return plots.Curves(steps, 2 * steps, losses, steps[49::50], losses[49::50] + 1)


def running_mean(x, window):
    return [np.mean(x[max(0, i - window) : i]) for i in range(1, len(x) + 1)]


def test_the_picture_of_a_run_smooths_the_training_loss(tmp_path, monkeypatch):
    saved, drawn = figures(monkeypatch), curves(3.0)
    plots.plot_run(tmp_path / "a.png", drawn, Breakdown(2**20, 2**21, 2**22, 2**19))
    (loss, memory) = saved[0].axes
    training = lines(loss)["training"]
    np.testing.assert_allclose(training[:, 0], drawn.steps)
    np.testing.assert_allclose(training[:, 1], running_mean(drawn.losses, 3))
    np.testing.assert_allclose(lines(loss)["validation"][:, 1], drawn.validation_losses)
    assert bars(memory) == [(0, 1.0), (0, 2.0), (0, 4.0), (0, 0.5)]
    assert [text.get_text() for text in memory.get_xticklabels()] == list(Breakdown._fields)


def test_the_picture_of_a_comparison_has_every_arm(tmp_path, monkeypatch):
    saved, arms = figures(monkeypatch), {"one": curves(3.0), "two": curves(5.0)}
    parts = {"one": Breakdown(1, 1, 2**20, 0), "two": Breakdown(1, 1, 2**21, 2**19)}
    plots.plot_comparison(tmp_path / "a.png", arms, parts)
    by_step, by_time, memory = saved[0].axes
    for name, arm in arms.items():
        for axes, x in ((by_step, arm.steps), (by_time, arm.seconds)):
            np.testing.assert_allclose(lines(axes)[name], np.stack([x, arm.smooth], axis=1))
    # Moments of both, then projectors on top of them.
    assert bars(memory) == [(0, 1.0), (0, 2.0), (1.0, 0.0), (2.0, 0.5)]


# --- what the numbers depend on -------------------------------------------------------------------


@pytest.fixture
def identity(nano_size, tmp_path):
    """What identifies a run on tokens that are given, under options that are given."""

    def make(tokens, **groups):
        np.save(tmp_path / "tokens.npy", tokens)
        options = DataConfig("tokens", tmp_path / "tokens.npy", vocab_size=64, sequence_length=8)
        config = TrainConfig(optimizer="sgd", model=ModelOptions("nano"), data=options)
        config = dataclasses.replace(
            config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in groups.items()}
        )
        return train.Trainer(config, load(config.data), Console(quiet=True)).identity()

    return make


def differing(here, there):
    return {key for key in here if here[key] != there.get(key)}


@pytest.mark.parametrize("place", [3, -3])  # among what is trained on, and what is held out
def test_other_data_in_the_same_place_make_another_run(place, identity):
    tokens = np.arange(800, dtype=np.uint16) % 60
    changed = tokens.copy()
    changed[place] = 61
    here, there = identity(tokens), identity(changed)
    assert here == identity(tokens)
    (key,) = differing(here, there)
    assert "data" in key


@pytest.mark.parametrize(
    ("group", "option", "value"),
    [
        ("training", "steps", 100),
        ("training", "batch_size", 2),
        ("training", "warmup_fraction", 0.5),
        ("training", "final_lr_fraction", 0.5),
        ("training", "clip_norm", 0.5),
        ("training", "seed", 1),
        ("model", "dtype", "float32"),
        ("model", "param_dtype", "bfloat16"),
        ("optimization", "learning_rate", 0.1),
        ("optimization", "momentum", 0.1),
    ],
)
def test_options_that_change_the_numbers_make_another_run(group, option, value, identity):
    tokens = np.arange(800, dtype=np.uint16) % 60
    here, there = identity(tokens), identity(tokens, **{group: {option: value}})
    assert differing(here, there) == {"--" + option.replace("_", "-")}


def test_options_that_do_not_change_the_numbers_leave_the_run_alone(identity):
    tokens = np.arange(800, dtype=np.uint16) % 60
    assert identity(tokens) == identity(
        tokens,
        model={"remat": True, "loss_chunks": 2},
        output={"log_every": 3, "tensorboard": False},
    )
    by_layers = {"layerwise": True}
    assert identity(tokens, training=by_layers) == identity(
        tokens, training={**by_layers, "layerwise_activations": "keep"}
    )


# --- C4 -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub with more documents than are asked for, and its tokenizer; what is asked of it."""
    asked, texts = [], [f"text number {i} " for i in range(300)]
    tokenizer = train_bpe(texts, 300)

    class Documents:
        """Such as ``datasets`` streams: one shard."""

        num_shards = 1

        def shard(self, num_shards, index):
            return self

        def __iter__(self):
            return ({"text": "a text"} for _ in range(50_000))

        def state_dict(self):
            return {}

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return Documents()

    def load_tokenizer(name):
        asked.append(name)
        return tokenizer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(c4, "load_tokenizer", load_tokenizer)
    return asked


def test_c4_is_read_as_in_galore(hub):
    corpus = load(DataConfig("c4"))
    streamed = [
        ("allenai/c4", "en", {"split": split, "streaming": True})
        for split in ("train", "validation")
    ]
    assert hub == ["t5-base", *streamed]
    assert corpus.vocab_size == 32_000
    assert corpus.sequence_length == 256
    assert sum(1 for _ in corpus.validation.documents(0, 1)) == 40_000
    assert sum(1 for _ in corpus.train.documents(0, 1)) == 50_000


def test_c4_can_be_read_otherwise(hub):
    config = DataConfig("c4", tokenizer="other", validation_limit=7, sequence_length=9)
    corpus = load(config)
    assert hub[0] == "other"
    assert corpus.vocab_size == 300  # the tokenizer's own
    assert load(dataclasses.replace(config, vocab_size=400)).vocab_size == 400
    texts = list(corpus.validation.documents(0, 1))
    assert len(texts) == 7
    assert corpus.validation.encode(texts)["tokens"].shape == (7, 9)
