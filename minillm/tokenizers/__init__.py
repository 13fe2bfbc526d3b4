"""Byte-pair encoding from scratch, and readers for the forms of tokenizers that transformers does not read."""
