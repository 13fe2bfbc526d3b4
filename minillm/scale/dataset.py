"""Offline batches on Ray Data: prompts of a dataset, answered piece by piece by several LLMs, resumed after a crash."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.data.checkpoint import CheckpointConfig

from minillm.checks import check_size
from minillm.engine.params import SamplingParams
from minillm.errors import ConfigError, InvalidRequestError
from minillm.llm import LLM
from minillm.scale.cluster import connected, resources

ANSWER = {
    "generated_text": pyarrow.string(),
    "generated_token_ids": pyarrow.list_(pyarrow.int64()),
    "finish_reason": pyarrow.string(),
}
"""The columns that are added to a row."""

PLACES = ("device", "tensor_parallel_size")
"""Arguments that say where a job runs, not what it does."""

READERS = {".jsonl": ray.data.read_json, ".json": ray.data.read_json, ".parquet": ray.data.read_parquet}

SPARE_CORES = 2
"""Of a cluster without GPUs: Ray's task that reads or writes takes one, and its actor that leaves out finished rows
another; a job whose LLMs have taken all would wait for ever."""


def generate_dataset(
    dataset: Dataset | str | Path,
    output: str | Path,
    *,
    model: str | Path = "tiny",
    sampling_params: SamplingParams | None = None,
    prompt_column: str = "prompt",
    id_column: str = "id",
    replicas: int = 1,
    rows_per_piece: int = 256,
    device: str = "auto",
    tensor_parallel_size: int = 1,
    **arguments: Any,
) -> None:
    """Answer every prompt of a dataset, on the Ray cluster that is connected to, or that `RAY_ADDRESS` names, or here.

    A piece is written when it is done, as lines of JSON: the row, and its ``generated_text``, ``generated_token_ids``
    and ``finish_reason``. Called again with the same output, after a crash or an end, it answers what has not been
    written. Ray Data keeps the ids of what has in the folder `output` + ".finished"; on several machines both must be
    where all of them see it.

    Args:
        dataset: read from files by Ray Data, with ids that stand in the files, or a path to files: .jsonl, .parquet,
            or a folder of parquet files.
        output: a folder; another one for another model or other parameters, which are noted in `output` + ".job".
        prompt_column: of texts or token ids.
        id_column: of numbers or texts that are all different, by which rows are known again.
        replicas: LLMs, each in a process of its own.
        rows_per_piece: how much is done again after a crash, for each replica.
        arguments: `LLM`'s.

    Raises:
        ConfigError: a dataset that cannot be read again, lacks a column, or has one of the answers' names; an output
            folder of another job.
        InvalidRequestError: several answers are asked for.
        RayTaskError: a prompt that cannot be answered; what was done before stays written.
    """
    check_size("replicas", replicas)
    check_size("rows_per_piece", rows_per_piece)
    if not isinstance(sampling_params, SamplingParams | None):
        raise InvalidRequestError(f"sampling_params must be SamplingParams, not {type(sampling_params).__name__}")
    if sampling_params is not None and sampling_params.n != 1:
        raise InvalidRequestError(f"a row has one answer, and n is {sampling_params.n}: set n=1")
    arguments |= {"model": str(model), "device": device, "tensor_parallel_size": tensor_parallel_size}
    if "://" in str(output):
        raise ConfigError(f"the output must be a folder that all machines see, not {output}")
    folder = Path(output).absolute()
    with connected():
        rows = dataset if isinstance(dataset, Dataset) else _read(Path(dataset))
        _check(rows, prompt_column, id_column)
        job = {**arguments, "sampling_params": sampling_params, "prompt": prompt_column, "id": id_column}
        note_job(folder, {**job, "files": sorted(rows.input_files())})
        answered = rows.repartition(target_num_rows_per_block=rows_per_piece).map_batches(
            Answers,
            fn_constructor_args=(arguments, sampling_params, prompt_column),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=replicas),
            **resources(device, tensor_parallel_size, replicas, spare_cores=SPARE_CORES),
        )
        context = answered.context  # the caller's dataset has the same
        before = context.checkpoint_config
        context.checkpoint_config = CheckpointConfig(
            id_column, f"{folder}.finished", delete_checkpoint_on_success=False
        )
        try:
            answered.write_json(str(folder))
        finally:
            context.checkpoint_config = before


def note_job(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Note in `folder` + ".job" what is written to the folder.

    Raises:
        ConfigError: another job has written to it.
    """
    # Of a function, its address tells nothing.
    job = {name: re.sub(r" at 0x\w+", "", str(value)) for name, value in arguments.items() if name not in PLACES}
    note, finished = Path(f"{folder}.job"), Path(f"{folder}.finished")
    if not any(path.is_dir() and any(path.iterdir()) for path in (folder, finished)):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(job, indent=1), encoding="utf-8")
        return
    before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    other = [name for name in {**before, **job} if before.get(name) != job.get(name)]
    if other:
        told = ", ".join(
            f"{name} was {before.get(name, 'not given')}, now {job.get(name, 'not given')}" for name in other
        )
        raise ConfigError(
            f"{folder} holds answers of another job ({told}): name another folder, or delete this one, {note.name} and "
            f"{finished.name}"
        )


class Answers:
    """An LLM in an actor of Ray Data: a table of prompts to a table with answers."""

    def __init__(self, arguments: dict[str, Any], params: SamplingParams | None, prompt_column: str) -> None:
        self._llm = LLM(**arguments)
        self._params = params
        self._column = prompt_column

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        outputs = self._llm.generate(table[self._column].to_pylist(), self._params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        columns = [
            [answer.text for answer in answers],
            [list(answer.token_ids) for answer in answers],
            [answer.finish_reason for answer in answers],
        ]
        for (name, kind), values in zip(ANSWER.items(), columns, strict=True):
            table = table.append_column(name, pyarrow.array(values, kind))
        return table


def _read(path: Path) -> Dataset:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give files of prompts, .jsonl or .parquet")
    reader = ray.data.read_parquet if path.is_dir() else READERS.get(path.suffix)
    if reader is None:
        raise ConfigError(f"{path.name} is no dataset: give .jsonl or .parquet")
    return reader(str(path))


def _check(rows: Dataset, *columns: str) -> None:
    """Raise ConfigError where rows have no such columns, or could not be told apart from those of another run."""
    if not rows.input_files():
        raise ConfigError("only a dataset that Ray Data reads from files can be resumed: write yours to some first")
    schema = rows.schema()
    if schema is not None and not isinstance(schema.base_schema, pyarrow.Schema):
        raise ConfigError("Ray Data resumes Arrow's tables only, and these are pandas': read them without lines=True")
    there = rows.columns() or []
    for column in columns:
        if column not in there:
            raise ConfigError(f"the dataset has no column {column!r}: it has {', '.join(there)}")
    for column in ANSWER:
        if column in there:
            raise ConfigError(f"the dataset has a column {column!r}, which the answers would have: rename it")
