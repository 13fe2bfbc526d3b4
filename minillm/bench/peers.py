"""The engines that are compared: how each is started, and the model in the form that it reads."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import minillm
from minillm.bench import worker
from minillm.bench.processes import EngineFailedError, Worker
from minillm.errors import ConfigError
from minillm.models.gguf import open_gguf
from minillm.transformer.linear import QUANTIZATIONS

Form = Literal["as it is", "folder", "gguf"]
"""What an engine reads: what minillm reads, a Hugging Face folder of safetensors, or a GGUF file of the dtype."""

LOAD_SECONDS = 1200.0
"""How long an engine may take to load and, where it does, to compile."""

MINILLM, AS_STORED = "minillm", "llama.cpp-as-stored"
HERE = Path(sys.executable)


@dataclass(frozen=True)
class Contender:
    """An engine that takes part.

    Attributes:
        name: in tables and on the command line.
        python: of its environment.
        arguments: what that Python runs.
        form: of the model.
        on_request: takes part only where it is named.
    """

    name: str
    python: Path
    arguments: tuple[str, ...]
    form: Form
    on_request: bool = False

    def start(self, threads: int, log: Path) -> Worker:
        """Its process, with nothing loaded yet."""
        return Worker([str(self.python), *self.arguments], _environment(self.python, threads), log)

    def load(self, process: Worker, files: ModelFiles, dtype: str, threads: int, max_model_len: int) -> str:
        """Load the model; returns name and version of the engine.

        Raises:
            EngineFailedError: it cannot.
        """
        try:
            model = files.get(self.form, dtype)
        except Exception as error:
            raise EngineFailedError(f"{type(error).__name__}: {error}") from error
        options = {"model": str(model), "dtype": dtype, "threads": threads, "max_model_len": max_model_len}
        return str(process.ask({"load": options}, LOAD_SECONDS)["version"])


def contenders(vllm: Path | None, llama_cpp: Path | None, model: Path) -> dict[str, Contender]:
    """All engines that there are, by name; peers in other environments by the Python given.

    Raises:
        ConfigError: such a Python is not there.
    """
    ours = ("-m", "minillm.bench.own_worker")
    found = [
        Contender(MINILLM, HERE, ours, "as it is"),
        *(Contender(f"{MINILLM}-{kind}", HERE, (*ours, kind), "as it is", on_request=True) for kind in QUANTIZATIONS),
        Contender(f"{MINILLM}-server", HERE, ("-m", "minillm.bench.server_worker"), "as it is", on_request=True),
        _peer("transformers", HERE, "folder"),
        _peer("transformers-continuous", HERE, "folder"),
    ]
    if vllm is not None:
        found.append(_peer("vllm", _checked("--vllm", vllm), "folder"))
    if llama_cpp is not None:
        found.append(_peer("llama.cpp", _checked("--llama-cpp", llama_cpp), "gguf"))
        if model.suffix == ".gguf":
            found.append(_peer("llama.cpp", llama_cpp, "as it is", AS_STORED))
    return {contender.name: contender for contender in found}


def _peer(engine: str, python: Path, form: Form, name: str | None = None) -> Contender:
    return Contender(name or engine, python, (worker.__file__, engine), form)


def _checked(option: str, python: Path) -> Path:
    if not python.is_file() or not os.access(python, os.X_OK):
        raise ConfigError(
            f"{option} must name the Python of the peer's environment (…/bin/python), and {python} is none"
        )
    return python.absolute()  # not resolved: a link to the Python of an environment is what makes it one


def _environment(python: Path, threads: int) -> dict[str, str]:
    """This process's, with as many threads as asked for; what says where to import from is this Python's own."""
    given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if python == HERE:
        given["PYTHONPATH"] = os.pathsep.join(
            [str(Path(minillm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        )
    return given | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in the process that asks: no messages between the two
        "PYTHONSAFEPATH": "1",  # the worker's folder is no place to import from
    }


class ModelFiles:
    """One model in every form, each made when it is first asked for.

    Args:
        path: a GGUF file or a model folder.
        folder: where the forms go that are made.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.get = lru_cache(self._get)

    def _get(self, form: Form, dtype: str) -> Path:
        is_gguf = self.path.suffix == ".gguf"
        if form == "as it is" or (form == "folder" and not is_gguf):
            return self.path
        if not is_gguf:
            raise ConfigError(
                f"llama.cpp reads GGUF files, and {self.path.name} is a folder: give --model a .gguf file"
            )
        if form == "folder":
            target = self.folder / "safetensors"
            if not target.exists():  # one for all dtypes
                in_own_process(write_folder, self.path, target)
        else:
            target = self.folder / f"{dtype}.gguf"
            in_own_process(write_gguf, self.path, target, dtype)
        return target


def in_own_process(work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process that takes its memory with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()


def write_folder(source: Path, target: Path) -> None:
    """A GGUF file's model as a Hugging Face folder: float32 in safetensors, as transformers dequantises it."""
    import torch
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # a model that came from GGUF refuses to be saved
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(target)


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """A GGUF file with its matrices dequantised to a dtype, all else as it was (vectors are float32 in GGUF)."""
    import gguf

    reader = open_gguf(source)
    file_type, kind = {
        "float32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
        "bfloat16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    }[dtype]
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) < 2 or kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, numbers)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
