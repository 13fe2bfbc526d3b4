"""GGUF files: weights (often quantised), configuration and tokenizer in one file, as llama.cpp publishes them.

Quantised tensors are dequantised while they are read, by the ``gguf`` library. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from minillm.errors import CheckpointError, ConfigError
from minillm.models.family import Family, Json
from minillm.models.registry import gguf_family
from minillm.transformer.decoder import DecoderConfig, LayerConfig
from minillm.transformer.positions import FrequencyFactors, RotaryConfig

ROPE_FACTORS = "rope_freqs.weight"
"""Where Llama 3's frequency scaling is stored, worked out."""


class _Reader(gguf.GGUFReader):
    """The library's reader over a plain array: its header parsing is four times slower over a `numpy.memmap`."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


@lru_cache(maxsize=2)
def open_gguf(path: Path) -> gguf.GGUFReader:
    """Map a GGUF file.

    Raises:
        CheckpointError: truncated, split over several files, or not GGUF.
    """
    try:
        reader = _Reader(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read; truncated, or not GGUF: {error}") from error
    if end > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated: its tensors end at byte {end}, the file at {path.stat().st_size}")
    if _value(reader, "split.count", 1) > 1:
        raise CheckpointError(f"{path} is one part of a split file: merge the parts first (llama-gguf-split --merge)")
    return reader


def metadata(path: Path) -> dict[str, Any]:
    """Every key and value of the file's header."""
    reader = open_gguf(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def gguf_config(path: Path) -> tuple[Family, DecoderConfig]:
    """The family and the decoder configuration that a GGUF file describes."""
    reader = open_gguf(path)
    architecture = _value(reader, "general.architecture", "not named")
    family = gguf_family(architecture)
    if _value(reader, f"{architecture}.expert_count", 0):
        raise ConfigError(f"{path.name} is a mixture of experts, which minillm does not run")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} has no tensor token_embd.weight: not a language model, or damaged")
    config = family.translate(_as_json(reader, architecture, tensors))
    config = replace(config, norm_weight_offset=0.0)  # GGUF stores Gemma's norms as 1 + w already
    if architecture == "llama":
        # Llama's q and k are stored with each head's two halves interleaved: rotate neighbours instead.
        config = _map_rotary(config, lambda rotary: replace(rotary, interleaved=True))
    if ROPE_FACTORS in tensors:
        factors = tuple(np.asarray(tensors[ROPE_FACTORS].data, dtype=np.float32).tolist())
        config = _map_rotary(config, lambda rotary: replace(rotary, scaling=FrequencyFactors(factors)))
    return family, config


def gguf_names(path: Path, family: Family, num_layers: int) -> dict[str, str]:
    """GGUF's name of each tensor → the published name without the family's prefix."""
    architecture = _value(open_gguf(path), "general.architecture", "")
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[architecture], num_layers)
    names = {}
    for module, _, _ in family.expand(num_layers):
        for published in (family.prefix + module, module):
            base = known.get_name(published)
            if base is not None:
                names |= {f"{base}.{end}": f"{module}.{end}" for end in ("weight", "bias")}
                break
    return names


def iterate_gguf(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (GGUF name, dequantised tensor); bf16 and fp16 as they are, the rest as fp32.

    Raises:
        CheckpointError: for a type that the ``gguf`` library cannot dequantise.
    """
    for tensor in open_gguf(path).tensors:
        if tensor.name != ROPE_FACTORS:
            yield tensor.name, _dequantize(tensor)


def _dequantize(tensor: gguf.ReaderTensor) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = gguf.GGMLQuantizationType
    if tensor.tensor_type == kind.F16:
        return torch.from_numpy(np.array(tensor.data)).view(shape)
    if tensor.tensor_type == kind.BF16:
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).view(shape)
    try:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, gguf.quants.QuantError) as error:
        raise CheckpointError(f"tensor {tensor.name} is of type {tensor.tensor_type.name}: {error}") from error
    return torch.from_numpy(np.array(data, dtype=np.float32)).view(shape)


def _value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _map_rotary(config: DecoderConfig, change: Any) -> DecoderConfig:
    def changed(layer: LayerConfig) -> LayerConfig:
        return layer if layer.rotary is None else replace(layer, rotary=change(layer.rotary))

    return replace(config, layers=tuple(changed(layer) for layer in config.layers))


def _as_json(reader: gguf.GGUFReader, architecture: str, tensors: Mapping[str, gguf.ReaderTensor]) -> Json:
    """The header under the keys of config.json, so that one translation serves both."""

    def get(key: str, default: Any = None) -> Any:
        return _value(reader, f"{architecture}.{key}", default)

    heads, hidden_size = get("attention.head_count"), get("embedding_length")
    if not heads or not hidden_size:
        raise ConfigError("the GGUF header lacks attention.head_count or embedding_length")
    if not isinstance(heads, int):
        raise ConfigError("layers with different numbers of heads are not implemented")
    size = get("attention.key_length") or hidden_size // heads
    config: dict[str, Any] = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": size,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "partial_rotary_factor": get("rope.dimension_count", size) / size,
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": _rope_scaling(get),
        "sliding_window": get("attention.sliding_window"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "final_logit_softcapping": get("final_logit_softcapping"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if architecture == "gpt2":
        config |= {
            "n_embd": hidden_size,
            "n_head": heads,
            "n_layer": get("block_count"),
            "n_positions": get("context_length"),
            "n_inner": get("feed_forward_length"),
            "layer_norm_epsilon": get("attention.layer_norm_epsilon", 1e-5),
        }
    if architecture == "gemma3":
        # The query scale is not stored: 1/√head_dim, but for the 27B model (62 layers), as llama.cpp has it too.
        config["query_pre_attn_scalar"] = hidden_size // heads if get("block_count") == 62 else size
        config["sliding_window_pattern"] = get("attention.sliding_window_pattern")
        config["rope_local_base_freq"] = get("rope.freq_base_swa", 10000.0)
    return config


def _rope_scaling(get: Any) -> Json | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "attention_factor": get("rope.scaling.attn_factor"),
    }
