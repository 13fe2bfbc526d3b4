"""Tensor parallelism: the matrices of one model divided among ranks (Shoeybi et al. 2019, "Megatron-LM", §3).

Every rank runs the same `Decoder`, only narrower: some of each layer's heads, some of its feed-forward units, some rows
of the vocabulary. The first matrix of a sublayer is cut by what comes out of it (q, k, v by heads, gate and up by
units), the second by what goes in, so that what lies between needs no word from another rank: a layer's ranks speak
twice, when the outputs of its two sublayers are summed up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.transformer.decoder import DecoderConfig

MOST_RANKS = 64
"""Numbers of ranks that an error message looks through."""


@runtime_checkable
class Ranks(Protocol):
    """This rank's place among all, and how they speak; every rank calls the same in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """The sum of all ranks' x, on every rank; x may be overwritten."""
        ...

    def all_gather(self, x: Float[Tensor, "*tokens part"]) -> Float[Tensor, "*tokens whole"]:
        """All ranks' x behind each other in their last dimension, on every rank."""
        ...


class VocabParallelEmbedding(nn.Embedding):
    """The rows of one rank; a token of another rank's is zeros here, and the sum over ranks is its embedding."""

    def __init__(self, vocab_size: int, size: int, ranks: Ranks) -> None:
        rows = vocab_rows(vocab_size, ranks.size)
        super().__init__(rows, size, _weight=torch.empty(rows, size))
        self.ranks = ranks

    def forward(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens size"]:
        local = tokens - self.ranks.rank * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.all_reduce(x.masked_fill(elsewhere[..., None], 0))


def vocab_rows(vocab_size: int, size: int) -> int:
    """Rows of the vocabulary that each rank holds; behind the last token stand zeros."""
    return -(-vocab_size // size)


def shard_config(config: DecoderConfig, size: int) -> DecoderConfig:
    """The decoder of one rank of so many. Where there are more ranks than key/value heads, some hold the same ones.

    Raises:
        ConfigError: heads or feed-forward units that cannot be divided so.
    """
    if not _divides(config, size):
        possible = [str(number) for number in range(1, MOST_RANKS + 1) if _divides(config, number)]
        raise ConfigError(
            f"{config.num_heads} heads, {config.num_kv_heads} key/value heads and {config.intermediate_size} "
            f"feed-forward units cannot be divided among {size} ranks: tensor_parallel_size may be "
            f"{', '.join(possible)}"
        )
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
    )


def _divides(config: DecoderConfig, size: int) -> bool:
    heads = config.num_kv_heads
    return not (config.num_heads % size or config.intermediate_size % size or (heads % size and size % heads))


class Cut(NamedTuple):
    """What one rank keeps of a whole matrix ``[out, in]``; None is all."""

    rows: tuple[range, ...] | None = None
    columns: tuple[range, ...] | None = None


def cut_of(module: str, part: str, config: DecoderConfig, rank: int, size: int) -> Cut:
    """What a rank keeps of the matrix of one of `Decoder`'s modules, or of a named part of a packed one.

    Args:
        module: its name in the decoder.
        part: ``q``, ``k``, ``v``, ``gate``, ``up``, or nothing for the whole of the module's matrix.
        config: of the whole model.
    """
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    q = _share(heads, rank, size)
    kv_rank = rank if config.num_kv_heads >= size else rank * config.num_kv_heads // size
    k = _share(kv_heads, kv_rank, min(size, config.num_kv_heads))
    units = _share(config.intermediate_size, rank, size)
    vocab = vocab_rows(config.vocab_size, size)
    own_vocab = range(min(rank * vocab, config.vocab_size), min((rank + 1) * vocab, config.vocab_size))
    match module.rpartition(".")[2]:
        case "qkv":
            packed = (q, _behind(k, heads), _behind(k, heads + kv_heads))
            return Cut({"q": (q,), "k": (k,), "v": (k,)}.get(part, packed))
        case "gate_up":
            return Cut((units,) if part else (units, _behind(units, config.intermediate_size)))
        case "up":
            return Cut((units,))
        case "out":
            return Cut(columns=(q,))
        case "down":
            return Cut(columns=(units,))
        case "embedding" | "head":
            return Cut((own_vocab,))
    return Cut()


def _share(total: int, rank: int, size: int) -> range:
    return range(total * rank // size, total * (rank + 1) // size)


def _behind(rows: range, start: int) -> range:
    return range(start + rows.start, start + rows.stop)
