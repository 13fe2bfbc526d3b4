"""Real traffic: when requests came, how long their prompts were, how many tokens they were answered with."""

from __future__ import annotations

import csv
import math
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from minillm.errors import InvalidRequestError

AZURE_EXCERPT = Path(__file__).resolve().parents[1] / "assets" / "traces" / "azure_conversation_2023.csv"
"""The first 2,000 requests of AzureLLMInferenceTrace_conv.csv, seconds since the first.

Source: Azure Public Dataset, "Azure LLM Inference Dataset 2023" (https://github.com/Azure/AzurePublicDataset),
CC-BY-4.0; Patel et al. 2024, "Splitwise: Efficient Generative LLM Inference Using Phase Splitting".
"""

COLUMNS = {
    "arrival_time": ("arrival_time", "TIMESTAMP", "timestamp_ms"),
    "prompt_tokens": ("prompt_tokens", "ContextTokens"),
    "output_tokens": ("output_tokens", "GeneratedTokens"),
}
"""What columns are called here, and elsewhere (Azure's files; times in milliseconds)."""


class Arrival(NamedTuple):
    """One request.

    Attributes:
        time: in seconds since the first.
        prompt_tokens: length of its prompt.
        output_tokens: length of its answer; at least 1, since an empty answer took the token that ended it.
    """

    time: float
    prompt_tokens: int
    output_tokens: int


def load_trace(path: str | Path = AZURE_EXCERPT, *, limit: int | None = None) -> list[Arrival]:
    """Requests of a CSV file with the columns of `COLUMNS`, in order of arrival; by default those that ship.

    Raises:
        InvalidRequestError: a file that cannot be read, or a line of another form.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = [_arrival(line) for line in lines]
    except (KeyError, ValueError) as error:
        wanted = ", ".join(COLUMNS)
        raise InvalidRequestError(f"{path} is not a CSV file with the columns {wanted}: {error}") from error
    if not all(math.isfinite(row.time) for row in found):
        raise InvalidRequestError(f"{path} has a time that is no finite number")
    if not found or min(row.prompt_tokens for row in found) < 1:
        raise InvalidRequestError(f"{path} has no requests, or one without a prompt")
    found.sort(key=lambda row: row.time)
    first = found[0].time
    return [row._replace(time=row.time - first) for row in found[:limit]]


def _arrival(line: dict[str, str]) -> Arrival:
    columns = [next((name for name in names if name in line), names[0]) for names in COLUMNS.values()]
    time, prompt, output = (line[column] for column in columns)
    seconds = float(time) / 1000 if columns[0] == "timestamp_ms" else _seconds(time)
    if int(output) < 0:
        raise ValueError(f"{output} tokens")
    return Arrival(seconds, int(prompt), max(1, int(output)))


def _seconds(time: str) -> float:
    try:
        return float(time)
    except ValueError:
        whole, _, fraction = time.partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
