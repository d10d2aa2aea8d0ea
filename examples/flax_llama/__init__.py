"""A LLaMA in Flax, its data and its training script."""
