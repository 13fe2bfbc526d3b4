"""The encoder/decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017), whole.

The encoder reads the source once; every decoder layer keeps its cross-attention keys and values of it (`Memory`). The
decoder then writes the target, one token a step, on any key/value store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.checks import check_sizes, check_token_ids
from minillm.errors import ConfigError, InvalidRequestError
from minillm.transformer.blocks import CrossAttentionBlock, TransformerBlock
from minillm.transformer.feed_forward import ACTIVATIONS, FeedForward
from minillm.transformer.kv import AttentionSpec, KVStore, NoCache, PaddedBatch
from minillm.transformer.multi_head import CrossAttention, MultiHeadAttention
from minillm.transformer.norms import LayerNorm
from minillm.transformer.positions import sinusoidal_positions


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes of an encoder/decoder; the defaults are the paper's base model (§3, Table 3).

    Attributes:
        vocab_size: of the one vocabulary that source and target share (§5.1).
        max_position_embeddings: the longest source or target. Sinusoids have no end; memory and training do.
        dropout: on each sublayer's output, and on embeddings plus positions (§5.4).
        norm_placement: "post" is the paper's; "pre" trains without warm-up (Xiong et al. 2020).
        attention_bias: whether the attention projections have biases (the paper writes none in §3.2.2).
    """

    vocab_size: int
    hidden_size: int = 512
    num_heads: int = 8
    intermediate_size: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    max_position_embeddings: int = 1024
    dropout: float = 0.1
    activation: str = "relu"
    norm_placement: Literal["post", "pre"] = "post"
    norm_eps: float = 1e-5
    attention_bias: bool = True

    def __post_init__(self) -> None:
        check_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "num_heads",
            "intermediate_size",
            "num_encoder_layers",
            "num_decoder_layers",
            "max_position_embeddings",
        )
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.norm_placement not in ("post", "pre"):
            raise ConfigError(f"norm_placement must be 'post' or 'pre', not {self.norm_placement!r}")

    @classmethod
    def base(cls, vocab_size: int = 37_000) -> Seq2SeqConfig:
        """The paper's base model, 63.1 million parameters with its English-German vocabulary (§5.1, Table 3)."""
        return cls(vocab_size)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """As many as query heads: grouped heads came later."""
        return self.num_heads

    @property
    def encoder_specs(self) -> tuple[AttentionSpec, ...]:
        """The encoder's self-attention: every token sees every token (§3.2.3, second item)."""
        return (AttentionSpec(self.head_dim**-0.5, causal=False),) * self.num_encoder_layers

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """The decoder's self-attention, which a key/value store serves: no token sees a later one (third item)."""
        return (AttentionSpec(self.head_dim**-0.5, causal=True),) * self.num_decoder_layers

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one target token's keys and values take over all decoder layers."""
        return 2 * self.num_decoder_layers * self.hidden_size * dtype.itemsize


class Memory(NamedTuple):
    """What the decoder sees of the sources: cross-attention keys and values, computed once.

    Attributes:
        keys: one tensor a decoder layer.
        values: likewise.
        mask: True where a source token is real; None where nothing is padding.
    """

    keys: tuple[Float[Tensor, "batch heads source head_dim"], ...]
    values: tuple[Float[Tensor, "batch heads source head_dim"], ...]
    mask: Bool[Tensor, "batch 1 1 source"] | None

    def select(self, rows: Int[Tensor, "rows"]) -> Memory:
        """A memory whose row i is a copy of row ``rows[i]``: a source repeated for each of its beams."""
        mask = None if self.mask is None else self.mask[rows]
        return Memory(tuple(k[rows] for k in self.keys), tuple(v[rows] for v in self.values), mask)


class Seq2Seq(nn.Module):
    """Source and target token ids in, logits of the next target token out.

    One embedding table serves the source, the target and, read the other way round, the output (§3.4).
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(_encoder_block(config, layer) for layer in range(config.num_encoder_layers))
        self.decoder = nn.ModuleList(_decoder_block(config, layer) for layer in range(config.num_decoder_layers))
        # Post-norm blocks end in a norm of their own; what leaves pre-norm blocks has seen none.
        self.encoder_norm = _make_norm(config) if config.norm_placement == "pre" else None
        self.decoder_norm = _make_norm(config) if config.norm_placement == "pre" else None
        if self.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights to train from.

        The paper does not say how. As in the Annotated Transformer, matrices are Xavier uniform (Glorot & Bengio 2010,
        eq. 16); as in the paper's own tensor2tensor code, embeddings are normal(0, hidden^-0.5), so that √hidden times
        them is about 1. Biases are 0.
        """
        nn.init.normal_(self.embedding.weight, std=self.config.hidden_size**-0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                # q, k and v are packed into one matrix, but each is drawn as the square matrix that it is.
                parts = {"qkv": 3, "kv": 2}.get(name.split(".")[-1], 1)
                for matrix in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(matrix)
                if module.bias is not None:
                    module.bias.zero_()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """The layers that look at the source, one a decoder block."""
        return [module for module in self.decoder.modules() if isinstance(module, CrossAttention)]

    def embed(
        self, tokens: Int[Tensor, "batch seq"], positions: Int[Tensor, "#batch seq"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Embeddings times √hidden (§3.4) plus sinusoidal positions (§3.5), under dropout (§5.4)."""
        x = self.embedding(tokens) * math.sqrt(self.config.hidden_size)
        return self.dropout(x + sinusoidal_positions(positions, self.config.hidden_size).to(x.dtype))

    def encode(self, source: Int[Tensor, "batch source"], lengths: Sequence[int] | None = None) -> Memory:
        """Read the sources, once.

        Args:
            source: padded on the right with any token id.
            lengths: how many tokens of each row are real; all of them when None.

        Raises:
            InvalidRequestError: sources that are empty or too long, lengths that do not fit them.
        """
        self._check_tokens("source", source)
        batch = _source_batch(source, lengths)
        kv = NoCache(self.config.encoder_specs)
        kv.begin(batch)
        x = self.embed(source, torch.arange(source.shape[1], device=source.device)[None])
        for block in self.encoder:
            x = block(x, None, kv)
        if self.encoder_norm is not None:
            x = self.encoder_norm(x)
        keys, values = zip(*(layer.keys_values(x) for layer in self.cross_attentions), strict=True)
        return Memory(keys, values, batch.is_real(source.device)[:, None, None] if batch.is_ragged else None)

    def hidden(
        self,
        target: Int[Tensor, "batch target"],
        positions: Int[Tensor, "#batch target"],
        kv: KVStore,
        memory: Memory,
    ) -> Float[Tensor, "batch target hidden"]:
        """The last decoder layer's output, before the head; `kv.begin` has been called for these target tokens."""
        x = self.embed(target, positions)
        for block, k, v in zip(self.decoder, memory.keys, memory.values, strict=True):
            x = block(x, k, v, memory.mask, kv)
        return x if self.decoder_norm is None else self.decoder_norm(x)

    def logits(self, hidden: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens vocab"]:
        """Scores of the next token: the embedding table read the other way round (§3.4)."""
        return F.linear(hidden, self.embedding.weight)

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch target"],
        source_lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits after every target token, all at once: teacher forcing, differentiable.

        Args:
            target: starts with the start token; may be padded on the right: no token sees a later one.

        Raises:
            InvalidRequestError: tokens that are no ``[batch, seq]``, empty or too long, lengths that do not fit.
        """
        self._check_tokens("target", target)
        if len(source) != len(target):
            raise InvalidRequestError(f"{len(source)} sources need as many targets, not {len(target)}")
        kv = NoCache(self.config.attention_specs)
        kv.begin(PaddedBatch.full(*target.shape))
        positions = torch.arange(target.shape[1], device=target.device)[None]
        return self.logits(self.hidden(target, positions, kv, self.encode(source, source_lengths)))

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        longest = self.config.max_position_embeddings
        if tokens.ndim != 2 or not tokens.numel():
            raise InvalidRequestError(f"{name} must be [batch, seq] with at least one token, not {list(tokens.shape)}")
        if tokens.shape[1] > longest:
            raise InvalidRequestError(f"{name} has {tokens.shape[1]} tokens, the model takes {longest}: shorten it")


def check_eval_mode(model: Seq2Seq) -> None:
    """Raise InvalidRequestError where dropout would make an answer random."""
    if model.training and model.config.dropout > 0:
        raise InvalidRequestError("the model is in training mode, where dropout is random: call model.eval() first")


@torch.inference_mode()
def cross_attention_weights(
    model: Seq2Seq, source: Sequence[int], target: Sequence[int]
) -> Float[Tensor, "layers heads target source"]:
    """How much each target token looks at each source token: softmax(q·kᵀ/√head_dim), each row's sum 1 (§3.2.1).

    A hook on each cross-attention layer takes what the layer is given, and goes as far as the softmax.

    Raises:
        InvalidRequestError: as `Seq2Seq.forward`, for ids that the model does not have, and for a model with dropout
            in training mode.
    """
    check_eval_mode(model)
    check_token_ids({*source, *target}, model.config.vocab_size)
    weights: list[Tensor] = []

    def look(layer: CrossAttention, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        x, k, _, _ = inputs
        weights.append((layer.queries(x) @ k.transpose(-1, -2) * layer.head_dim**-0.5).softmax(dim=-1))

    hooks = [layer.register_forward_pre_hook(look) for layer in model.cross_attentions]
    try:
        model(torch.tensor([source], device=model.device), torch.tensor([target], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(weights)


def _source_batch(source: Int[Tensor, "batch source"], lengths: Sequence[int] | None) -> PaddedBatch:
    batch_size, width = source.shape
    if lengths is None:
        return PaddedBatch.full(batch_size, width)
    if len(lengths) != batch_size or min(lengths) < 1 or max(lengths) != width:
        raise InvalidRequestError(
            f"{batch_size} sources padded to {width} tokens need {batch_size} lengths of at least 1, the largest "
            f"{width}, not {list(lengths)}: cut the padding that no row needs"
        )
    return PaddedBatch((0,) * batch_size, tuple(lengths))


def _make_norm(config: Seq2SeqConfig) -> nn.Module:
    return LayerNorm(config.hidden_size, config.norm_eps)


def _attention(config: Seq2SeqConfig, layer: int) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.hidden_size,
        config.num_heads,
        config.num_heads,
        config.head_dim,
        layer=layer,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
    )


def _feed_forward(config: Seq2SeqConfig) -> FeedForward:
    return FeedForward(config.hidden_size, config.intermediate_size, config.activation)


def _encoder_block(config: Seq2SeqConfig, layer: int) -> TransformerBlock:
    make_norm = partial(_make_norm, config)
    return TransformerBlock(
        _attention(config, layer), _feed_forward(config), config.norm_placement, make_norm, config.dropout
    )


def _decoder_block(config: Seq2SeqConfig, layer: int) -> CrossAttentionBlock:
    return CrossAttentionBlock(
        _attention(config, layer),
        CrossAttention(config.hidden_size, config.num_heads, config.head_dim, bias=config.attention_bias),
        _feed_forward(config),
        config.norm_placement,
        partial(_make_norm, config),
        config.dropout,
    )
