"""Reading weights off the disk, one tensor at a time: safetensors, or PyTorch's own files through a restricted reader.

A tensor is yielded, copied where it belongs and forgotten, so that loading never holds a second copy of the model.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.errors import CheckpointError

REMAP_BYTES = 64 * 2**20
"""A memory-mapped file is mapped afresh after this much, so that pages already copied are given back."""


def iterate_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor on the CPU) of a model folder, safetensors preferred.

    Raises:
        CheckpointError: no weights, a missing shard, a truncated file, or a pickle that asks for more than tensors.
    """
    for path in weight_files(folder):
        yield from _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, each checked to exist."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            return _shards(index)
        if (folder / f"{stem}.{suffix}").exists():
            return [folder / f"{stem}.{suffix}"]
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, whole or in shards with their "
        "index; if a download was interrupted, pull the model again"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a readable index of shards: {error}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}")
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} weight files ({', '.join(missing[:3])}): "
            "pull the model again to complete it"
        )
    return [index.parent / name for name in sorted(names)]


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        while names:
            read = 0
            with safe_open(path, framework="pt") as file:
                while names and read < REMAP_BYTES:
                    tensor = file.get_tensor(names[0])
                    read += tensor.nbytes
                    yield names.pop(0), tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read; truncated, or not safetensors: {error}") from error


def _read_bin(path: Path) -> Iterator[tuple[str, Tensor]]:
    """A pickled state dict through PyTorch's restricted unpickler: tensors and plain containers, nothing else."""
    names = [name for name, value in load_pickle(path).items() if isinstance(value, Tensor)]
    slice_bytes = REMAP_BYTES if _is_zip(path) else math.inf  # what cannot be mapped is read once, whole
    while names:
        state, read = load_pickle(path), 0
        while names and read < slice_bytes:
            tensor = state.pop(names[0])
            read += tensor.nbytes
            yield names.pop(0), tensor


def load_pickle(path: Path) -> dict[str, Any]:
    """The state dict in a PyTorch file, read without running any code that the file names."""
    try:
        state = _torch_load(path)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n\n")[0].splitlines()[-1]
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors, and minillm runs no code from a model file ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read; truncated, or not a PyTorch file: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of storages typed as before PyTorch 2
        if _is_zip(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=True)  # before PyTorch 1.6: cannot be mapped


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
