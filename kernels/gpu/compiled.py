"""What a Triton kernel becomes on a GPU, found out without one: registers, shared memory, spills, machine code.

Triton's compiler and NVIDIA's assembler are part of its package, so code for any GPU can be made and read anywhere. It
must not be asked where TRITON_INTERPRET is set: there, kernels are not compiled at all.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that one program may have, by compute capability (CUDA Programming Guide, its appendix)."""


class Compiled(NamedTuple):
    """One kernel, compiled for one GPU.

    Attributes:
        registers: of each thread.
        spills: bytes that a thread's instructions move from registers to slow memory ("spill stores" of `ptxas -v`).
        shared: bytes of shared memory of a program.
        ptx: NVIDIA's portable assembly.
    """

    registers: int
    spills: int
    shared: int
    ptx: str


def compile_ahead(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile a kernel for GPUs of this compute capability.

    Args:
        types: of the arguments that are no constants, as Triton writes them: "*fp16", "*i64", "i32", "fp32"; a trailing
            ":16" says that a pointer or number is a multiple of 16, as PyTorch's memory is.
        constants: the `tl.constexpr` arguments.
    """
    signature = {name: types[name].removesuffix(":16") if name in types else "constexpr" for name in kernel.arg_names}
    aligned = (place for place, name in enumerate(kernel.arg_names) if types.get(name, "").endswith(":16"))
    places = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=places)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _resources(built.asm["cubin"])
    return Compiled(registers, spills, built.metadata.shared, built.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of spills, as NVIDIA's own tool reads them from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(tool), "-res-usage", "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stores = re.search(r"REG:(\d+)", said), re.findall(r"\bSTL\b(?:\.U?(\d+))?", said)
    if registers is None or "EXIT" not in said:
        raise RuntimeError(f"cuobjdump printed no resources or no instructions: {said[:400]!r}")
    return int(registers[1]), sum(int(bits or 32) // 8 for bits in stores)  # STL stores 32 bits, STL.64 stores 64
