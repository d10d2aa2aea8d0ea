"""Tokenizers: a byte-level BPE trained here, or one from a file or the Hugging Face hub."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.flax_llama.data.corpus import Example
from examples.flax_llama.errors import UserError

_PAD, _BOS, _EOS = "<pad>", "<bos>", "<eos>"
_SMALLEST = 256 + 3  # every byte, and the three above
_LARGEST = 2**20  # the library sets memory aside for all of them, and aborts if there is too little

_KNOWN_BOS = (_BOS, "<s>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]")
_KNOWN_EOS = (_EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")
_KNOWN_PAD = (_PAD, "[PAD]")
_KNOWN_UNK = ("<unk>", "[UNK]")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909).

    Args:
        texts: What to learn the merges from.
        vocab_size: Number of ids; fewer come out if the text does not have that many pairs.

    Raises:
        UserError: If ``vocab_size`` has no room for the bytes, or is beyond all sense.
    """
    if vocab_size < _SMALLEST:
        raise UserError(f"--vocab-size of a trained BPE must be >= {_SMALLEST}, got {vocab_size}.")
    if vocab_size > _LARGEST:
        raise UserError(f"--vocab-size of a trained BPE must be <= {_LARGEST}, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A {_EOS}", special_tokens=[(_BOS, 1), (_EOS, 2)]
    )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a ``tokenizer.json``, or the tokenizer of that name from the Hugging Face hub.

    Raises:
        UserError: If there is none.
    """
    path = Path(name).expanduser()
    if not path.exists() and path.suffix == ".json":
        raise UserError(f"tokenizer {name} does not exist.")
    try:
        with quiet_hub():
            tokenizer = (
                Tokenizer.from_file(str(path))
                if path.is_file()
                else Tokenizer.from_pretrained(name)
            )
    except Exception as error:  # the library raises nothing more specific
        raise UserError(
            f"cannot load the tokenizer {name!r} ({error}); give the path of a tokenizer.json."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the Hugging Face hub's client from telling of each try; the last error is raised."""
    # Not at the top: most data needs no hub.
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_id(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


class Encoder:
    """A tokenizer together with the layout of its ids.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Ids at or above this become the unknown token; the tokenizer's own number by
            default.
        length: Cut each text, its closing tokens included, to so many ids.

    Raises:
        UserError: If ids would have to be replaced and there is no unknown token.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int | None = None, length: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.length = length
        if length:
            tokenizer.enable_truncation(length)
        self.bos_id = _first_id(tokenizer, _KNOWN_BOS)
        self.eos_id = _first_id(tokenizer, _KNOWN_EOS)
        self.pad_id = _first_id(tokenizer, _KNOWN_PAD) or 0
        total = tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = vocab_size or total
        self._unk_id = _first_id(tokenizer, _KNOWN_UNK)
        if self.vocab_size < total and (self._unk_id is None or self._unk_id >= self.vocab_size):
            raise UserError(
                f"--vocab-size {vocab_size} is less than the tokenizer's {total} ids, and it has "
                "no unknown token to stand for the rest; leave --vocab-size out."
            )

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def separator(self) -> int:
        """The id that comes between documents.

        Raises:
            UserError: If the tokenizer has none.
        """
        separator = self.eos_id if self.bos_id is None else self.bos_id
        if separator is None:
            raise UserError(
                "the tokenizer has no token that begins or ends a document (looked for "
                f"{', '.join(_KNOWN_BOS + _KNOWN_EOS)})."
            )
        return separator

    def flat(self, texts: Sequence[str], starts: Sequence[bool]) -> np.ndarray:
        """All ids of ``texts``, end to end, with the separator before each text that starts."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        pieces = []
        for encoding, start in zip(encodings, starts, strict=True):
            pieces.append([self.separator] * start)
            pieces.append(encoding.ids)
        return self._known(np.concatenate([np.asarray(piece, np.int64) for piece in pieces]))

    def padded(self, texts: Sequence[str]) -> Example:
        """One row of ``length`` ids for each text, cut or padded at its end."""
        encodings = self.tokenizer.encode_batch_fast(list(texts))
        tokens = np.full((len(texts), self.length or 0), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, encoding in enumerate(encodings):
            ids = encoding.ids
            tokens[row, : len(ids)], mask[row, : len(ids)] = self._known(np.asarray(ids)), True
        return {"tokens": tokens, "mask": mask}

    def _known(self, ids: np.ndarray) -> np.ndarray:
        if self._unk_id is None:
            return ids
        return np.where(ids < self.vocab_size, ids, self._unk_id)
