"""What `minillm env` tells: versions, devices, CPU features; what is missing, and how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from minillm import __version__

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf", "numpy", "numba")
EXTRAS = {
    "notebooks": ("jupyterlab", "the notebooks and their widgets"),
    "modelscope": ("modelscope", "downloads from ModelScope"),
    "training": ("sacrebleu", "BLEU, for a translator of your own corpus"),
    "serve": ("fastapi", "`minillm serve`"),
}
CPU_FEATURES = ("avx2", "avx512f", "avx512bf16", "amx-bf16", "avx512vnni", "neon", "bf16", "dotprod")


def report() -> Iterator[tuple[str, str]]:
    """(name, value) of everything worth putting in a bug report."""
    yield "minillm", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package) or "not installed"
    yield from _devices()
    yield "cpu", f"{os.cpu_count()} cores; {', '.join(_cpu_features()) or 'features unknown'}"
    yield "memory", _memory()
    yield "extras", ", ".join(name for name, (module, _) in EXTRAS.items() if find_spec(module)) or "none"


def mends() -> Iterator[tuple[str, str]]:
    """(what is missing, what to do) for whatever would make minillm do more here."""
    if _version("triton") is None and platform.system() == "Linux":
        yield "triton: the GPU kernels", "pip install 'triton>=3.2'"
    if find_spec("numba") is None:
        yield "numba: the CPU kernels; the engine runs on PyTorch's operations, more slowly", "pip install numba"
    if find_spec("minillm.kernels") is None:
        yield (
            "minillm/kernels (a symbolic link to ../kernels that this checkout lost)",
            "git config core.symlinks true && git checkout -- minillm/kernels, or install the wheel",
        )
    for name, (module, what) in EXTRAS.items():
        if find_spec(module) is None:
            yield f"{module}: {what}", f"pip install 'minillm-engine[{name}]'"
    if shutil.which("nvidia-smi") and not _cuda():
        yield (
            "CUDA in PyTorch, though this machine has an NVIDIA GPU",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        yield "devices", "cpu"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"


def _cpu_features() -> list[str]:
    if find_spec("llvmlite") is None:
        return []
    from llvmlite import binding

    found = binding.get_host_cpu_features()
    return [name for name in CPU_FEATURES if found.get(name)]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):  # Windows
        return "unknown"
