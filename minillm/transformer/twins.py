"""Faster twins of single operations, from `minillm.kernels`, where the device has one and no gradient is wanted."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

PACKAGES = {"cpu": "minillm.kernels.cpu", "cuda": "minillm.kernels.gpu"}
OPERATIONS = {
    "cpu": ("rms_norm", "rotary", "silu_mul", "quantized", "packed_linear", "decoder_layers"),
    "cuda": ("rms_norm", "rotary", "silu_mul"),
}
"""Those for which PyTorch takes several kernels or calls where one does."""
_warned: set[str] = set()


def twin(operation: str, x: Tensor) -> ModuleType | None:
    """The module of `minillm.kernels` that does this operation where x is; None where PyTorch is to do it."""
    return None if torch.is_grad_enabled() else _load(operation, x.device.type)


@cache
def _load(operation: str, device: str) -> ModuleType | None:
    if operation not in OPERATIONS.get(device, ()):
        return None
    try:
        return importlib.import_module(f"{PACKAGES[device]}.{operation}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: Numba finds no folder for its compiled code
        warn_once(device, error)
        return None


def warn_once(device: str, error: Exception) -> None:
    """Say that this device's kernels cannot be used; once, whichever of them was missed first."""
    if device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"the kernels for {device} cannot be used ({error}): PyTorch's own operations do the work, more slowly; "
        "`minillm env` says how to mend it",
        RuntimeWarning,
        stacklevel=3,
    )
