"""The Triton kernels compiled for GPUs that are not here: registers, spills, shared memory, the instructions wanted.

What is compiled is what the package's functions launch, on tensors of a model's sizes. It is compiled in a process of
its own, which runs this file: where Triton's interpreter is on, nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from minillm.kernels.gpu import paged_attention, rms_norm, rotary, silu_mul, write_kv
from minillm.kernels.gpu.compiled import SHARED_MEMORY, compile_ahead

CAPABILITIES = [80, 90]
PROCESSORS = 132
"""Multiprocessors of an H100: a single query of 16,384 keys is divided into as many parts as can be."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
KERNELS = (
    (paged_attention, "_attend", "_merge"),
    (rms_norm, "_rms_norm"),
    (rotary, "_rotate"),
    (silu_mul, "_silu_mul"),
    (write_kv, "_write"),
)


def attention(dtype: str, group: int, head_dim: int, max_query_len: int, **options: Any) -> None:
    kind, kv_heads, blocks = DTYPES[dtype], 2, 1024
    packed = torch.empty(max_query_len, (group + 2) * kv_heads, head_dim, dtype=kind)
    cache = torch.empty(2, kv_heads, 16, head_dim, dtype=kind)
    table, starts, lengths = torch.zeros(1, blocks).long(), torch.zeros(2).long(), torch.zeros(1).long()
    paged_attention.paged_attention(
        packed[:, : group * kv_heads],
        cache,
        cache,
        table,
        starts,
        lengths,
        max_query_len=max_query_len,
        scale=0.1,
        **options,
    )


def write(dtype: str) -> None:
    packed, cache = torch.empty(3, 48, 128, dtype=DTYPES[dtype]), torch.empty(2, 8, 16, 128, dtype=DTYPES[dtype])
    write_kv.write_kv(cache, cache, packed[:, 32:40], packed[:, 40:], torch.zeros(3).long())


def norm(dtype: str, size: int) -> None:
    rms_norm.rms_norm(torch.empty(3, size, dtype=DTYPES[dtype]), torch.empty(size, dtype=DTYPES[dtype]), 1e-6)


def norm_of_heads(dtype: str) -> None:
    packed = torch.empty(3, 48, 128, dtype=DTYPES[dtype])
    rms_norm.rms_norm(packed[:, :32], packed[0, 0], 1e-6)


def add_and_norm(dtype: str, size: int) -> None:
    x = torch.empty(3, size, dtype=DTYPES[dtype])
    rms_norm.add_rms_norm(x, x, x[0], 1e-6)


def rotate(dtype: str, dim: int, *, interleaved: bool) -> None:
    packed, angles = torch.empty(3, 48, 128, dtype=DTYPES[dtype]), torch.empty(3, dim // 2, dtype=DTYPES[dtype])
    rotary.rotate(packed[:, :32], packed[:, 32:40], angles, angles, interleaved=interleaved)


def rotate_and_write(dtype: str) -> None:
    packed, cache = torch.empty(3, 48, 128, dtype=DTYPES[dtype]), torch.empty(2, 8, 16, 128, dtype=DTYPES[dtype])
    angles, slots = torch.empty(3, 64, dtype=DTYPES[dtype]), torch.zeros(3).long()
    q, k, v = packed[:, :32], packed[:, 32:40], packed[:, 40:]
    rotary.rotate_and_write(q, k, v, angles, angles, cache, cache, slots, interleaved=False)


def gate(dtype: str) -> None:
    silu_mul.silu_mul(torch.empty(3, 2 * 11_008, dtype=DTYPES[dtype]))


ATTENTION: dict[str, Callable[[], None]] = {
    "bf16 4x128 decode": partial(attention, "bf16", 4, 128, 1),
    "fp16 3x64 decode": partial(attention, "fp16", 3, 64, 1),
    "bf16 4x128 decode, window": partial(attention, "bf16", 4, 128, 1, window=4096),
    "bf16 2x256 decode, window, cap": partial(attention, "bf16", 2, 256, 1, window=4096, soft_cap=50.0),
    "bf16 4x128 prompt": partial(attention, "bf16", 4, 128, 500),
    "bf16 7x80 prompt": partial(attention, "bf16", 7, 80, 500),
    "fp16 4x128 prompt, window, cap": partial(attention, "fp16", 4, 128, 500, window=4096, soft_cap=50.0),
    "bf16 4x256 prompt, window": partial(attention, "bf16", 4, 256, 500, window=1024),
    "fp32 4x128 prompt": partial(attention, "fp32", 4, 128, 500),
}
SPILLS = 64
"""Bytes that prompts' kernels may spill: none is faster on an H100 (more warps, or more rows, with none or fewer)."""
OTHERS: dict[str, Callable[[], None]] = {
    **{f"{dtype} key/value write": partial(write, dtype) for dtype in ("fp32", "bf16")},
    **{f"bf16 RMSNorm of {size}": partial(norm, "bf16", size) for size in (4096, rms_norm.LARGEST)},
    "fp32 RMSNorm of 4096": partial(norm, "fp32", 4096),
    "bf16 RMSNorm of heads": partial(norm_of_heads, "bf16"),
    "bf16 sum and RMSNorm of 4096": partial(add_and_norm, "bf16", 4096),
    **{f"{dtype} rotary": partial(rotate, dtype, 128, interleaved=False) for dtype in ("fp32", "bf16")},
    "bf16 rotary, half of a head, interleaved": partial(rotate, "bf16", 64, interleaved=True),
    "bf16 rotary and key/value write": partial(rotate_and_write, "bf16"),
    "bf16 SiLU and product": partial(gate, "bf16"),
}


class Compiling:
    """Stands for a kernel of a module: what it is launched with is compiled, not run."""

    def __init__(self, module: Any, name: str, capability: int, found: dict[str, dict[str, Any]]) -> None:
        self.kernel = getattr(module, name)
        self.name, self.capability, self.found = name, capability, found
        setattr(module, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *values: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        types = {}
        for param, value in zip(self.kernel.params, values, strict=False):
            if type(value) is int and value == 1 and not param.do_not_specialize:
                constants[param.name] = 1  # so does Triton
            else:
                types[param.name] = type_of(value, is_special=not param.do_not_specialize)
        sizes = {"capability": self.capability, "num_warps": num_warps, "num_stages": num_stages}
        self.found[self.name] = compile_ahead(self.kernel, types, constants, **sizes)._asdict()


def type_of(value: torch.Tensor | float, *, is_special: bool) -> str:
    """As Triton's launcher sees it."""
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    return ("i32" if value < 2**31 else "i64") + (":16" if is_special and value % 16 == 0 else "")


def main(capability: int) -> None:
    """Print a line of JSON for each launch: its name, and what each of its kernels became."""
    paged_attention._processors = lambda _: PROCESSORS
    found: dict[str, dict[str, Any]] = {}
    for module, *names in KERNELS:
        for name in names:
            Compiling(module, name, capability, found)
    for name, launch in (ATTENTION | OTHERS).items():
        found.clear()
        launch()
        print(json.dumps([name, found]))


@cache
def compiled(capability: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Launch → kernel → what it became on GPUs of this compute capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def describe(found: dict[str, Any]) -> str:
    return f"{found['registers']} registers, {found['spills']} spilled, {found['shared']:,} bytes of shared memory"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_fits(name, capability, report):
    kernels = compiled(capability)[name]
    assert list(kernels) == (["_attend", "_merge"] if "decode" in name else ["_attend"])
    found = kernels["_attend"]
    assert found["shared"] <= SHARED_MEMORY[capability]
    assert found["spills"] <= (SPILLS if "prompt" in name else 0)
    if "decode" in name:
        assert 2 * found["shared"] <= SHARED_MEMORY[capability]
        assert 2 * 128 * found["registers"] <= 65_536, "two programs of four warps: one waits, the other works"
    if "fp32" not in name:
        assert "mma" in found["ptx"], "tensor cores"
    assert "ld.global.v4" in found["ptx"] or "cp.async" in found["ptx"], "16 bytes at a time"
    report("Triton: paged attention, compiled", f"sm_{capability} {name}: {describe(found)}")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in ATTENTION if "decode" in name])
def test_the_merge_of_the_most_splits_fits(name, capability, report):
    found = compiled(capability)[name]["_merge"]
    assert found["shared"] <= SHARED_MEMORY[capability]
    assert found["spills"] == 0
    assert "ld.global.v4" in found["ptx"], "16 bytes at a time"
    report("Triton: other kernels, compiled", f"sm_{capability} merge of {name}: {describe(found)}")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_fit(name, capability, report):
    (found,) = compiled(capability)[name].values()
    assert found["shared"] <= SHARED_MEMORY[capability]
    assert found["spills"] == 0
    assert found["registers"] <= 128, "two programs of eight warps on a multiprocessor: one waits, the other works"
    assert "ld.global.v" in found["ptx"], "several numbers at a time"
    report("Triton: other kernels, compiled", f"sm_{capability} {name}: {describe(found)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
