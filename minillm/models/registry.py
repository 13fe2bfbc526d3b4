"""The table of families that minillm knows."""

from __future__ import annotations

from minillm.errors import UnsupportedModelError
from minillm.models.family import Family, Json
from minillm.models.gemma3 import GEMMA3
from minillm.models.glm4 import CHATGLM, GLM4_0414, GLM4_HF
from minillm.models.gpt2 import GPT2
from minillm.models.llama import LLAMA, MISTRAL
from minillm.models.opt import OPT
from minillm.models.qwen import QWEN2, QWEN3

FAMILIES = (GPT2, OPT, LLAMA, MISTRAL, QWEN2, QWEN3, CHATGLM, GLM4_HF, GLM4_0414, GEMMA3)


def family_of(config: Json) -> Family:
    """The family that a config.json belongs to, by its architecture, else by its model type."""
    architectures = config.get("architectures") or []
    if isinstance(architectures, str):
        architectures = [architectures]
    model_type = config.get("model_type")
    for family in FAMILIES:
        if set(architectures) & set(family.architectures):
            return family
    for family in FAMILIES:
        if not architectures and model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    name = ", ".join(architectures) or model_type or "none named in config.json"
    raise UnsupportedModelError(f"architecture not known: {name}; minillm reads {known}")


def gguf_family(architecture: str) -> Family:
    """The family of a GGUF file's ``general.architecture``."""
    for family in FAMILIES:
        if architecture in family.gguf:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.gguf)
    raise UnsupportedModelError(f"GGUF architecture not known: {architecture}; minillm reads {known}")
