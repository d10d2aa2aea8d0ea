"""What the data can be set to."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from examples.flax_llama.errors import UserError, flag

Source = Literal["stdlib", "c4", "text", "tokens"]
DocumentLayout = Literal["pack", "pad"]

LARGEST_VOCAB = 2**31 - 1  # token ids are int32

# The sources that read an option, where not all do.
_SOURCES_OF: dict[str, tuple[Source, ...]] = {
    "path": ("c4", "text", "tokens"),
    "validation_path": ("text", "tokens"),
    "tokenizer": ("stdlib", "c4", "text"),
    "documents": ("stdlib", "c4", "text"),
    "text_field": ("c4", "text"),
    "validation_fraction": ("stdlib", "text", "tokens"),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into sequences.

    Raises:
        UserError: If a value is out of range.
    """

    source: Source = "stdlib"
    """stdlib: the Python standard library's own sources. c4: allenai/c4, streamed. text: a folder
    or file of .txt or .jsonl, also .gz, .xz or .zst. tokens: an array of token ids."""
    path: Path | None = None
    """The data of text and tokens; for c4, a folder with copies of its .json.gz files."""
    validation_path: Path | None = None
    """text and tokens: data to validate on. By default a part of the data is held out."""
    tokenizer: str | None = None
    """A tokenizer.json or the name of one on the Hugging Face hub. By default a byte-level BPE is
    trained on the text; c4 uses t5-base."""
    vocab_size: int | None = None
    """Number of token ids. By default 4096 for a trained BPE, 32000 for c4, else what the tokenizer
    or the largest id calls for."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    documents: DocumentLayout = "pack"
    """stdlib and text: pack documents end to end and cut the result, or pad each one to a sequence
    of its own, dropping what does not fit (as c4 always does)."""
    text_field: str = "text"
    """The field of .jsonl records that holds the text."""
    validation_fraction: float = 0.05
    """Share of the data to hold out where there is no validation data."""
    validation_limit: int | None = None
    """Validate on the first so many sequences. By default all; for c4 the first 40000."""
    cache_dir: Path = Path("~/.cache/optax_gale_examples")
    """Where tokenizers and token ids are kept."""

    def __post_init__(self) -> None:
        """Checks each value, and that the source has what it needs."""
        if self.source not in get_args(Source):
            raise UserError(
                f"unknown data source {self.source!r}; choose from {', '.join(get_args(Source))}."
            )
        if self.documents not in get_args(DocumentLayout):
            raise UserError(f"documents must be 'pack' or 'pad', got {self.documents!r}.")
        for field in dataclasses.fields(self):
            sources = _SOURCES_OF.get(field.name, get_args(Source))
            if self.source not in sources and getattr(self, field.name) != field.default:
                raise UserError(
                    f"{flag(field.name)} is an option of the data source {' or '.join(sources)}, "
                    f"not of {self.source}; leave it out or choose another --source."
                )
        if self.source in ("text", "tokens") and self.path is None:
            raise UserError(f"data source {self.source!r} needs a path to the data.")
        if self.sequence_length < 2:
            raise UserError(f"sequence_length must be at least 2, got {self.sequence_length}.")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise UserError(f"--vocab-size must be at least 2, got {self.vocab_size}.")
        if self.vocab_size is not None and self.vocab_size > LARGEST_VOCAB:
            raise UserError(f"--vocab-size must be less than 2**31, got {self.vocab_size}.")
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}."
            )
        if self.validation_limit is not None and self.validation_limit < 1:
            raise UserError(f"validation_limit must be positive, got {self.validation_limit}.")
