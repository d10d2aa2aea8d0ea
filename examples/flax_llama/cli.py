"""Training LLaMA with optax_gale.

python -m examples.flax_llama train     trains one model with one optimizer
python -m examples.flax_llama compare   does so with several optimizers, and tabulates them
python -m examples.flax_llama memory    prints where the memory of a training would go
"""

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import tyro

from examples.flax_llama.config import CompareConfig, MemoryConfig, TrainConfig
from examples.flax_llama.errors import UserError
from examples.flax_llama.parsing import parse

_COMMANDS = {"train": TrainConfig, "compare": CompareConfig, "memory": MemoryConfig}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Whatever the person at the terminal can put right is told in one line, without a traceback.

    Args:
      arguments: the words after the program's name; by default those of this process.

    Returns:
      The exit status: 0, 2 after such a line, 75 where another process is gone and the same command
      goes on, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    config, status = None, 0
    try:
        config = _parse(words)
        _run(config)
    except UserError as error:
        status = _complain(str(error), error.status)
    except OSError as error:
        status = _complain(str(error), 2)
    except KeyboardInterrupt:
        status = _complain(_stopped(config), 130)
    except Exception as error:
        # JAX's errors are RuntimeErrors; JAX may not have been imported.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            advice = "lower --batch-size, raise --loss-chunks, or set --remat True"
            status = _complain(f"out of memory: {advice} ({str(error).splitlines()[0]})", 2)
        elif _is_one_of_several(config):
            traceback.print_exc()
            status = 1
        else:
            raise
    if status and _is_one_of_several(config):
        from examples.flax_llama import processes

        processes.leave(status)
    return status


def _parse(words: list[str]) -> TrainConfig | CompareConfig | MemoryConfig:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__, "Each has its own --help.")
        raise SystemExit(0)
    kind = _COMMANDS.get(words[0])
    if kind is None:
        raise UserError(f"unknown command '{words[0]}'; choose from {', '.join(_COMMANDS)}")
    try:
        return parse(
            kind,
            words[1:],
            prog=f"python -m examples.flax_llama {words[0]}",
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.FlagConversionOff,
                tyro.conf.DisallowNone,
            ),
        )
    except SystemExit:  # it was --help
        from examples.flax_llama.optimizers import table

        print("Optimizers and their defaults:\n" + table())
        raise


def _run(config: TrainConfig | CompareConfig | MemoryConfig) -> None:
    # JAX is imported here, after the options have been read.
    if isinstance(config, TrainConfig):
        from examples.flax_llama import train

        train.run(config)
    elif isinstance(config, CompareConfig):
        from examples.flax_llama import compare

        compare.run(config)
    else:
        from examples.flax_llama import memory

        print(memory.run(config))


def _stopped(config: TrainConfig | CompareConfig | MemoryConfig | None) -> str:
    """What Ctrl-C leaves behind. Looks for itself: checkpoint.py would import JAX."""
    if isinstance(config, CompareConfig) and (config.out / "results.json").exists():
        return f"stopped; the same command runs what {config.out / 'results.json'} does not hold"
    if isinstance(config, TrainConfig):
        folder = config.folder / "checkpoints"
        if any(path.name.isdigit() for path in folder.glob("*")):
            condition = "without --overwrite " if config.overwrite else ""
            return f"stopped; {condition}the same command goes on from the last checkpoint"
        return "stopped; there is no checkpoint, the same command starts from step 0"
    return "stopped"


def _is_one_of_several(config: Any) -> bool:
    return isinstance(config, TrainConfig) and config.devices.coordinator is not None


def _complain(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return status
