"""What tests of kernels share: a ragged batch over scattered blocks, the same attention in float64 without any blocks;
the check of rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.transformer.positions import RotaryConfig, RotaryEmbedding, apply_rotary


class Case(NamedTuple):
    """`arguments` are those of `paged_attention`; `keys` and `values` are each sequence's, [kv_heads, length, dim]."""

    arguments: tuple[Tensor, ...]
    scale: float
    keys: list[Tensor]
    values: list[Tensor]


def make_case(
    queries: Sequence[int],
    lengths: Sequence[int],
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    shared: int = 0,
) -> Case:
    """Blocks in random order; slots and blocks that hold nothing hold NaN, and tables end in a block of NaN.

    Args:
        shared: blocks that all sequences begin with; none is shorter.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    cache = torch.full((2, num_blocks, kv_heads, block_size, head_dim), float("nan"))
    tables = torch.full((len(lengths), max(counts) + 1), order[-1])
    keys, values = [], []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = tables[0, :shared].tolist() if row else []
        blocks += [order.pop(0) for _ in range(count - len(blocks))]
        tables[row, :count] = torch.tensor(blocks)
        stored = torch.randn((2, kv_heads, length, head_dim), generator=generator).to(dtype).float()
        if row:
            common = slice(shared * block_size)
            stored[0, :, common], stored[1, :, common] = keys[0][:, common], values[0][:, common]
        for number, block in enumerate(blocks):
            part = stored[:, :, number * block_size : (number + 1) * block_size]
            cache[:, block, :, : part.shape[2]] = part
        keys.append(stored[0])
        values.append(stored[1])
    q = torch.randn((sum(queries), kv_heads * group, head_dim), generator=generator).to(dtype)
    starts = torch.tensor([0, *queries]).cumsum(0)
    k_cache, v_cache = cache.to(dtype).to(device)
    arguments = (q.to(device), k_cache, v_cache, tables.to(device), starts.to(device), torch.tensor(lengths).to(device))
    return Case(arguments, head_dim**-0.5, keys, values)


def float64_attention(case: Case, *, window: int | None = None, soft_cap: float | None = None) -> Tensor:
    """softmax(q·kᵀ·scale)·v, written out, one query at a time."""
    q, *_, starts, lengths = (tensor.cpu() for tensor in case.arguments)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        start, end = int(starts[row]), int(starts[row + 1])
        for token in range(start, end):
            seen = slice(max(0, length - (end - 1 - token) - (window or length)), length - (end - 1 - token))
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // len(case.keys[row]))
                scores = case.keys[row][kv_head, seen].double() @ q[token, head].double() * case.scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out[token, head] = scores.softmax(0) @ case.values[row][kv_head, seen].double()
    return out


def check_rotary(kernel, heads, kv_heads, head_dim, dim, interleaved, dtype, device) -> None:
    """A kernel's `rotate` of queries and keys, as they come out of the packed projection, against `apply_rotary`."""
    torch.manual_seed(0)
    packed = torch.randn(5, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k = packed[:, :heads], packed[:, heads : heads + kv_heads]
    rotation = RotaryEmbedding(RotaryConfig(dim, interleaved=interleaved))(torch.tensor([0, 7, 1, 90, 3]), dtype)
    on_device = packed.to(device)
    q_there, k_there = on_device[:, :heads], on_device[:, heads : heads + kv_heads]
    assert kernel.supports(q_there, k_there)
    ours = kernel.rotate(
        q_there, k_there, rotation.cos.to(device), rotation.sin.to(device), interleaved=rotation.interleaved
    )
    for x, turned in zip((q, k), ours, strict=True):
        expected = apply_rotary(x.double(), rotation._replace(cos=rotation.cos.double(), sin=rotation.sin.double()))
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(turned.cpu().double(), expected, atol=tolerance, rtol=tolerance)
