"""Linear layers for inference on a CPU, with weights laid out, or rounded, for it.

At load, each takes the place of an `nn.Linear` (`PackedEmbedding` of an `nn.Embedding`); the model does not notice.

- `PackedLinear`: the same weights in the order in which oneDNN's matrix product reads them. `F.linear` arranges them
  anew in every call, or reads them against the grain. Products of a few rows read the same memory by a kernel of our
  own (`minillm.kernels.cpu.packed_linear`).
- `Int8Linear`, `Int4Linear`: weight-only quantisation. One token's matrix products read every weight once and do two
  operations with it, so that the bytes of the weights are the time (Gholami et al. 2021, "A Survey of Quantization
  Methods for Efficient Neural Network Inference", §I). Activations stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.errors import ConfigError
from minillm.transformer.twins import twin

GROUP = 32
"""Consecutive weights of a row that share a scale and a least value in int4."""
PACKED_FOR = 256
"""Rows of a matrix product that oneDNN is told to expect; one layout serves all numbers of rows well."""
FEW_ROWS = 16
"""So many rows of x are multiplied with the rounded weights as they are."""
QUANTIZATIONS = ("int8", "int4")
TRIAL_ROWS, TRIALS = (1, 64), 7
"""What `packing_pays` times: rows of the product, how often each."""
MAY_BE_SLOWER = 1.1
"""By so much many rows may be slower where few rows are read in place."""


class PackedLinear(nn.Module):
    """x · weightᵀ + bias with the weight in oneDNN's own layout. Has no gradient.

    Args:
        weight: ``[out, in]``, float32 or bfloat16 on the CPU.
    """

    @torch.no_grad()
    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_FOR)
        self.bias = None if bias is None else bias.detach()
        self.kernel = twin("packed_linear", self.packed)
        self.few = None
        if self.kernel is not None:
            self.few = self._for_few_rows(self.kernel)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.few is not None and self.kernel is not None and self._is_few(x, self.few.most_rows):
            rows = self.kernel.product(x.reshape(-1, self.in_features), self.few)
            return rows.view(*x.shape[:-1], self.out_features)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def _is_few(self, x: Tensor, most: int) -> bool:
        return x.dtype is self.packed.dtype and x.numel() <= most * self.in_features

    def _for_few_rows(self, kernel: ModuleType) -> Any:
        """The kernel's view of the packed weight; None where its product is not oneDNN's: the layout is another one."""
        views = kernel.views(self.packed, self.bias, self.out_features, self.in_features)
        if not views:
            return None
        x = torch.randn(1, self.in_features, generator=torch.Generator().manual_seed(0)).to(self.packed.dtype)
        right = self(x).float()
        off = ((kernel.product(x, few).float() - right).norm() for few in views)
        return next((few for few, error in zip(views, off, strict=True) if error < 0.02 * right.norm()), None)


class PackedEmbedding(nn.Module):
    """Looks tokens up in the head's packed weight, so that a tied table is in memory once. Has no gradient.

    Press & Wolf 2017, "Using the Output Embedding to Improve Language Models", §1: input and output share one table.

    Args:
        head: whose layout is known (`PackedLinear.few`).
    """

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.head, self.table = head, head.few

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The table as it was, a copy."""
        return self.head.packed.to_dense()

    def forward(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens in"]:
        kernel = self.head.kernel
        assert kernel is not None, "few is asked first"
        rows: Tensor = kernel.look_up(self.table, tokens.reshape(-1))
        return rows.view(*tokens.shape, self.head.in_features)


def packed_linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> PackedLinear | None:
    """A `PackedLinear` that works here; None where this PyTorch, or this CPU, does not have its operations."""
    try:
        layer = PackedLinear(weight, bias)
        layer(torch.zeros(1, layer.in_features, dtype=weight.dtype))
    except (RuntimeError, AttributeError):
        return None
    return layer


class RoundedLinear(nn.Module):
    """x · weightᵀ + bias with weights in few bits, for `Int8Linear` and `Int4Linear` to say how. Has no gradient."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        rows = x.reshape(-1, self.in_features)
        kernel = twin("quantized", rows) if len(rows) <= FEW_ROWS else None
        if kernel is None or not kernel.supports(rows):
            return F.linear(x, self.dequantized(), self.bias)
        out = self.product(kernel, rows)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.out_features)

    def product(self, kernel: ModuleType, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """rows · weightᵀ with the numbers as they are stored, by `minillm.kernels.cpu.quantized`."""
        raise NotImplementedError

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The weights that the rounded numbers stand for."""
        raise NotImplementedError


class Int8Linear(RoundedLinear):
    """x · weightᵀ + bias with weights of 8 bits and one scale for each row of the weight. Has no gradient."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> None:
        super().__init__(weight, bias)
        wide = weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp(min=1e-8) / 127
        self.numbers = (wide / scale[:, None]).round().to(torch.int8)
        self.scale = scale.to(weight.dtype)

    def product(self, kernel: ModuleType, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        out: Tensor = kernel.int8_product(rows, self.numbers, self.scale)
        return out

    def dequantized(self) -> Float[Tensor, "out in"]:
        return self.numbers.to(self.scale.dtype) * self.scale[:, None]


class Int4Linear(RoundedLinear):
    """x · weightᵀ + bias with weights of 4 bits; each group of a row has a scale and a least value. Has no gradient."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> None:
        super().__init__(weight, bias)
        groups = weight.detach().float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scale = ((high - low) / 15).clamp(min=1e-8)
        numbers = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8)
        first, second = numbers.chunk(2, dim=2)
        self.pairs = first | (second << 4)
        self.scale, self.low = scale.to(weight.dtype), low.to(weight.dtype)

    def product(self, kernel: ModuleType, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        out: Tensor = kernel.int4_product(rows, self.pairs, self.scale, self.low)
        return out

    def dequantized(self) -> Float[Tensor, "out in"]:
        numbers = torch.cat([self.pairs & 15, self.pairs >> 4], dim=2).to(self.scale.dtype)
        return (numbers * self.scale[..., None] + self.low[..., None]).flatten(1)


def pack(model: nn.Module) -> bool:
    """Give every linear layer oneDNN's layout, in place, if this CPU's matrix products are faster for it."""
    if not packing_pays(_for_trial(model)):
        return False
    swap_linears(model, PackedLinear)
    return True


def _for_trial(model: nn.Module) -> nn.Linear:
    """The largest layer but one: the largest is the head, which takes long to try."""
    return sorted((layer for _, layer in _linears(model)), key=lambda layer: layer.weight.numel())[-2:][0]


def packing_pays(layer: nn.Linear) -> bool:
    """Whether `PackedLinear` can do this layer's product here, and faster: for one row and many, best times summed.

    Where few rows are read in place, many rows decide, and may be a little slower: what few rows win is more.
    """
    packed = packed_linear(layer.weight, layer.bias)
    if packed is None:
        return False
    plain_seconds, packed_seconds = 0.0, 0.0
    for rows in TRIAL_ROWS if packed.few is None else TRIAL_ROWS[-1:]:
        x = torch.randn(rows, layer.in_features).to(layer.weight.dtype)
        times = [(_seconds(layer, x), _seconds(packed, x)) for _ in range(TRIALS)]
        plain_seconds += min(plain for plain, _ in times)
        packed_seconds += min(packed for _, packed in times)
    return packed_seconds < plain_seconds * (1.0 if packed.few is None else MAY_BE_SLOWER)


def _seconds(layer: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start


def quantize(model: nn.Module, kind: str) -> None:
    """Round the weights of every linear layer, and of the head, in place.

    Raises:
        ConfigError: a kind that does not exist, a model that is not on the CPU, or a layer whose sizes int4 does not
            take.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"quantization {kind!r} is not one of {', '.join(QUANTIZATIONS)}")
    for name, layer in _linears(model):
        if layer.weight.device.type != "cpu":
            raise ConfigError(f"quantization={kind!r} is for a CPU, and the model is on {layer.weight.device}")
        if kind == "int4" and layer.in_features % GROUP:
            raise ConfigError(
                f"quantization='int4' takes layers of a multiple of {GROUP} inputs, and {name} has "
                f"{layer.in_features}: take 'int8', or another model"
            )
    swap_linears(model, Int8Linear if kind == "int8" else Int4Linear)


def swap_linears(model: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Put what `make` makes of weight and bias in the place of every linear layer."""
    for name in [name for name, _ in _linears(model)]:  # names alone: each old layer's memory is given back at once
        parent, _, child = name.rpartition(".")
        layer = cast(nn.Linear, model.get_submodule(name))
        setattr(model.get_submodule(parent), child, make(layer.weight, layer.bias))


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
