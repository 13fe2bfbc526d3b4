"""What one family of published models is: a translation of its config.json and a table of its weight names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minillm.errors import ConfigError
from minillm.transformer.decoder import DecoderConfig, LayerConfig
from minillm.transformer.positions import (
    LinearScaling,
    Llama3Scaling,
    RotaryConfig,
    RotaryScaling,
    YarnScaling,
    yarn_mscale,
)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One row of the table of known models.

    Attributes:
        architectures: names in config.json's ``architectures``; then its ``model_type``.
        translate: config.json (or what stands for it in a GGUF file) to a `DecoderConfig`.
        weights: published module name → our module name, ``*`` for the layer's number, without ``.weight`` or
            ``.bias``. ``[q]``, ``[k]``, ``[v]``, ``[gate]``, ``[up]`` name a part of a packed projection.
        prefix: of the published names; a checkpoint of the bare model leaves it out.
        more_prefixes: others that have been published.
        ignored: patterns of published names that hold nothing to load.
        transposed: published modules whose matrices are stored as [in, out] (GPT-2's Conv1D).
        gguf: architectures of GGUF files that hold this family.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    translate: Callable[[Json], DecoderConfig]
    weights: Mapping[str, str]
    prefix: str = ""
    more_prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    gguf: tuple[str, ...] = ()

    def strip_prefix(self, name: str) -> str:
        """A published name as the table has it."""
        for prefix in (self.prefix, *self.more_prefixes):
            if prefix and name.startswith(prefix):
                return name.removeprefix(prefix)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a published name (prefix stripped) may be left unread."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def expand(self, num_layers: int) -> Iterator[tuple[str, str, bool]]:
        """(published module, our module, transposed) for every layer."""
        for published, ours in self.weights.items():
            for number in range(num_layers) if "*" in published else (0,):
                yield (
                    published.replace("*", str(number)),
                    ours.replace("*", str(number)),
                    published in self.transposed,
                )


LLAMA_WEIGHTS = {
    "embed_tokens": "embedding",
    "layers.*.input_layernorm": "layers.*.attention_norm.norm",
    "layers.*.self_attn.q_proj": "layers.*.attention.qkv[q]",
    "layers.*.self_attn.k_proj": "layers.*.attention.qkv[k]",
    "layers.*.self_attn.v_proj": "layers.*.attention.qkv[v]",
    "layers.*.self_attn.o_proj": "layers.*.attention.out",
    "layers.*.post_attention_layernorm": "layers.*.feed_forward_norm.norm",
    "layers.*.mlp.gate_proj": "layers.*.feed_forward.gate_up[gate]",
    "layers.*.mlp.up_proj": "layers.*.feed_forward.gate_up[up]",
    "layers.*.mlp.down_proj": "layers.*.feed_forward.down",
    "norm": "final_norm",
    "lm_head": "head",
}
"""The names that Llama gave and most later families kept."""

LLAMA_IGNORED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")
"""Frequencies that old checkpoints stored, though they follow from the configuration."""

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def need(config: Json, key: str) -> Any:
    """A value that config.json must have."""
    value = config.get(key)
    if value is None:
        raise ConfigError(f"the model's config has no {key!r}: the folder is damaged, or of another architecture")
    return value


def refuse(config: Json, **usual: Any) -> None:
    """Raise for options whose value is not the usual one: they change the model in ways not implemented."""
    for key, value in usual.items():
        if config.get(key) not in (None, value):
            raise ConfigError(f"the model's config sets {key}={config[key]!r}; only {value!r} is implemented")


def activation(config: Json, key: str, default: str) -> str:
    """The feed-forward network's activation."""
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        raise ConfigError(f"the model's config sets {key}={name!r}; implemented: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def head_dim(config: Json, default: int | None = None) -> int:
    """Channels a head: said, or hidden_size / num_attention_heads."""
    said = config.get("head_dim") or default
    return said or need(config, "hidden_size") // need(config, "num_attention_heads")


def rotary(
    config: Json,
    *,
    theta: float = 10000.0,
    partial: float = 1.0,
    interleaved: bool = False,
    layer_type: str | None = None,
    default_head_dim: int | None = None,
) -> RotaryConfig:
    """Rotary positions from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

    Args:
        theta: base when the config says none.
        partial: share of each head that is rotated when the config says none.
        layer_type: which of the entries, where they differ by layer type (Gemma 3).
    """
    rope: dict[str, Any] = dict(config.get("rope_parameters") or {})
    if layer_type is not None and layer_type in rope:
        rope = dict(rope[layer_type] or {})
    if layer_type != "sliding_attention":  # as in transformers, rope_scaling wins where both are there
        scaling = dict(config.get("rope_scaling") or {})
        rope |= scaling | ({"rope_type": scaling["type"]} if "type" in scaling else {})
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or partial
    return RotaryConfig(
        dim=int(head_dim(config, default_head_dim) * share),
        base=float(rope.get("rope_theta") or config.get("rope_theta") or theta),
        interleaved=interleaved,
        scaling=_scaling(rope, config),
    )


def _scaling(rope: Json, config: Json) -> RotaryScaling | None:
    kind = rope.get("rope_type") or "default"
    original = int(rope.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(float(need(rope, "factor")))
        case "llama3":
            return Llama3Scaling(
                float(need(rope, "factor")),
                original,
                float(need(rope, "low_freq_factor")),
                float(need(rope, "high_freq_factor")),
            )
        case "yarn":
            return YarnScaling(
                float(need(rope, "factor")),
                original,
                beta_fast=float(rope.get("beta_fast") or 32),
                beta_slow=float(rope.get("beta_slow") or 1),
                attention_factor=_yarn_attention_factor(rope),
                truncate=rope.get("truncate", True),
            )
    raise ConfigError(f"rotary scaling {kind!r} is not implemented; these are: default, linear, llama3, yarn")


def _yarn_attention_factor(rope: Json) -> float | None:
    """Said outright, or DeepSeek's quotient of two temperatures, or left to the paper's formula."""
    said = rope.get("attention_factor")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if said is None and mscale and mscale_all_dim:
        return yarn_mscale(rope["factor"], mscale) / yarn_mscale(rope["factor"], mscale_all_dim)
    return said


def same_layers(config: Json, layer: LayerConfig) -> tuple[LayerConfig, ...]:
    """Every layer alike."""
    return (layer,) * int(need(config, "num_hidden_layers"))


def windowed_layers(
    config: Json, near: LayerConfig, far: LayerConfig, is_near: Callable[[int], bool]
) -> tuple[LayerConfig, ...]:
    """Layers of two kinds, with a sliding window and without: as ``layer_types`` says, else as `is_near` does."""
    kinds = {"sliding_attention": near, "full_attention": far}
    count = int(need(config, "num_hidden_layers"))
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if is_near(number) else "full_attention" for number in range(count)]
    if len(types) != count:
        raise ConfigError(f"layer_types names {len(types)} layers, num_hidden_layers says {count}")
    if unknown := set(types) - set(kinds):
        raise ConfigError(f"layer type {unknown.pop()!r} is not implemented; these are: {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in types)


def llama_like(config: Json, *, layers: tuple[LayerConfig, ...], **different: Any) -> DecoderConfig:
    """The keys that Llama's config.json and its descendants' share; `different` overrides."""
    refuse(config, num_local_experts=0, num_experts=0)
    common: dict[str, Any] = {
        "vocab_size": need(config, "vocab_size"),
        "hidden_size": need(config, "hidden_size"),
        "num_heads": need(config, "num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads") or need(config, "num_attention_heads"),
        "head_dim": head_dim(config),
        "intermediate_size": need(config, "intermediate_size"),
        "max_position_embeddings": need(config, "max_position_embeddings"),
        "layers": layers,
        "qkv_bias": bool(config.get("attention_bias", False)),
        "attention_out_bias": bool(config.get("attention_bias", False)),
        "activation": activation(config, "hidden_act", "silu"),
        "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }
    return DecoderConfig(**(common | different))
