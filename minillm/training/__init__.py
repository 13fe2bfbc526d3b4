"""Training: a small trainer, and the corpora that the project generates for itself."""
