"""Offline batches on Ray Data: prompts of a dataset, answered piece by piece by several LLMs, resumed after a crash."""

from __future__ import annotations

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
        dataset: read from files by Ray Data, or a path to files: .jsonl, .parquet, or a folder of parquet files.
        output: a folder; another one for another model or other parameters.
        prompt_column: of texts or token ids.
        id_column: of numbers or texts that are all different, by which rows are known again.
        replicas: LLMs, each in a process of its own.
        rows_per_piece: how much is done again after a crash, for each replica.
        arguments: `LLM`'s.

    Raises:
        ConfigError: a dataset that cannot be read again or lacks a column.
        InvalidRequestError: several answers are asked for.
        RayTaskError: a prompt that cannot be answered; what was done before stays written.
    """
    check_size("replicas", replicas)
    check_size("rows_per_piece", rows_per_piece)
    if sampling_params is not None and sampling_params.n != 1:
        raise InvalidRequestError(f"a row has one answer, and n is {sampling_params.n}: set n=1")
    arguments |= {"model": str(model), "device": device, "tensor_parallel_size": tensor_parallel_size}
    folder = Path(output).absolute()
    with connected():
        rows = dataset if isinstance(dataset, Dataset) else _read(Path(dataset))
        _check(rows, prompt_column, id_column)
        answered = rows.repartition(target_num_rows_per_block=rows_per_piece).map_batches(
            Answers,
            fn_constructor_args=(arguments, sampling_params, prompt_column),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=replicas),
            **resources(device, tensor_parallel_size, replicas, spare_cores=SPARE_CORES),
        )
        answered.context.checkpoint_config = CheckpointConfig(
            id_column, f"{folder}.finished", delete_checkpoint_on_success=False
        )
        answered.write_json(str(folder))


class Answers:
    """An LLM in an actor of Ray Data: a table of prompts to a table with answers."""

    def __init__(self, arguments: dict[str, Any], params: SamplingParams | None, prompt_column: str) -> None:
        self._llm = LLM(**arguments)
        self._params = params
        self._column = prompt_column

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        rows = table.to_pylist()
        outputs = self._llm.generate([row[self._column] for row in rows], self._params, use_tqdm=False)
        for row, output in zip(rows, outputs, strict=True):
            (answer,) = output.outputs
            row["generated_text"] = answer.text
            row["generated_token_ids"] = list(answer.token_ids)
            row["finish_reason"] = answer.finish_reason
        return pyarrow.Table.from_pylist(rows)


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
