"""How Numba compiles the kernels. Imported before the first of them: Numba asks the processor at the first `njit`."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import llvmlite.binding
from numba import config
from numba.core.codegen import get_host_cpu_features


def may_use(feature: str) -> bool:
    """Whether the processor has it, and Numba's settings (`NUMBA_CPU_FEATURES`) do not leave it out."""
    allowed = config.CPU_FEATURES is None or f"+{feature}" in config.CPU_FEATURES.split(",")
    return allowed and bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


HAS_512_BITS = may_use("avx512f")
HAS_PAIRS = may_use("avx512bf16")
"""Whether pairs of bfloat16 can be multiplied."""
HERE = Path(__file__).parent


def use_all_bits() -> None:
    """Let LLVM take 512 bits for a vector where the processor has them; for newer ones of Intel it would take 256.

    Attention of 64 sequences on an Emerald Rapids, a block and head: 532 ns with 256 bits; 396 with 512, and 317 in
    bfloat16.
    """
    if HAS_512_BITS and config.CPU_FEATURES is None:
        config.CPU_FEATURES = f"{get_host_cpu_features()},-prefer-256-bit"


def drop_old_code(folder: Path = HERE) -> None:
    """Remove compiled code that stands beside the kernels and was made of other sources.

    Numba asks only whether the file of a function has changed, but a kernel has functions of other files in it.
    """
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()
    compiled = folder / "__pycache__"
    stamp = compiled / "sources.sha256"
    with suppress(OSError):  # a folder that cannot be written to has no compiled code either
        if stamp.is_file() and stamp.read_text() == sources:
            return
        compiled.mkdir(exist_ok=True)
        for file in [*compiled.glob("*.nbi"), *compiled.glob("*.nbc")]:
            file.unlink(missing_ok=True)
        stamp.write_text(sources)


use_all_bits()
drop_old_code()
