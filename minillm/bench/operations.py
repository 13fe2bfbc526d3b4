"""The small operations, each by its kernel and by PyTorch: what a kernel is worth there, on the CPU or on the GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from minillm.bench.timing import graph_seconds, seconds_in_turn
from minillm.errors import ConfigError
from minillm.transformer.positions import Rotation, apply_rotary
from minillm.transformer.sampling import draw, transform
from minillm.transformer.twins import PACKAGES

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 576, 1536, 9, 3, 64, 16
"""SmolLM2-135M's shapes."""
GPU_HIDDEN, GPU_INTERMEDIATE, GPU_HEADS, GPU_KV_HEADS, GPU_HEAD_DIM = 2048, 8192, 32, 8, 64
"""Llama-3.2-1B's."""
TOKENS = (1, 64, 1024)
ROUNDS, WARM_UPS = 180, 20


class Operation(NamedTuple):
    """One operation done twice."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def operations(tokens: int, dtype: torch.dtype, device: str) -> list[Operation]:
    """All of them on random numbers."""
    sizes = (HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM)
    if device == "cuda":
        sizes = (GPU_HIDDEN, GPU_INTERMEDIATE, GPU_HEADS, GPU_KV_HEADS, GPU_HEAD_DIM)
    hidden, intermediate, heads, kv_heads, head_dim = sizes
    make: dict[str, Any] = {"dtype": dtype, "device": device}
    x, added = torch.randn(tokens, hidden, **make), torch.zeros(tokens, hidden, **make)
    weight = torch.ones(hidden, **make)
    norm, rotary, silu = (
        importlib.import_module(f"{PACKAGES[device]}.{name}") for name in ("rms_norm", "rotary", "silu_mul")
    )
    packed = torch.randn(tokens, heads + 2 * kv_heads, head_dim, **make)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(tokens, head_dim // 2, device=device) * 6
    rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype), False)
    cache = torch.zeros(2, tokens // BLOCK_SIZE + 1, kv_heads, BLOCK_SIZE, head_dim, **make)
    slots = torch.randperm(tokens, device=device)
    gate_up = torch.randn(tokens, 2 * intermediate, **make)

    def add_norm() -> object:
        x.add_(added)
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def rotate_write() -> object:
        block, place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        cache[0][block, :, place], cache[1][block, :, place] = apply_rotary(k, rotation), v
        return apply_rotary(q, rotation)

    def gate() -> object:
        gated, up = gate_up.chunk(2, dim=-1)
        return F.silu(gated) * up

    return [
        Operation(
            "RMSNorm",
            lambda: norm.rms_norm(x, weight, 1e-5),
            lambda: F.rms_norm(x, weight.shape, weight, 1e-5),
        ),
        Operation("residual sum + RMSNorm", lambda: norm.add_rms_norm(x, added, weight, 1e-5), add_norm),
        Operation(
            "rotary",
            lambda: rotary.rotate(q, k, rotation.cos, rotation.sin, interleaved=False),
            lambda: (apply_rotary(q, rotation), apply_rotary(k, rotation)),
        ),
        Operation(
            "rotary + KV write",
            lambda: rotary.rotate_and_write(q, k, v, rotation.cos, rotation.sin, *cache, slots, interleaved=False),
            rotate_write,
        ),
        Operation("silu · mul", lambda: silu.silu_mul(gate_up), gate),
    ]


VOCABULARY, SPREAD = 49_152, 3.0
"""SmolLM2's; and the standard deviation of the logits."""


def sampler_table(device: str) -> Table:
    """The sampler's parts, all PyTorch's operations: there is no kernel to compare them with."""
    table = Table("rows", "likeliest", "top-k 50", "top-p 0.9", "both", "draw", title="the sampler, ms")
    for rows in (1, 64):
        logits = torch.randn(rows, VOCABULARY, device=device) * SPREAD
        works: list[Callable[[], object]] = [
            partial(torch.max, logits, dim=-1),
            partial(transform, logits, 0.8, top_k=50),
            partial(transform, logits, 0.8, top_p=0.9),
            partial(transform, logits, 0.8, top_k=50, top_p=0.9),
            partial(draw, logits.softmax(dim=-1), torch.rand(rows, device=device)),
        ]
        if device == "cuda":
            works = [partial(_synchronised, work) for work in works]
        table.add_row(f"{rows}", *(f"{seconds * 1e3:.2f}" for seconds in seconds_in_turn(works, 20, warm_ups=3)))
    return table


def _synchronised(work: Callable[[], object]) -> None:
    work()
    torch.cuda.synchronize()


@torch.inference_mode()
def main(device: str) -> None:
    """Measure; print what the sampler takes, and last the table of kernels.

    Args:
        device: "cpu" or "cuda"; there, kernels are timed on the GPU alone (in a CUDA graph), so that launches do not
            count.

    Raises:
        ConfigError: there is no such device.
    """
    if device not in PACKAGES or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device must be cpu, or cuda where there is an NVIDIA GPU, not {device!r}")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table("operation", "dtype", "tokens", "kernel, µs", "PyTorch, µs", "kernel is faster", title=name)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            for operation in operations(tokens, dtype, device):
                if device == "cuda":
                    ours, theirs = (graph_seconds([work] * 20) for work in operation[1:])
                else:
                    ours, theirs = seconds_in_turn(operation[1:], ROUNDS, warm_ups=WARM_UPS)
                table.add_row(
                    operation.name,
                    str(dtype).removeprefix("torch."),
                    f"{tokens:,}",
                    f"{ours * 1e6:.1f}",
                    f"{theirs * 1e6:.1f}",
                    f"{theirs / ours:.1f}×",
                )
    Console(width=120).print(sampler_table(device), table)
