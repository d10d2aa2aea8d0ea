"""Programs that show optax_gale at work."""
