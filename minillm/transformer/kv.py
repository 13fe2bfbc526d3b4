"""The one seam between a model and its memory: the key/value store.

Attention projects q, k and v, rotates them, and hands them to a store. The store saves this call's k and v wherever
it likes and lets q see everything that it may see. The model does not change when the store does::

    kv.begin(batch)                      # what this call's tokens are
    out = kv.attend(layer, q, k, v)      # once a layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.errors import InvalidRequestError
from minillm.transformer.attention import attend, attention_mask
from minillm.transformer.positions import Rotation


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends; given to a store when it is made.

    Attributes:
        scale: multiplies q·k before the softmax (Vaswani et al. 2017, §3.2.1: 1/√head_dim).
        causal: a query sees no later position.
        window: a query sees at most this many positions, itself included (Mistral 7B, §2: sliding window).
        soft_cap: scores become ``cap * tanh(scores / cap)`` (Gemma 2, §2).
    """

    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True)
class PaddedBatch:
    """One call's tokens as rows, padded on the right to the longest.

    Attributes:
        starts: position of each row's first token: how many tokens of that sequence came in earlier calls.
        lengths: how many tokens of each row are real.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def full(cls, batch_size: int, seq_len: int, start: int = 0) -> PaddedBatch:
        """Rows of one length, without padding."""
        return cls((start,) * batch_size, (seq_len,) * batch_size)

    @property
    def seq_len(self) -> int:
        """Width of the padded rows."""
        return max(self.lengths)

    @property
    def end(self) -> int:
        """One more than the largest position of a real token."""
        return max(start + length for start, length in zip(self.starts, self.lengths, strict=True))

    @cached_property
    def is_ragged(self) -> bool:
        """Whether any row holds padding."""
        return min(self.lengths) < max(self.lengths)

    def positions(self, device: torch.device | str = "cpu") -> Int[Tensor, "batch seq"]:
        """Position of each token in its sequence; padding repeats the row's last position."""
        starts = torch.tensor(self.starts, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        steps = torch.arange(self.seq_len, device=device)
        return starts[:, None] + torch.minimum(steps[None, :], lengths[:, None] - 1)

    def is_real(self, device: torch.device | str = "cpu") -> Bool[Tensor, "batch seq"]:
        """True where a token is real, False where it is padding."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.seq_len, device=device)[None, :] < lengths[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad_id: int = 0) -> Int[Tensor, "batch seq"]:
    """Token lists as one tensor, as wide as the longest."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])


@runtime_checkable
class KVStore(Protocol):
    """Where keys and values live. ``*tokens`` is ``batch seq`` for padded rows, ``tokens`` for a ragged batch."""

    remembers: bool
    """Whether tokens of earlier calls are still seen; if not, every call must bring the whole sequence."""

    def begin(self, batch: Any) -> None:
        """Announce one call's tokens (a `PaddedBatch`, or what a ragged store asks for)."""

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "*tokens heads head_dim"],
        k: Float[Tensor, "*tokens kv_heads head_dim"],
        v: Float[Tensor, "*tokens kv_heads head_dim"],
    ) -> Float[Tensor, "*tokens heads head_dim"]:
        """Save this call's k and v; attend q to everything that it may see."""


@runtime_checkable
class FusedStore(KVStore, Protocol):
    """A store that can turn queries and keys by their positions while it saves the keys."""

    @property
    def fuses(self) -> bool:
        """Whether it has an operation that does both."""

    def rotate_and_attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        rotation: Rotation,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """`attend` with q and k turned."""

    def takes_layers(self, layers: Any) -> bool:
        """Whether it has an operation that does all these layers for this call's tokens."""

    def run_layers(self, layers: Any, x: Float[Tensor, "tokens hidden"], rotation: Rotation) -> None:
        """Make of x, in place, what all layers make of it; their weights are as that operation takes them."""


@runtime_checkable
class ReorderableStore(KVStore, Protocol):
    """A store of rows that can be copied over one another, as the beams of beam search are."""

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Row i goes on from what row ``rows[i]`` has kept."""


@runtime_checkable
class CachedConfig(Protocol):
    """What a store that remembers must know of a model: the decoder-only and the encoder/decoder's both tell it."""

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int: ...


@runtime_checkable
class CachedModel(Protocol):
    """A model that such a store can be made to fit."""

    @property
    def config(self) -> CachedConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class NoCache:
    """The store that keeps nothing: plain attention over this call's tokens (notebook stage: attention).

    Differentiable, so it is also the store to train with.
    """

    remembers = False

    def __init__(self, specs: Sequence[AttentionSpec]) -> None:
        self.specs = tuple(specs)
        self._batch = PaddedBatch((), ())
        self._masks: dict[AttentionSpec, Bool[Tensor, "batch 1 seq seq"] | None] = {}

    def begin(self, batch: PaddedBatch) -> None:
        if any(batch.starts):
            raise InvalidRequestError("a store that keeps nothing needs whole sequences: every row starts at 0")
        self._batch = batch
        self._masks = {}

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Nothing is kept, so there is nothing to reorder."""

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        v: Float[Tensor, "batch seq kv_heads head_dim"],
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        spec = self.specs[layer]
        if spec not in self._masks:
            self._masks[spec] = self._mask(spec, q.device)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attend(q, k, v, self._masks[spec], scale=spec.scale, causal=spec.causal, soft_cap=spec.soft_cap)
        return out.transpose(1, 2)

    def _mask(self, spec: AttentionSpec, device: torch.device) -> Bool[Tensor, "batch 1 seq seq"] | None:
        """Who sees whom, or None where the shape says it all (causal or full, no window, nothing to hide)."""
        window_hides = spec.window is not None and self._batch.seq_len > spec.window
        padding_hides = not spec.causal and self._batch.is_ragged
        if not window_hides and not padding_hides:
            return None
        # Rows, not positions, are compared: a padded token must not hide the real ones before it.
        steps = torch.arange(self._batch.seq_len, device=device)
        mask = attention_mask(steps, steps, causal=spec.causal, window=spec.window)
        if padding_hides:
            # Padded queries see the real keys too, so that no row is wholly masked.
            return (mask & self._batch.is_real(device)[:, None, :])[:, None]
        return mask[None, None].expand(len(self._batch.lengths), -1, -1, -1)
