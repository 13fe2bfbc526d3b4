"""Where a token stands: sinusoidal, learned and rotary positions.

Sources: Vaswani et al. 2017, §3.5 (sinusoidal); Su et al. 2021, "RoFormer", §3.2.2 (rotary); Chen et al. 2023,
"Position Interpolation", §2.3 (linear scaling); Peng et al. 2023, "YaRN", §3; Meta's reference code of Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.transformer.twins import twin


def sinusoidal_positions(positions: Int[Tensor, "*tokens"], dim: int) -> Float[Tensor, "*tokens dim"]:
    """sin(p / 10000^(2i/dim)) in the even channels 2i, the cosine in the odd ones (Vaswani et al. 2017, §3.5)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device) / dim)
    angles = positions[..., None].float() * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :dim]


class LearnedPositions(nn.Embedding):
    """One trained vector a position (GPT-2). OPT leaves the first `offset` rows unused."""

    def __init__(self, num_positions: int, hidden_size: int, offset: int = 0) -> None:
        super().__init__(num_positions + offset, hidden_size, _weight=torch.empty(num_positions + offset, hidden_size))
        self.offset = offset

    def forward(self, positions: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens hidden"]:
        return super().forward(positions + self.offset)


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, §2.3)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1's reference code)."""

    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class YarnScaling:
    """NTK-by-parts interpolation with an attention temperature (Peng et al. 2023, §3.2 and §3.4).

    Attributes:
        attention_factor: multiplies cos and sin; 0.1·ln(factor) + 1 when None.
        truncate: round the ramp's borders to whole channels, as the published code does.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class FrequencyFactors:
    """Each frequency divided by its own number: how GGUF files store a scaling already worked out."""

    factors: tuple[float, ...]


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions of one kind of layer.

    Attributes:
        dim: how many leading channels of a head are rotated; fewer than head_dim is partial rotary (GPT-J, GLM).
        base: θ of the paper; wavelengths run from 2π to 2π·base.
        interleaved: the pairs are channels (0, 1), (2, 3), … (GLM, as in the paper) instead of (0, dim/2), … (Llama).
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, ready for `apply_rotary`."""

    cos: Float[Tensor, "*tokens half"]
    sin: Float[Tensor, "*tokens half"]
    interleaved: bool


def rotary_frequencies(config: RotaryConfig) -> tuple[Float[Tensor, "half"], float]:
    """Angle a position for each pair of channels (float32, on the CPU), and the factor on cos and sin."""
    channels = torch.arange(0, config.dim, 2, dtype=torch.int64, device="cpu").float()
    frequencies = 1.0 / config.base ** (channels / config.dim)
    match config.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor):
            return frequencies / factor, 1.0
        case FrequencyFactors(factors):
            return frequencies / torch.tensor(factors, device="cpu"), 1.0
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(frequencies, scaling), 1.0
        case YarnScaling() as scaling:
            said = scaling.attention_factor
            factor = yarn_mscale(scaling.factor) if said is None else said
            return _yarn_frequencies(frequencies, config, scaling), factor


def _llama3_frequencies(frequencies: Float[Tensor, "half"], scaling: Llama3Scaling) -> Float[Tensor, "half"]:
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def _yarn_frequencies(
    frequencies: Float[Tensor, "half"], config: RotaryConfig, scaling: YarnScaling
) -> Float[Tensor, "half"]:
    def channel_with(turns: float) -> float:
        """The (fractional) pair of channels that turns this often over the original context."""
        wavelength = scaling.original_max_position / (turns * 2 * math.pi)
        return config.dim * math.log(wavelength) / (2 * math.log(config.base))

    low, high = channel_with(scaling.beta_fast), channel_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    pairs = torch.arange(config.dim // 2, dtype=torch.float32, device="cpu")
    interpolate = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * interpolate + frequencies * (1 - interpolate)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """Attention temperature for a context stretched by `factor` (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


class RotaryEmbedding:
    """Angles for positions. Holds no weights: the frequencies follow from the configuration."""

    def __init__(self, config: RotaryConfig) -> None:
        self.config = config
        self._frequencies, self._factor = rotary_frequencies(config)

    def __call__(self, positions: Int[Tensor, "*tokens"], dtype: torch.dtype) -> Rotation:
        """cos and sin of position · frequency, computed in float32 and rounded to `dtype`."""
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions[..., None].float() * self._frequencies
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        return Rotation(cos.to(dtype), sin.to(dtype), self.config.interleaved)


def apply_rotary(
    x: Float[Tensor, "*tokens heads head_dim"], rotation: Rotation
) -> Float[Tensor, "*tokens heads head_dim"]:
    """Turn each pair of channels of each head by its token's angle; channels beyond the rotary ones pass through."""
    cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)
    dim = 2 * cos.shape[-1]
    rotated, passed = x[..., :dim], x[..., dim:]
    if rotation.interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned


def rotate(
    q: Float[Tensor, "*tokens heads head_dim"], k: Float[Tensor, "*tokens kv_heads head_dim"], rotation: Rotation
) -> tuple[Float[Tensor, "*tokens heads head_dim"], Float[Tensor, "*tokens kv_heads head_dim"]]:
    """`apply_rotary` to queries and keys, by a kernel where there is one."""
    kernel = twin("rotary", q)
    if kernel is not None and kernel.supports(q, k):
        out: tuple[Tensor, Tensor] = kernel.rotate(q, k, rotation.cos, rotation.sin, interleaved=rotation.interleaved)
        return out
    return apply_rotary(q, rotation), apply_rotary(k, rotation)
