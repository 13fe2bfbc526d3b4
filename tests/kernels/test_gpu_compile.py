"""The Triton kernels compiled for GPUs that are not here: registers, spills, shared memory, the instructions wanted.

In a process of its own: where Triton's interpreter is on, nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys
import torch
from minillm.kernels.gpu import paged_attention as attention, write_kv
from minillm.kernels.gpu.compiled import SHARED_MEMORY, compile_ahead

capability, dtype, group, head_dim, max_query_len = json.loads(sys.argv[1])
kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
tile = attention.tile_of(kind, head_dim, group, max_query_len)
split = max_query_len == 1
found = compile_ahead(
    attention._attend,
    attention.argument_types(dtype, split=split),
    attention.constants(tile, group, head_dim, 16, split=split),
    capability=capability, num_warps=tile.num_warps, num_stages=tile.num_stages,
)
print(json.dumps({
    "registers": found.registers, "spills": found.spills, "shared": found.shared,
    "limit": SHARED_MEMORY[capability], "ptx": found.ptx,
}))
"""


def compiled(*what) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "max_query_len"),
    [("bf16", 4, 128, 1), ("fp16", 3, 64, 1), ("bf16", 4, 128, 500), ("bf16", 7, 80, 500), ("fp32", 4, 128, 500)],
)
def test_attention_fits(capability, dtype, group, head_dim, max_query_len, report):
    found = compiled(capability, dtype, group, head_dim, max_query_len)
    assert found["shared"] <= found["limit"]
    # Products of float32 are exact, without tensor cores: such a tile takes more registers than there are.
    assert found["spills"] <= (512 if dtype == "fp32" else 0)
    if dtype != "fp32":
        assert "mma" in found["ptx"], "tensor cores"
    assert "ld.global.v4" in found["ptx"] or "cp.async" in found["ptx"], "16 bytes at a time"
    numbers = f"{found['registers']} registers, {found['shared']:,} bytes of shared memory"
    report(
        "Triton: paged attention, compiled", f"sm_{capability} {dtype} {group}×{head_dim} q≤{max_query_len}: {numbers}"
    )
