"""A comparison told: tables, remarks, JSON, and a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minillm.bench.comparison import DTYPES, Comparison, Result, rate
from minillm.bench.limits import Limit, ModelCost
from minillm.bench.peers import AS_STORED, MINILLM
from minillm.bench.processes import CAN_WATCH, QUIET
from minillm.bench.results import write_json
from minillm.bench.workloads import Workload


def report(comparison: Comparison) -> None:
    """Write the files that are asked for, and print."""
    options = comparison.options
    if options.output_json is not None:
        write_json(options.output_json, as_json(comparison))
    if options.plot is not None:
        from minillm.bench.plot import draw

        draw(comparison, options.plot)
    out = Console(width=None if Console().is_terminal else 140, highlight=False)
    for dtype in options.dtypes:
        out.print(table(comparison, dtype))
    for line in remarks(comparison):
        out.print(line, soft_wrap=True)


def table(comparison: Comparison, dtype: str) -> Table:
    """Medians of one dtype, what minillm is in comparison, and the limits."""
    options = comparison.options
    title = f"{options.model}, {dtype}, {options.threads} threads; medians of {options.repeats}"
    columns = (
        "engine",
        "first token, s",
        "tokens/s",
        "minillm: tokens/s",
        "minillm: first token",
        "peak MB",
        "same tokens",
    )
    found = Table("workload", *columns, title=title)
    for column in found.columns[2:]:
        column.justify = "right"
    for work in comparison.works:
        ours = comparison.result(MINILLM, dtype, work)
        for result in comparison.results:
            if (result.dtype, result.work) == (dtype, work):
                found.add_row(work.name, result.engine, *_cells(result, ours))
        found.add_row(work.name, "limit", *_limit_cells(work, comparison.limit(dtype, work), ours), style="dim")
        found.add_section()
    return found


def _cells(result: Result, ours: Result | None) -> Iterator[str]:
    if result.error is not None:
        yield from ("", "failed")
        return
    yield f"{result.first_token_seconds:.3f}"
    yield f"{result.tokens_per_second:.1f}"
    if ours is not None and ours is not result and ours.runs:
        yield f"{ours.tokens_per_second / result.tokens_per_second:.2f}×"
        yield f"{ours.first_token_seconds / result.first_token_seconds:.2f}×" if result.work.is_single else ""
    else:
        yield from ("", "")
    yield "" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.0f}"
    yield f"{result.same_tokens(ours):.0%}" if ours is not None and ours is not result and ours.runs else ""


def _limit_cells(work: Workload, best: Limit, ours: Result | None) -> Iterator[str]:
    speed = rate(work, *best)
    yield f"{best.first_token_seconds:.3f}" if work.is_single else ""  # of many, the first may come before the last
    yield f"{speed:.1f}"
    if ours is not None and ours.runs:
        yield f"{ours.tokens_per_second / speed:.0%}"
        yield f"{ours.first_token_seconds / best.first_token_seconds:.2f}×" if work.is_single else ""


def remarks(comparison: Comparison) -> Iterator[str]:
    """What the tables need beside them: workloads, versions, rates, failures, and whether the machine was quiet."""
    yield "; ".join(f"{work.name}: {work.what}" for work in comparison.works)
    yield "tokens/s are those after the first token where there is one request, and all over the whole time elsewhere"
    yield ", ".join(dict.fromkeys(comparison.versions.values()))
    if AS_STORED in comparison.versions:
        yield f"{AS_STORED} reads the GGUF file in the types that it has, whatever the dtype of the table"
    for dtype, rates in comparison.rates.items():
        cost = ModelCost.of(comparison.config, DTYPES[dtype])
        weights = (cost.body + cost.head) * cost.itemsize
        yield (
            f"limit in {dtype}: {weights / 1e6:.0f} MB of weights a step, read at {rates.read_bandwidth / 1e9:.1f} "
            f"GB/s (at most {rates.read_bandwidth / weights:.0f} tokens/s for one request); products at "
            f"{rates.matrix_flops / 1e9:.0f} GFLOP/s"
        )
    for engine, dtype, error in dict.fromkeys(
        (one.engine, one.dtype, one.error) for one in comparison.results if one.error
    ):
        yield f"[red]{engine} failed in {dtype}[/red]: {escape(error)}"
    yield from _on_quiet(comparison)


def _on_quiet(comparison: Comparison) -> Iterator[str]:
    if not CAN_WATCH:
        yield "what other processes did meanwhile cannot be read on this system: see to it that the machine is quiet"
        return
    disturbed = sum(not run.was_quiet for run in comparison.runs)
    yield f"{comparison.num_discarded} runs were discarded because other processes kept more than {QUIET} cores busy"
    if disturbed:
        yield (
            f"[red]the machine could not be had quiet[/red]: {disturbed} of {len(comparison.runs)} runs that count "
            "were disturbed too, so these figures are not to be relied on"
        )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "model": comparison.options.model,
        "threads": comparison.options.threads,
        "repeats": comparison.options.repeats,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__},
        "versions": comparison.versions,
        "rates": {dtype: rates._asdict() for dtype, rates in comparison.rates.items()},
        "limits": [
            {"dtype": dtype, "workload": work.name, "tokens_per_second": rate(work, *best), **best._asdict()}
            for dtype in comparison.rates
            for work in comparison.works
            for best in (comparison.limit(dtype, work),)
        ],
        "num_discarded": comparison.num_discarded,
        "results": [_result_json(result) for result in comparison.results],
    }


def _result_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {"engine": result.engine, "dtype": result.dtype, "workload": result.work.name}
    if result.error is not None:
        return found | {"error": result.error}
    runs = [{name: value for name, value in run._asdict().items() if name != "answers"} for run in result.runs]
    medians = {"first_token_seconds": result.first_token_seconds, "tokens_per_second": result.tokens_per_second}
    return found | medians | {"peak_bytes": result.peak_bytes, "runs": runs}
