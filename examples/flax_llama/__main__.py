"""``python -m examples.flax_llama``."""

import os
import sys

# On a CPU, OpenBLAS's threads would spin against XLA's over the small factorisations of a refresh.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from examples.flax_llama.cli import main

sys.exit(main())
