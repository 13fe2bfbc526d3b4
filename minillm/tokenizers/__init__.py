"""Readers for the forms in which tokenizers are published, beyond what transformers reads."""
