"""Who does paged attention: the reference in PyTorch, or its faster twin for the device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.cache import reference
from minillm.errors import ConfigError
from minillm.transformer.twins import warn_once


class AttentionBackend(NamedTuple):
    """The operations of a paged store; the first two with the signatures and meaning of `minillm.cache.reference`.

    Attributes:
        rotate_and_write: `apply_rotary` and `write_kv` in one, where the backend has that; returns the turned queries.
        plan, attend: `paged_attention` in two parts, where the backend has them: what all layers of a step have in
            common, and one layer's attention.
        takes_layers, run_layers: whether a step is for the operation that does all layers, and that operation, where
            the backend has it.
    """

    name: str
    write_kv: Callable[..., None]
    paged_attention: Callable[..., Tensor]
    rotate_and_write: Callable[..., Tensor] | None = None
    plan: Callable[..., Any] | None = None
    attend: Callable[..., Tensor] | None = None
    takes_layers: Callable[..., bool] | None = None
    run_layers: Callable[..., None] | None = None


REFERENCE = AttentionBackend("reference", reference.write_kv, reference.paged_attention)
TWINS = {"numba": ("cpu", "minillm.kernels.cpu"), "triton": ("cuda", "minillm.kernels.gpu")}
"""Name → (device, package)."""
NUMBA_DTYPES = (torch.float32, torch.bfloat16)


def attention_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """The backend of this name; for "auto" the device's twin, or the reference, with a warning, where it is missing.

    Raises:
        ConfigError: a name that does not exist, or a twin that this device, dtype or installation does not have.
    """
    if name == "auto":
        twin = next((twin for twin, (kind, _) in TWINS.items() if kind == device.type), "reference")
        if twin == "numba" and dtype not in NUMBA_DTYPES:
            return REFERENCE
        try:
            return _load(twin)
        except (ImportError, RuntimeError) as error:
            warn_once(device.type, error)
            return REFERENCE
    if name != "reference" and name not in TWINS:
        raise ConfigError(f"attention_backend {name!r} is not one of auto, reference, {', '.join(TWINS)}")
    if name in TWINS and TWINS[name][0] != device.type:
        raise ConfigError(f"attention_backend={name!r} is for {TWINS[name][0]}, and the model is on {device.type}")
    if name == "numba" and dtype not in NUMBA_DTYPES:
        raise ConfigError(f"attention_backend='numba' takes float32 and bfloat16, not {dtype}: set dtype, or 'auto'")
    try:
        return _load(name)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"attention_backend={name!r} cannot be used: {error}") from error


def _load(name: str) -> AttentionBackend:
    if name == "reference":
        return REFERENCE
    _, package = TWINS[name]
    attention = importlib.import_module(f"{package}.paged_attention")
    write = importlib.import_module(f"{package}.write_kv")
    rotary = importlib.import_module(f"{package}.rotary")
    backend = AttentionBackend(name, write.write_kv, attention.paged_attention, rotary.rotate_and_write)
    if name != "numba":
        return backend
    layers = importlib.import_module(f"{package}.decoder_layers")
    return backend._replace(
        plan=attention.plan, attend=attention.attend, takes_layers=layers.takes, run_layers=layers.run
    )
