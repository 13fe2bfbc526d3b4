"""Real checkpoints: where they come from, how each family's configuration and weight names translate to ours."""
