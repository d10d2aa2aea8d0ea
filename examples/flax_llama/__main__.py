"""``python -m examples.flax_llama``."""

import sys

from examples.flax_llama.cli import main

sys.exit(main())
