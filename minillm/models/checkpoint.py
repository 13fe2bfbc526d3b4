"""Reading weights off the disk, one tensor at a time: safetensors, or PyTorch's own files through a restricted reader.

A tensor is yielded, copied where it belongs and forgotten, so that loading never holds a second copy of the model.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.errors import CheckpointError

BLOCK_ELEMENTS = 2**23
"""Numbers that are read at a time: a larger tensor comes in blocks of rows, each from a mapping of its own, so that
the pages that were copied are given back."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on the disk: its shape, and its rows in blocks, to be read in order."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]


def row_ranges(shape: tuple[int, ...], elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """The rows of each block, of so many numbers, of a tensor of at least one dimension."""
    step = max(1, elements // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def iterate_weights(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Every (published name, tensor) of a model folder, safetensors preferred.

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


def _read_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read; truncated, or not safetensors: {error}") from error
    for name, shape in shapes.items():
        yield name, StoredTensor(shape, partial(_safetensors_blocks, path, name, shape))


def _safetensors_blocks(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    for rows in row_ranges(shape) if shape else (None,):
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


def _read_bin(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """A pickled state dict through PyTorch's restricted unpickler: tensors and plain containers, nothing else."""
    state = load_pickle(path)
    shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    if _is_zip(path):
        state = {}  # mapped afresh for every block; what cannot be mapped is read once, whole
    for name, shape in shapes.items():
        yield name, StoredTensor(shape, partial(_bin_blocks, path, state, name, shape))


def _bin_blocks(path: Path, state: dict[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    for rows in row_ranges(shape) if shape else (...,):
        yield (state or load_pickle(path))[name][rows]


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
