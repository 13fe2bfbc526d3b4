"""GGUF files: weights (often quantised), configuration and tokenizer in one file, as llama.cpp publishes them.

Quantised tensors are dequantised while they are read, by the ``gguf`` library. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from minillm.errors import CheckpointError, ConfigError
from minillm.models.checkpoint import StoredTensor, row_ranges
from minillm.models.family import Family, Json, need
from minillm.models.registry import gguf_family
from minillm.text import some
from minillm.transformer.decoder import DecoderConfig, LayerConfig
from minillm.transformer.positions import FrequencyFactors, RotaryConfig, yarn_mscale

ROPE_FACTORS = "rope_freqs.weight"
"""Where Llama 3's frequency scaling is stored, worked out."""

_NAMES = {
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "layers.*.attention_norm.norm": "blk.*.attn_norm",
    "layers.*.attention.qkv": "blk.*.attn_qkv",
    "layers.*.attention.qkv[q]": "blk.*.attn_q",
    "layers.*.attention.qkv[k]": "blk.*.attn_k",
    "layers.*.attention.qkv[v]": "blk.*.attn_v",
    "layers.*.attention.q_norm": "blk.*.attn_q_norm",
    "layers.*.attention.k_norm": "blk.*.attn_k_norm",
    "layers.*.attention.out": "blk.*.attn_output",
    "layers.*.attention_norm.out_norm": "blk.*.post_attention_norm",
    "layers.*.feed_forward_norm.norm": "blk.*.ffn_norm",
    "layers.*.feed_forward.up": "blk.*.ffn_up",
    "layers.*.feed_forward.gate_up": "blk.*.ffn_up",
    "layers.*.feed_forward.gate_up[gate]": "blk.*.ffn_gate",
    "layers.*.feed_forward.gate_up[up]": "blk.*.ffn_up",
    "layers.*.feed_forward.down": "blk.*.ffn_down",
    "layers.*.feed_forward_norm.out_norm": "blk.*.post_ffw_norm",
    "final_norm": "output_norm",
    "head": "output",
}
"""Our module name → GGUF's, for every architecture."""


class _Array(gguf.ReaderField):
    """An array that has been read: its values, where the library keeps two NumPy arrays for each of them.

    For a vocabulary of 49,152 those take 80 MB.
    """

    def contents(self, index_or_slice: int | slice = slice(None)) -> Any:
        return self.parts[0][index_or_slice]


class _Reader(gguf.GGUFReader):
    """The library's reader, faster, smaller and sure of its bounds.

    Its header parsing is four times slower over a `numpy.memmap` than over a plain array; and past the end of a file
    it reads nothing without a word, so that a damaged length would send it looping.
    """

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._mapped = mapped
        self._data = np.asarray(mapped)

    def give_back(self) -> None:
        """Forget the pages read so far; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED)

    def _push_field(self, field: gguf.ReaderField, skip_sum: bool = False) -> int:
        if gguf.GGUFValueType.ARRAY in field.types[:1]:
            with suppress(ValueError):  # text that is none: said when somebody asks for it
                field = _Array(field.offset, field.name, [field.contents()], [0], field.types)
        return super()._push_field(field, skip_sum)

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError(f"at byte {offset}, more is announced than the file's {len(self._data)} bytes hold")
        return found


def open_gguf(path: Path) -> _Reader:
    """Map a GGUF file.

    Raises:
        CheckpointError: truncated, split over several files, or not GGUF.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _open(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)
def _open(path: Path, changed: int, size: int) -> _Reader:
    """Kept open while the file stays as it is: the header of a large vocabulary takes seconds to read."""
    try:
        with np.errstate(over="ignore"):
            reader = _Reader(path)
    except (ValueError, OSError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read; truncated, or not GGUF: {error}") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} was written for machines of the other byte order: convert it again")
    if _value(reader, "split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one part of a split file: merge the parts first (llama-gguf-split --merge)")
    return reader


def metadata(path: Path) -> dict[str, Any]:
    """Every key and value of the file's header."""
    reader = open_gguf(path)
    return {key: _value(reader, key) for key in reader.fields if not key.startswith("GGUF.")}


def gguf_config(path: Path) -> tuple[Family, DecoderConfig]:
    """The family and the decoder configuration that a GGUF file describes."""
    reader = open_gguf(path)
    header = _Header(reader, str(_value(reader, "general.architecture", "not named")))
    family = replace(gguf_family(header.architecture), transposed=frozenset())  # GGUF stores all as [out, in]
    if header.get("expert_count"):
        raise ConfigError(f"{path.name} is a mixture of experts, which minillm does not run")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} has no tensor token_embd.weight: not a language model, or damaged")
    config = replace(
        family.translate(_as_json(header, tensors)),
        norm_weight_offset=0.0,  # GGUF stores Gemma's norms as 1 + w already
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        attention_out_bias="blk.0.attn_output.bias" in tensors,
        feed_forward_bias="blk.0.ffn_up.bias" in tensors,
    )
    _check_size(path, config, tensors)
    if "blk.0.attn_qkv.weight" in tensors:
        family = _fused(family)
    return family, _map_rotary(config, lambda rotary: _rotary(rotary, header, tensors))


def gguf_names(path: Path, family: Family, num_layers: int) -> dict[str, str]:
    """GGUF's name of each tensor → the published name without the family's prefix.

    Raises:
        CheckpointError: when the file lacks some of these tensors.
    """
    present = {tensor.name for tensor in open_gguf(path).tensors}
    names: dict[str, str] = {}
    missing = []
    for published, ours in family.weights.items():
        for number in map(str, range(num_layers) if "*" in published else (0,)):
            base, module = _NAMES[ours].replace("*", number), published.replace("*", number)
            names |= {f"{base}.{end}": f"{module}.{end}" for end in ("weight", "bias")}
            if ours != "head" and f"{base}.weight" not in present:  # the head may be the embedding
                missing.append(f"{base}.weight")
    if missing:
        raise CheckpointError(f"{path.name} lacks the tensors {some(missing)}: damaged, or not whole")
    return names


def iterate_gguf(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Every (GGUF name, tensor), dequantised as it is read; bf16 and fp16 as they are, the rest as fp32.

    Raises (from the blocks):
        CheckpointError: for a type that the ``gguf`` library cannot dequantise.
    """
    reader = open_gguf(path)
    for tensor in reader.tensors:
        if tensor.name != ROPE_FACTORS:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            yield tensor.name, StoredTensor(shape, partial(_gguf_blocks, reader, tensor, shape))


BLOCK_ELEMENTS = 2**20
"""Numbers that are dequantised at a time: fewer than are copied, for there are several copies on the way."""


def _gguf_blocks(reader: _Reader, tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    whole = len(shape) < 2  # quantised rows are wholes, a vector may be one of them
    for rows in (slice(None),) if whole else row_ranges(shape, BLOCK_ELEMENTS):
        yield _dequantize(tensor, tensor.data[rows]).view(-1, *shape[1:])
        reader.give_back()


def _dequantize(tensor: gguf.ReaderTensor, data: Any) -> Tensor:
    kind = gguf.GGMLQuantizationType
    if tensor.tensor_type == kind.F16:
        return torch.from_numpy(np.array(data))
    if tensor.tensor_type == kind.BF16:
        return torch.from_numpy(np.array(data)).view(torch.bfloat16)
    try:
        numbers = gguf.dequantize(data, tensor.tensor_type)
    except (NotImplementedError, gguf.quants.QuantError) as error:
        raise CheckpointError(f"tensor {tensor.name} is of type {tensor.tensor_type.name}: {error}") from error
    copied = numbers if numbers.flags.writeable and numbers.dtype == np.float32 else np.array(numbers, np.float32)
    return torch.from_numpy(copied)


def _value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    try:
        return default if field is None else field.contents()
    except (ValueError, LookupError) as error:
        raise CheckpointError(f"the GGUF header's {key} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Header:
    """The values under the architecture's name, checked: a damaged header must not ask for the impossible."""

    reader: gguf.GGUFReader
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it stands; one for all layers where a list says the same for each."""
        value = _value(self.reader, f"{self.architecture}.{key}", default)
        return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value

    def count(self, key: str, default: int | None = None) -> Any:
        """A whole number from 1."""
        value = self.get(key, default)
        if isinstance(value, list):
            raise ConfigError(f"{self.architecture}.{key} differs from layer to layer, which is not implemented")
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ConfigError(f"the GGUF header says {self.architecture}.{key}={value!r}; a number from 1 is expected")
        return value

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number above 0."""
        value = self.get(key, default)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ConfigError(f"the GGUF header says {self.architecture}.{key}={value!r}; a number above 0 is expected")
        return value


def _as_json(header: _Header, tensors: Mapping[str, gguf.ReaderTensor]) -> Json:
    """The header under the keys of config.json, so that one translation serves both."""
    heads, hidden_size = header.count("attention.head_count"), header.count("embedding_length")
    layers = header.count("block_count")
    if not heads or not hidden_size or not layers:
        raise ConfigError("the GGUF header lacks attention.head_count, embedding_length or block_count")
    if layers > len(tensors):
        raise CheckpointError(f"the GGUF header announces {layers} layers, the file holds {len(tensors)} tensors")
    size = header.count("attention.key_length", hidden_size // heads)
    config: dict[str, Any] = {
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.count("attention.head_count_kv", heads),
        "head_dim": size,
        "intermediate_size": header.count("feed_forward_length"),
        "max_position_embeddings": header.count("context_length"),
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": header.number("rope.freq_base"),
        "rope_scaling": _rope_scaling(header),
        "final_logit_softcapping": header.number("final_logit_softcapping"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if header.architecture == "gpt2":
        config |= {
            "n_embd": hidden_size,
            "n_head": heads,
            "n_layer": layers,
            "n_positions": config["max_position_embeddings"],
            "n_inner": config["intermediate_size"],
            "layer_norm_epsilon": header.number("attention.layer_norm_epsilon", 1e-5),
        }
    if header.architecture == "gemma3":
        # The query scale is not stored: 1/√head_dim, but for the 27B model (62 layers), as llama.cpp has it too.
        config["query_pre_attn_scalar"] = hidden_size // heads if layers == 62 else size
        config["rope_local_base_freq"] = header.number("rope.freq_base_swa", 10000.0)
        config |= _windows(header, layers)
    return config


def _windows(header: _Header, layers: int) -> Json:
    """Which of Gemma's layers look back over a window: none, where no window is said; all but each n-th; or a list."""
    if not header.get("attention.sliding_window"):
        return {"layer_types": ["full_attention"] * layers}
    window, pattern = header.count("attention.sliding_window"), header.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        types = ["sliding_attention" if near else "full_attention" for near in pattern]
        return {"sliding_window": window, "layer_types": types}
    return {"sliding_window": window, "sliding_window_pattern": header.count("attention.sliding_window_pattern")}


def _rope_scaling(header: _Header) -> Json | None:
    """Positions stretched by a factor: linearly, where no type is said (the oldest files have another key, too)."""
    factor = header.number("rope.scaling.factor", header.number("rope.scale_linear"))
    kind = header.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor is None):
        return None
    # config.json's attention factor, or llama.cpp's, which multiplies what YaRN's formula gives
    attention, multiplier = header.number("rope.scaling.yarn_attn_factor"), header.number("rope.scaling.attn_factor")
    if kind == "yarn" and attention is None and multiplier is not None:
        attention = multiplier * yarn_mscale(need({"rope.scaling.factor": factor}, "rope.scaling.factor"))
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": header.count("rope.scaling.original_context_length"),
        "attention_factor": attention,
        "beta_fast": header.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": header.number("rope.scaling.yarn_beta_slow"),
    }


def _check_size(path: Path, config: DecoderConfig, tensors: Mapping[str, gguf.ReaderTensor]) -> None:
    """Raise, before memory is asked for, when the header describes a far larger model than the file holds."""
    heads = 2 * (config.num_heads + config.num_kv_heads)
    layer = config.hidden_size * (heads * config.head_dim + 2 * config.intermediate_size)
    positions = config.max_position_embeddings * config.hidden_size if config.positions == "learned" else 0
    described = config.num_layers * layer + config.vocab_size * config.hidden_size + positions
    held = sum(int(tensor.n_elements) for tensor in tensors.values())
    if described > 2 * held:
        raise CheckpointError(
            f"{path.name} describes a model of {described:,} parameters and holds tensors for {held:,}: damaged, or "
            "not whole"
        )


def _fused(family: Family) -> Family:
    """The family with q, k and v in one tensor, which every architecture may have."""
    rest = {name: ours for name, ours in family.weights.items() if not ours.startswith("layers.*.attention.qkv")}
    return replace(family, weights=rest | {"blk.*.attn_qkv": "layers.*.attention.qkv"})


def _map_rotary(config: DecoderConfig, change: Callable[[RotaryConfig], RotaryConfig]) -> DecoderConfig:
    def changed(layer: LayerConfig) -> LayerConfig:
        return layer if layer.rotary is None else replace(layer, rotary=change(layer.rotary))

    return replace(config, layers=tuple(changed(layer) for layer in config.layers))


def _rotary(rotary: RotaryConfig, header: _Header, tensors: Mapping[str, gguf.ReaderTensor]) -> RotaryConfig:
    """What GGUF says of rotary positions in its own way."""
    rotary = replace(rotary, dim=header.count("rope.dimension_count", rotary.dim))
    if header.architecture == "llama":
        # Llama's q and k are stored with each head's two halves interleaved: rotate neighbours instead.
        rotary = replace(rotary, interleaved=True)
    if header.architecture == "glm4" and header.get("rope.dimension_sections"):
        # The text half of GLM-4's vision models, stored the other way round.
        rotary = replace(rotary, interleaved=False)
    if ROPE_FACTORS not in tensors:
        return rotary
    factors = tuple(np.asarray(tensors[ROPE_FACTORS].data, dtype=np.float32).flatten().tolist())
    if len(factors) != rotary.dim // 2:
        raise CheckpointError(f"{ROPE_FACTORS} holds {len(factors)} factors for {rotary.dim // 2} pairs of channels")
    if rotary.scaling is not None:
        raise ConfigError(f"rope.scaling together with {ROPE_FACTORS} is not implemented")
    return replace(rotary, scaling=FrequencyFactors(factors))
