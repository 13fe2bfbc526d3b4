"""From a name to a decoder with its weights: read the configuration, make empty parameters, stream the tensors in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.errors import CheckpointError, ConfigError, MinillmError, OutOfMemoryError
from minillm.models.checkpoint import StoredTensor, iterate_weights
from minillm.models.family import Family, Json
from minillm.models.gguf import gguf_config, gguf_names, iterate_gguf
from minillm.models.registry import family_of
from minillm.models.source import resolve
from minillm.progress import progress
from minillm.text import read_json, some
from minillm.transformer.decoder import Decoder, DecoderConfig
from minillm.transformer.parallel import Ranks, cut_of

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    ranks: Ranks | None = None,
) -> Decoder:
    """The decoder that `name` stands for, with its weights, ready to generate.

    Args:
        name: a local folder or ``.gguf`` file, a hub id (``Qwen/Qwen3-0.6B``), or a short name (``smollm2-135m``).
        dtype: of weights and computation; "auto" takes half precision where the device computes in it, else float32.
        device: "auto" takes CUDA when there is one.
        ranks: load this rank's part only.

    Raises:
        ModelNotFoundError, DownloadError: when `name` leads nowhere.
        UnsupportedModelError, ConfigError: when it is not something that minillm runs.
        CheckpointError: when weights are missing, unexpected, of a wrong shape, truncated or refused.
    """
    place = resolve_device(device)
    path = resolve(name)
    family, config, published = read_decoder_config(path)
    decoder = empty_decoder(config, resolve_dtype(dtype, published, place), place, ranks)
    tensors = iterate_weights(path)
    if path.suffix == ".gguf":
        names = gguf_names(path, family, config.num_layers)
        tensors = ((names.get(name, name), tensor) for name, tensor in iterate_gguf(path))
    load_weights(decoder, family, tensors)
    return decoder.eval()


def read_decoder_config(path: Path) -> tuple[Family, DecoderConfig, str]:
    """The family, the decoder's configuration and the published dtype of a model folder or ``.gguf`` file.

    Raises:
        UnsupportedModelError, ConfigError: it is not something that minillm runs.
    """
    if path.suffix == ".gguf":
        return *gguf_config(path), "float16"
    raw = read_config(path)
    return *translate(raw), raw.get("dtype") or raw.get("torch_dtype") or "float32"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no config.json: it is not a model folder, or its download was interrupted")
    return read_json(path, ConfigError)


def translate(raw: Json) -> tuple[Family, DecoderConfig]:
    """The family and the decoder configuration that a config.json describes.

    Raises:
        UnsupportedModelError: an architecture that is not known.
        ConfigError: weights in a quantised form that is not read, an option that is not implemented, or damage.
    """
    family = family_of(raw)
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"the weights are quantised ({method}), which is not read: use the original model or a GGUF")
    try:
        return family, family.translate(raw)
    except MinillmError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"config.json holds a value that makes no sense: {error}") from error


def resolve_device(asked: str | torch.device) -> torch.device:
    """The device to compute on; "auto" takes CUDA when there is one.

    Raises:
        ConfigError: no such device here.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"device {str(asked)!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise ConfigError("device 'meta' computes nothing: choose cpu or cuda")
    return device


def resolve_dtype(asked: str | torch.dtype, published: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    "auto" is half precision where the device has fast arithmetic for it: on CUDA the published one (for float32
    checkpoints bfloat16; float16 where the card has no bfloat16), on a CPU bfloat16 if it has instructions for it, else
    float32. float16 asked for on a CPU becomes what "auto" would be there, with a warning: CPUs have no fast float16
    products.
    """
    if isinstance(asked, str) and asked not in ("auto", *_DTYPES):
        raise ConfigError(f"dtype {asked!r} is not one of auto, {', '.join(_DTYPES)}")
    dtype = _DTYPES.get(asked) if isinstance(asked, str) else asked
    if dtype is not None and dtype not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype} is not a floating-point type that a model computes in")
    if device.type == "cpu":
        best = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        if dtype is torch.float16:
            warnings.warn(f"float16 is slow on a CPU: computing in {best} instead", UserWarning, stacklevel=3)
        return best if dtype in (None, torch.float16) else dtype
    if dtype is not None:
        return dtype
    half = _DTYPES.get(published, torch.float32)
    if half is torch.float16 or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, or Arm's BF16)."""
    try:
        from llvmlite import binding
    except ImportError:  # without Numba
        return False
    features = binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))


def empty_decoder(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks | None = None
) -> Decoder:
    """A decoder, or a rank's part of it, whose parameters are allocated and not yet filled."""
    with torch.device("meta"):
        decoder = Decoder(config, ranks)
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    try:
        # Not to_empty(): from the meta device it imports a second of PyTorch's compiler.
        empty = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    except RuntimeError as error:
        size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize / 2**30
        raise OutOfMemoryError(
            f"{size:.1f} GiB of weights in {dtype} do not fit on {device}: choose a smaller model, or half precision"
        ) from error
    decoder.load_state_dict(empty, assign=True)
    return decoder


@dataclass
class _Slot:
    """Where one published tensor goes.

    Attributes:
        shape: of the published tensor.
        rows, columns: of it that are kept; None is all.
    """

    target: Tensor
    transposed: bool
    shape: tuple[int, ...]
    rows: tuple[range, ...] | None = None
    columns: tuple[range, ...] | None = None
    filled: bool = False

    def kept(self, block: Tensor, first: int) -> Tensor:
        """What is kept of a block of the published tensor's rows, whose first row is `first`."""
        if self.rows is not None:
            ends = [(max(rows.start - first, 0), max(rows.stop - first, 0)) for rows in self.rows]
            block = torch.cat([block[start:end] for start, end in ends]) if ends else block[:0]
        if self.columns is not None:
            block = torch.cat([block[:, columns.start : columns.stop] for columns in self.columns], dim=1)
        return block


def load_weights(decoder: Decoder, family: Family, tensors: Iterator[tuple[str, StoredTensor]]) -> None:
    """Copy each tensor into the parameter, or part of a packed one, that the family's table names.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped weights; all are named.
    """
    slots = _slots(decoder, family)
    unexpected = []
    tied_head: StoredTensor | None = None
    with torch.no_grad():
        for published, tensor in progress(tensors, total=len(slots), desc="Loading weights", unit="tensor"):
            name = family.strip_prefix(published)
            if name in slots:
                _fill(slots[name], published, tensor)
            elif decoder.head is None and family.weights.get(name.removesuffix(".weight")) == "head":
                tied_head = tensor
            elif not family.ignores(name):
                unexpected.append(published)
    missing = [name for name, slot in slots.items() if not slot.filled]
    if missing or unexpected:
        problems = [
            f"{what} {some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise CheckpointError(
            f"the checkpoint does not fit its config as {family.architectures[0]}: weights {'; '.join(problems)}"
        )
    if tied_head is not None:
        embedding = next(name for name, ours in family.weights.items() if ours == "embedding")
        _check_tied(slots[f"{embedding}.weight"], tied_head)


def _fill(slot: _Slot, name: str, tensor: StoredTensor) -> None:
    if tensor.shape != slot.shape:
        raise CheckpointError(f"weight {name} has shape {list(tensor.shape)}; its config says {list(slot.shape)}")
    target = slot.target.T if slot.transposed and slot.target.ndim == 2 else slot.target
    read = filled = 0
    for block in tensor.blocks():
        kept = slot.kept(block, read)
        target[filled : filled + len(kept)].copy_(kept)
        read, filled = read + len(block), filled + len(kept)
    target[filled:].zero_()  # a rank's places behind the vocabulary's end, and biases that another rank adds
    slot.filled = True


def _check_tied(embedding: _Slot, head: StoredTensor) -> None:
    """Raise when a head that the config calls tied is stored and is not the embedding."""
    read = filled = 0
    for block in head.blocks() if head.shape == embedding.shape else ():
        kept = embedding.kept(block, read)
        if not torch.equal(embedding.target[filled : filled + len(kept)], kept.to(embedding.target)):
            break
        read, filled = read + len(block), filled + len(kept)
    if read != embedding.shape[0]:
        raise CheckpointError(
            "config.json ties the output head to the embedding, and the checkpoint holds a head that differs from it: "
            'set "tie_word_embeddings": false in config.json to use the stored head'
        )


def _slots(decoder: Decoder, family: Family) -> dict[str, _Slot]:
    """Published name (prefix stripped) → the parameter or part of one that it fills."""
    parameters = dict(decoder.named_parameters())
    whole = parameters
    if decoder.ranks is not None:
        with torch.device("meta"):
            whole = dict(Decoder(decoder.whole_config).named_parameters())
    slots = {}
    for published, ours, transposed in family.expand(decoder.config.num_layers):
        module, _, part = ours.removesuffix("]").partition("[")
        for end in ("weight", "bias"):
            name = f"{module}.{end}"
            if name in parameters:
                target = _part(parameters[name].data, part, decoder.config)
                shape = tuple(_part(whole[name], part, decoder.whole_config).shape)
                slot = _Slot(target, transposed, shape[::-1] if transposed else shape)
                if decoder.ranks is not None:
                    _cut(slot, module, part, decoder.whole_config, decoder.ranks)
                slots[f"{published}.{end}"] = slot
    return slots


def _cut(slot: _Slot, module: str, part: str, config: DecoderConfig, ranks: Ranks) -> None:
    """Let the slot keep this rank's part."""
    rows, columns = cut_of(module, part, config, ranks.rank, ranks.size)
    if slot.target.ndim == 2:
        slot.rows, slot.columns = (columns, rows) if slot.transposed else (rows, columns)
    elif columns is not None and ranks.rank > 0:
        slot.rows = ()  # the outputs of all ranks are summed up: one of them adds the bias
    else:
        slot.rows = rows


def published_weights(decoder: Decoder, family: Family) -> dict[str, Tensor]:
    """The decoder's weights under the family's published names: what a checkpoint of it holds (views, not copies)."""
    return {
        # lm_head belongs to the class around the bare model and lacks its prefix.
        name if name == "lm_head.weight" else family.prefix + name: slot.target.T if slot.transposed else slot.target
        for name, slot in _slots(decoder, family).items()
    }


def _part(packed: Tensor, part: str, config: DecoderConfig) -> Tensor:
    """The rows of a packed projection that one published matrix fills."""
    if not part:
        return packed
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    rows: Mapping[str, tuple[int, int]] = {
        "q": (0, q),
        "k": (q, kv),
        "v": (q + kv, kv),
        "gate": (0, inner),
        "up": (inner, inner),
    }
    return packed.narrow(0, *rows[part])


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model has learned."""
    return sum(parameter.numel() for parameter in model.parameters())
