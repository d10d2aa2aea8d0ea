"""Text for training: ``load`` prepares it, ``train_batches`` and ``validation_batches`` read it.

Importing this package imports neither JAX nor Grain, so a command line built on ``DataConfig``
answers at once.
"""

from examples.flax_llama.data.batches import train_batches, validation_batches
from examples.flax_llama.data.config import DataConfig
from examples.flax_llama.data.corpus import Corpus
from examples.flax_llama.data.loading import load

__all__ = ["Corpus", "DataConfig", "load", "train_batches", "validation_batches"]
