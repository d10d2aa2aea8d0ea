"""The comparison: arms, learning rates, divergence, restarts."""

import dataclasses
import json
from pathlib import Path

import conftest
import numpy as np
import pytest

from examples.flax_llama import cli, compare
from examples.flax_llama.config import CompareConfig, OptimizerOptions
from examples.flax_llama.errors import UserError
from examples.flax_llama.metrics import read_records
from examples.flax_llama.train import Trainer


def arms_of(*arm, optimizers="", **options):
    config = CompareConfig(optimizers=optimizers, arm=arm, optimization=OptimizerOptions(**options))
    return compare.parse_arms(config)


def test_arms_take_the_shared_options_that_they_have():
    first, second = arms_of(optimizers="adamw,gale_adamw", rank=8, weight_decay=0.1)
    assert (first.name, first.optimizer) == ("adamw", "adamw")
    assert first.options == (OptimizerOptions(weight_decay=0.1),)
    assert second.options == (OptimizerOptions(weight_decay=0.1, rank=8),)


def test_an_arm_has_options_of_its_own():
    (arm,) = arms_of("name=fira optimizer=gale_adamw residual=fira lr=5e-3,1e-2 rank=4", rank=8)
    assert arm.name == "fira"
    expected = OptimizerOptions(residual="fira", rank=4)
    assert [o.learning_rate for o in arm.options] == [5e-3, 1e-2]
    assert all(o.given().items() >= expected.given().items() for o in arm.options)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("name=x", "optimizer= is missing"),
        ("optimizer=adamw rank", "expected NAME=VALUE, got 'rank'"),
        ("optimizer=adamw lr=fast", "arm 'adamw': .*fast"),
        ("optimizer=gale_adamw colour=red", "arm 'gale_adamw': .*--colour"),
        ("optimizer=adamv", "unknown optimizer 'adamv'"),
        ("optimizer=adamw name=../up", "its name becomes a folder's"),
        ("optimizer='adamw", "No closing quotation"),
        ("optimizer=adamw help=1", "arm 'adamw': --help is not an option of adamw"),
        ("optimizer=adamw lr=1 learning_rate=2", "learning_rate= is given twice"),
        ("optimizer=adamw weight-decay=1 weight_decay=1", "weight_decay= is given twice"),
        ("optimizer=adamw b1=0.5 b1=0.6", "b1= is given twice"),
        ("optimizer=sgd lr=1e-2,,", "arm 'sgd': a learning rate is missing"),
    ],
)
def test_bad_arms_are_named(arm, words):
    with pytest.raises(UserError, match=words):
        arms_of(arm, **({"rank": 2} if "adamv" in arm else {}))


def test_names_must_differ_and_there_must_be_an_arm():
    with pytest.raises(UserError, match="two arms are called 'adamw'"):
        arms_of("optimizer=adamw", optimizers="adamw")
    with pytest.raises(UserError, match="nothing to compare"):
        arms_of()
    with pytest.raises(UserError, match="--rank is not an option of adamw, sgd"):
        arms_of(optimizers="adamw,sgd", rank=3)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["name=a optimizer=sgd lr=0.1,0.2", "name=a-lr0.1 optimizer=sgd"], "folder 'a-lr0.1'"),
        (["name=a optimizer=sgd lr=1e-3,0.001"], "folder 'a-lr0.001'"),
        (["name=a optimizer=sgd lr=0.12345678,0.12345679"], "folder 'a-lr0.123457'"),
        (["name=lock optimizer=sgd"], "arm 'lock': the comparison keeps a file there"),
        (["name=results.json optimizer=sgd"], "arm 'results.json': "),
        (["name=results.md optimizer=sgd"], "arm 'results.md': "),
        (["name=comparison.png optimizer=sgd"], "arm 'comparison.png': "),
    ],
)
def test_every_run_has_a_folder_of_its_own(arms, words, tmp_path, capsys):
    options = [word for arm in arms for word in ("--arm", arm)]
    assert cli.main(["compare", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_compare(nano, tmp_path, capsys, monkeypatch):
    nano = {**nano, "steps": 4, "eval-every": 0, "checkpoint-every": 0}
    words = ["compare", *conftest.words(nano, out=tmp_path, clip_norm=0)]
    words += ["--arm", "name=swept optimizer=sgd lr=1e-2,1e30"]
    words += ["--arm", "name=broken optimizer=sgd lr=1e30"]
    assert cli.main(words) == 0

    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["swept-lr0.01", "swept-lr1e+30", "broken"]
    assert results["broken"]["loss"] is None and "diverged" in results["broken"]["remark"]
    assert results["swept-lr0.01"]["loss"] > 0
    assert results["swept-lr0.01"]["optimizer_bytes"] > 0

    table = (tmp_path / "results.md").read_text()
    best, every = table.split("Every learning rate:")
    rows = [line.split("|")[1:4] for line in best.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows[1:]] == [
        ["swept", "sgd", "0.01"],
        ["broken", "sgd", "1e+30"],
    ]
    assert "at step 2" in every and every.count("| swept |") == 2
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # The same weights and the same tokens: the first loss is the same.
    metrics = [tmp_path / name / "metrics.jsonl" for name in results]
    assert len({next(read_records(path), {"loss": 0})["loss"] for path in metrics} - {0}) == 1

    # Again, with one arm more: only that one is run.
    ran = []
    run = Trainer.run
    monkeypatch.setattr(
        Trainer, "run", lambda self: ran.append(self.config.folder.name) or run(self)
    )
    assert cli.main([*words, "--arm", "name=new optimizer=sgd lr=0.01"]) == 0
    assert ran == ["new"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["new"]["loss"] == results["swept-lr0.01"]["loss"]

    # Other settings under the same names are refused.
    capsys.readouterr()
    assert cli.main([*words, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "--seed is 1 here and 0 there" in error and error.count("\n") == 1


def test_names_are_printed_as_they_are(nano, tmp_path, capsys):
    nano = {**nano, "steps": 1, "eval-every": 0, "checkpoint-every": 0}
    arms = ["name='[bold]$\\frac$' optimizer=sgd", "name=a[red] optimizer=sgd"]
    words = [word for arm in arms for word in ("--arm", arm)]
    assert cli.main(["compare", *conftest.words(nano, out=tmp_path), *words]) == 0
    out = capsys.readouterr().out
    for name in ("[bold]$\\frac$", "a[red]"):
        assert f"─ {name} ─" in out and f"\n{name} " in out  # the heading, and the table's row


def test_other_validation_data_is_refused_and_another_path_to_the_same_is_not(
    nano, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, 400)
    np.save("train.npy", ids)
    np.save("validation.npy", ids[:64])
    nano = {**nano, "source": "tokens", "steps": 1, "checkpoint-every": 0, "optimizers": "sgd"}

    def compared(folder):
        changes = {"path": folder / "train.npy", "validation-path": folder / "validation.npy"}
        return cli.main(["compare", *conftest.words({**nano, **changes}, out=tmp_path / "out")])

    assert compared(tmp_path) == 0
    capsys.readouterr()
    assert compared(Path()) == 0
    assert "done before" in capsys.readouterr().out
    np.save("validation.npy", ids[64:128])
    assert compared(tmp_path) == 2
    error = capsys.readouterr().err
    assert "results of sgd: the validation data's hash is" in error and error.count("\n") == 1


@pytest.mark.parametrize("identity", [3, None, "settings"])
def test_results_that_are_none(identity, tmp_path):
    fields = {field.name: None for field in dataclasses.fields(compare.Trial)}
    stored = {"a": {**fields, "identity": identity}}
    (tmp_path / "results.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"is not readable: .*; delete it"):
        compare.Results(tmp_path)
