"""The data sources by name."""

import platform
from pathlib import Path

from examples.flax_llama.data.config import DataConfig
from examples.flax_llama.data.corpus import Corpus
from examples.flax_llama.data.files import file_identity, find_text, read_documents
from examples.flax_llama.data.stdlib import content_hash, find_sources, read_source
from examples.flax_llama.data.text import TextFiles, prepare_text
from examples.flax_llama.data.tokens import prepare_tokens


def load(config: DataConfig) -> Corpus:
    """Prepares the data that ``config`` names; the first time this may take a while.

    Raises:
        UserError: If the data is missing, damaged or too little, in one line that says which file.
    """
    if config.source == "tokens":
        return prepare_tokens(config)
    if config.source == "c4":
        # Here: it imports datasets and JAX, which nobody else needs to wait for.
        from examples.flax_llama.data.c4 import prepare_c4

        return prepare_c4(config)
    if config.source == "stdlib":
        files = find_sources()
        text = TextFiles(files, read_source, content_hash(files))
        origin = f"Python {platform.python_version()} standard library"
        return prepare_text(config, origin, text, None)
    assert config.path is not None  # DataConfig checks
    return prepare_text(
        config,
        str(config.path),
        _text_files(config, config.path),
        _text_files(config, config.validation_path) if config.validation_path else None,
    )


def _text_files(config: DataConfig, path: Path) -> TextFiles:
    files = find_text(path)
    identity = " ".join([config.text_field, *map(file_identity, files)])
    return TextFiles(files, lambda file: read_documents(file, config.text_field), identity)
