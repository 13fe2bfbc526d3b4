"""minillm: the engine that a notebook explains is the engine that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.models.loader import load_model
    from minillm.models.tokenizer import get_tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "get_tokenizer", "load_model"]


def __getattr__(name: str) -> Any:
    """Import on first use: `minillm --help` need not wait for PyTorch."""
    if name == "load_model":
        from minillm.models.loader import load_model

        return load_model
    if name == "get_tokenizer":
        from minillm.models.tokenizer import get_tokenizer

        return get_tokenizer
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")
