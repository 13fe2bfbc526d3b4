"""minillm: the engine that a notebook explains is the engine that runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.engine.outputs import CompletionOutput, RequestOutput
    from minillm.engine.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
    from minillm.llm import LLM
    from minillm.models.loader import load_model
    from minillm.models.tokenizer import get_tokenizer

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "get_tokenizer",
    "load_model",
]

_HOMES = {
    "LLM": "minillm.llm",
    "BeamSearchParams": "minillm.engine.params",
    "SamplingParams": "minillm.engine.params",
    "StructuredOutputsParams": "minillm.engine.params",
    "CompletionOutput": "minillm.engine.outputs",
    "RequestOutput": "minillm.engine.outputs",
    "load_model": "minillm.models.loader",
    "get_tokenizer": "minillm.models.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `minillm --help` need not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minillm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
