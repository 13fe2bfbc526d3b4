"""The decoder-only Transformer: one class for every family, driven by one frozen configuration.

A family of published models (GPT-2, Llama, Gemma, …) is a row of `DecoderConfig` (see ``minillm/models``), never a
subclass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.checks import check_sizes
from minillm.errors import ConfigError, InvalidRequestError
from minillm.transformer import fused
from minillm.transformer.blocks import NormPlacement, TransformerBlock
from minillm.transformer.feed_forward import ACTIVATIONS, FeedForward, GatedFeedForward
from minillm.transformer.kv import AttentionSpec, KVStore, NoCache, PaddedBatch
from minillm.transformer.linear import PackedEmbedding, PackedLinear
from minillm.transformer.multi_head import MultiHeadAttention
from minillm.transformer.norms import LayerNorm, RMSNorm
from minillm.transformer.parallel import Ranks, VocabParallelEmbedding, shard_config
from minillm.transformer.positions import (
    LearnedPositions,
    RotaryConfig,
    RotaryEmbedding,
    Rotation,
    sinusoidal_positions,
)


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer: how far it looks back, and how it is told positions."""

    window: int | None = None
    rotary: RotaryConfig | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder from another. Sizes are counts; `None` means "as usual".

    Attributes:
        layers: one entry a layer.
        embedding_size: width of the token embedding where it differs from `hidden_size` (OPT-350m).
        embedding_scale: multiplies the token embeddings (Gemma: √hidden_size).
        positions: added to the embeddings; rotary positions belong to the layers.
        position_offset: unused rows before position 0 in a learned table (OPT: 2).
        attention_scale: multiplies q·k; 1/√head_dim when None.
        norm_weight_offset: added to RMSNorm weights (Gemma: 1).
        logits_soft_cap: logits become ``cap * tanh(logits / cap)`` (Gemma 2).
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    positions: Literal["none", "sinusoidal", "learned"] = "none"
    position_offset: int = 0
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    activation: str = "silu"
    gated: bool = True
    feed_forward_bias: bool = False
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    norm_weight_offset: float = 0.0
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    tied_head: bool = True
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        check_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        for layer in self.layers:
            if layer.rotary is not None and (layer.rotary.dim % 2 or layer.rotary.dim > self.head_dim):
                raise ConfigError(f"rotary dim {layer.rotary.dim} must be even and at most head_dim ({self.head_dim})")
            if layer.window is not None and layer.window < 1:
                raise ConfigError(f"a sliding window must be at least 1 token, not {layer.window}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """What a key/value store must know of each layer."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return tuple(AttentionSpec(scale, True, layer.window, self.attention_soft_cap) for layer in self.layers)

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


class Decoder(nn.Module):
    """Token ids in, logits of the next token out; works on ``[batch, seq]`` and on a flat ``[tokens]`` alike.

    Args:
        config: of the whole model.
        ranks: where each of several ranks holds a part of it: heads, feed-forward units and vocabulary are divided.

    Attributes:
        whole_config: of the whole model.
        config: of what is held here, which is what a key/value store must know.
    """

    def __init__(self, config: DecoderConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.whole_config = config
        self.config = config = config if ranks is None else shard_config(config, ranks.size)
        embedding_size = config.embedding_size or config.hidden_size
        self.embedding: nn.Embedding | VocabParallelEmbedding | PackedEmbedding = (
            nn.Embedding.from_pretrained(torch.empty(config.vocab_size, embedding_size), freeze=False)
            if ranks is None
            else VocabParallelEmbedding(config.vocab_size, embedding_size, ranks)
        )
        self.project_in: nn.Linear | None = None
        self.project_out: nn.Linear | None = None
        if embedding_size != config.hidden_size:
            self.project_in = nn.Linear(embedding_size, config.hidden_size, bias=False)
            self.project_out = nn.Linear(config.hidden_size, embedding_size, bias=False)
        self.position_embedding: LearnedPositions | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(
                config.max_position_embeddings, config.hidden_size, config.position_offset
            )
        self.rotaries = {layer.rotary: RotaryEmbedding(layer.rotary) for layer in config.layers if layer.rotary}
        self.layers = nn.ModuleList(_make_block(config, number, ranks) for number in range(config.num_layers))
        self.final_norm = _make_norm(config) if config.final_norm else None
        self._fuses = fused.fuses(cast("Iterable[TransformerBlock]", self.layers), self.final_norm)
        self.gathered: Any = None
        self.head: nn.Module | None = (
            None if config.tied_head else nn.Linear(embedding_size, self.embedding.num_embeddings, bias=False)
        )
        if self.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Fresh weights to train from: matrices and embeddings normal(0, std), biases 0 (Radford et al. 2018, §4.1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def make_head(self) -> None:
        """Make the head a linear layer also where it is the embedding table, whose memory the two then share."""
        if self.head is None:
            vocab_size, size = self.embedding.weight.shape
            self.head = nn.Linear(size, vocab_size, bias=False, device="meta")
            self.head.weight = cast(nn.Parameter, self.embedding.weight)

    def look_up_in_head(self) -> None:
        """Give a tied table back where the packed head, which is the same numbers, can be read instead."""
        head = self.head
        if self.config.tied_head and self.ranks is None and isinstance(head, PackedLinear) and head.few is not None:
            self.embedding = PackedEmbedding(head)

    def gather_layers(self) -> None:
        """From now on do all layers by one operation for a few tokens, if it can; the weights stay as they are."""
        rotaries = {layer.rotary for layer in self.config.layers}
        if self._fuses and len(rotaries) == 1 and None not in rotaries:
            with torch.no_grad():
                self.gathered = fused.gather(cast("Iterable[TransformerBlock]", self.layers))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed(
        self, tokens: Int[Tensor, "*tokens"], positions: Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens hidden"]:
        """Token embeddings, scaled and projected as the family does, plus absolute positions if it has any."""
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' dtype first, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu").item()
        if self.project_in is not None:
            x = self.project_in(x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal_positions(positions, self.config.hidden_size).to(x.dtype)
        return x

    def hidden(
        self, tokens: Int[Tensor, "*tokens"], positions: Int[Tensor, "*tokens"], kv: KVStore
    ) -> Float[Tensor, "*tokens hidden"]:
        """The last layer's output, before the head; `kv.begin` has been called for these tokens."""
        x = self.embed(tokens, positions)
        rotations: dict[RotaryConfig | None, Rotation | None] = {None: None}
        for rotary, embedding in self.rotaries.items():
            rotations[rotary] = embedding(positions, x.dtype)
        blocks = cast("Iterable[TransformerBlock]", self.layers)
        layers = zip(blocks, (rotations[layer.rotary] for layer in self.config.layers), strict=True)
        if self._fuses and self.final_norm is not None and fused.takes_part(kv):
            rotation = rotations[self.config.layers[0].rotary]
            if self.gathered is not None and rotation is not None and kv.takes_layers(self.gathered):
                kv.run_layers(self.gathered, x, rotation)
                return self.final_norm(x)
            return fused.run_layers(layers, self.final_norm, x, kv)
        for layer, rotation in layers:
            x = layer(x, rotation, kv)
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, hidden: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens vocab"]:
        """Scores of the next token. A tied head is the embedding table read the other way round."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        logits = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        if self.ranks is not None:
            logits = self.ranks.all_gather(logits)[..., : self.config.vocab_size]
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        tokens: Int[Tensor, "*tokens"],
        positions: Int[Tensor, "*tokens"] | None = None,
        kv: KVStore | None = None,
    ) -> Float[Tensor, "*tokens vocab"]:
        """Logits for every token.

        Args:
            positions: of the tokens in their sequences; needed with a store, else 0, 1, 2, … in each row.
            kv: a store on which `begin` has been called for these tokens; without one, tokens are whole sequences
                ``[batch, seq]`` and nothing is kept.
        """
        if kv is None:
            if tokens.ndim != 2 or not tokens.numel():
                shape = list(tokens.shape)
                raise InvalidRequestError(f"without a key/value store, tokens must be [batch, seq], not {shape}")
            kv = NoCache(self.config.attention_specs)
            kv.begin(PaddedBatch.full(*tokens.shape))
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if positions is None:
            raise InvalidRequestError("with a key/value store, say the tokens' positions: batch.positions()")
        return self.logits(self.hidden(tokens, positions, kv))


def _make_norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "layer_norm":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_weight_offset)


def _make_block(config: DecoderConfig, number: int, ranks: Ranks | None) -> TransformerBlock:
    attention = MultiHeadAttention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        layer=number,
        qkv_bias=config.qkv_bias,
        out_bias=config.attention_out_bias,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        qk_norm_offset=config.norm_weight_offset,
    )
    make_feed_forward = GatedFeedForward if config.gated else FeedForward
    feed_forward = make_feed_forward(
        config.hidden_size, config.intermediate_size, config.activation, bias=config.feed_forward_bias
    )
    return TransformerBlock(attention, feed_forward, config.norm_placement, partial(_make_norm, config), ranks=ranks)
