"""C4, streamed as GaLore's experiments read it (Zhao et al. 2024, arXiv:2403.03507).

Each document is cut or padded to one sequence, with t5-base's tokenizer; pads are masked.
"""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import grain
import numpy as np

from examples.flax_llama.data.config import DataConfig
from examples.flax_llama.data.corpus import Corpus, Stream
from examples.flax_llama.data.files import gzip_checksum, read_documents
from examples.flax_llama.data.tokenizer import Encoder, load_tokenizer, quiet_hub
from examples.flax_llama.errors import UserError

_VOCAB = 32000  # t5-base's pieces; its 100 sentinels above never occur in text
_VALIDATION_DOCUMENTS = 40000  # about 10 million tokens at a length of 256, as GaLore


def prepare_c4(config: DataConfig) -> Corpus:
    """Opens the stream of C4's English documents; nothing is read yet.

    Raises:
        UserError: If the data or the tokenizer cannot be had.
    """
    tokenizer = load_tokenizer(config.tokenizer or "t5-base")
    vocab_size = config.vocab_size or (None if config.tokenizer else _VOCAB)
    encoder = Encoder(tokenizer, vocab_size, config.sequence_length)
    splits = ("train", "validation")
    train, validation = (_open(config, split) for split in splits)
    limit = config.validation_limit or _VALIDATION_DOCUMENTS
    origin = str(config.path or "allenai/c4")

    def train_documents(seed: int, num_epochs: int | None) -> grain.IterDataset[str]:
        return _Documents(train, config.text_field, origin, seed, num_epochs)

    def validation_documents(seed: int, num_epochs: int | None) -> grain.IterDataset[str]:
        documents = _Documents(validation, config.text_field, origin, None, num_epochs)
        return grain.experimental.LimitIterDataset(documents, limit)

    encoding = f"{tokenizer.to_str()} {encoder.vocab_size} {config.sequence_length}"
    prints = [
        hashlib.blake2b(f"{_identity(config, split)} {encoding}".encode(), digest_size=8)
        for split in splits
    ]
    prints[1].update(str(limit).encode())
    return Corpus(
        description=(
            f"{origin}: {train.num_shards} files to train on, {limit:,} documents to validate on, "
            f"each cut or padded to {config.sequence_length} tokens, vocabulary "
            f"{encoder.vocab_size:,}"
        ),
        fingerprint=prints[0].hexdigest(),
        validation_fingerprint=prints[1].hexdigest(),
        vocab_size=encoder.vocab_size,
        sequence_length=config.sequence_length,
        train=Stream(train_documents, encoder.padded),
        validation=Stream(validation_documents, encoder.padded),
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        pad_id=encoder.pad_id,
    )


def _open(config: DataConfig, split: str) -> datasets.IterableDataset:
    if config.path is not None:
        arguments = {"files": _files(config.path, split), "field": config.text_field}
        return datasets.IterableDataset.from_generator(_read_files, gen_kwargs=arguments)
    try:
        with quiet_hub():
            return datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
    except Exception as error:  # whatever the network and the hub can do
        raise UserError(
            f"cannot open allenai/c4 ({error!r}); it needs the network, or a path to a folder with "
            "its files."
        ) from error


def _files(folder: Path, split: str) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"data path {folder} is not a folder with C4's .json.gz files.")
    files = sorted(str(file) for file in folder.rglob(f"c4-{split}.*.json.gz"))
    if not files:
        raise UserError(f"no files c4-{split}.*.json.gz in {folder}.")
    return files


def _identity(config: DataConfig, split: str) -> str:
    """What tells the documents of a split apart: too many to be read for that."""
    if config.path is None:
        return f"allenai/c4 {split}"
    files = map(Path, _files(config.path, split))
    return " ".join(f"{file.name} {gzip_checksum(file)}" for file in files)


def _read_files(files: list[str], field: str) -> Iterator[dict[str, str]]:
    # Not datasets' own reader of JSON, whose errors do not say which file and line.
    for file in files:
        for document in read_documents(Path(file), field):
            yield {field: document.text}


class _Documents(grain.IterDataset[str]):
    """The texts of a dataset, one shard after the other, the shards in a new order each epoch.

    Args:
        dataset: The dataset.
        field: The field that holds the text.
        origin: What to call the dataset in errors.
        seed: Seed of the order of the shards; ``None`` keeps the order.
        num_epochs: Passes over the dataset; ``None`` for no end.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        field: str,
        origin: str,
        seed: int | None,
        num_epochs: int | None,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.field = field
        self.origin = origin
        self.num_epochs = num_epochs
        self._seed = seed

    def __iter__(self) -> "_DocumentIterator":
        return _DocumentIterator(self)

    def order(self, epoch: int) -> np.ndarray:
        """The order of the shards in ``epoch``."""
        shards = self.dataset.num_shards
        if self._seed is None:
            return np.arange(shards)
        return np.random.default_rng([self._seed, epoch]).permutation(shards)


class _DocumentIterator(grain.DatasetIterator[str]):
    """Position: the epoch, how many of its shards are done, and ``datasets``' own inside the shard.

    ``datasets`` could shuffle, too, but its shuffle buffer is lost when a stream is resumed.
    """

    def __init__(self, documents: _Documents) -> None:
        super().__init__()
        self._documents = documents
        self._epoch = 0
        self._done = 0
        self._empty = True  # nothing seen of this epoch yet
        self._shard, self._rows = self._open_shard(None)

    def __next__(self) -> str:
        while self._documents.num_epochs is None or self._epoch < self._documents.num_epochs:
            try:
                row = next(self._rows)
            except StopIteration:
                self._advance()
                continue
            except UserError:
                raise
            except Exception as error:  # network, gzip, JSON: each library has its own
                origin = self._documents.origin
                raise UserError(f"{origin}: reading broke off ({error!r}).") from error
            text = row.get(self._documents.field)
            if not isinstance(text, str):
                raise UserError(
                    f"{self._documents.origin}: no text in field {self._documents.field!r}, the "
                    f"records have: {', '.join(row)}; set --text-field."
                )
            self._empty = False
            return text
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "done": self._done, "shard": self._shard.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._done, self._empty = state["epoch"], state["done"], False
        self._shard, self._rows = self._open_shard(copy.deepcopy(state["shard"]))

    def _advance(self) -> None:
        self._done += 1
        if self._done == self._documents.dataset.num_shards:
            if self._empty:
                raise UserError(f"{self._documents.origin}: there is no text in the data.")
            self._epoch, self._done, self._empty = self._epoch + 1, 0, True
        self._shard, self._rows = self._open_shard(None)

    def _open_shard(
        self, state: dict[str, Any] | None
    ) -> tuple[datasets.IterableDataset, Iterator[dict[str, Any]]]:
        dataset = self._documents.dataset
        index = int(self._documents.order(self._epoch)[self._done])
        shard = dataset.shard(num_shards=dataset.num_shards, index=index)
        if state is not None:
            shard.load_state_dict(state)
        return shard, iter(shard)
