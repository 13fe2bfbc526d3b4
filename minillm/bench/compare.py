"""minillm and its peers on the same workloads, in one run and in turn, beside what the machine could do at best."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from minillm.bench.comparison import DTYPES, Comparison, Options, Result, Run, rate
from minillm.bench.limits import Rates, measure_rates, model_config
from minillm.bench.peers import Contender, ModelFiles, contenders
from minillm.bench.processes import CpuTime, EngineFailedError, Worker, wait_until_quiet
from minillm.bench.report import report
from minillm.bench.results import check_writable
from minillm.bench.workloads import Workload, workload
from minillm.errors import ConfigError, MissingExtraError
from minillm.models.source import resolve

WARM_UP_TOKENS = 4
RUN_SECONDS = 3600.0
"""How long one run may take."""
RETRIES, RETRIES_IN_ALL = 2, 20
"""How often a run that others disturbed is repeated, and how often over the whole comparison."""
QUIET_SECONDS = 30.0
"""How long to wait for others to finish before a repetition."""

notes = Console(stderr=True, highlight=False)


def main(options: Options) -> None:
    """Compare, and print tables last.

    Raises:
        ConfigError: options that cannot be.
        MissingExtraError: a plot is asked for and matplotlib is not installed.
        ModelNotFoundError, DownloadError: no such model.
    """
    _check(options)
    path = resolve(options.model)
    engines = _chosen(contenders(options.vllm, options.llama_cpp, path), options.engines)
    config = model_config(path)
    comparison = Comparison(options, config, [workload(name, config.vocab_size) for name in options.workloads])
    longest = max(work.longest for work in comparison.works)
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"{options.model} has a context of {config.max_position_embeddings} tokens, and the workloads take up to "
            f"{longest}: choose others by --workloads"
        )
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="minillm-bench-") as folder:
        files = ModelFiles(path, Path(folder))
        for dtype in options.dtypes:
            _compare(comparison, engines, dtype, files, Path(folder))
    report(comparison)


def _check(options: Options) -> None:
    if os.name != "posix":
        raise ConfigError("compare stops and continues processes by signals, which this system lacks: use Linux")
    for name in options.dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if not options.dtypes or not options.workloads:
        raise ConfigError("name at least one dtype and one workload")
    cores = os.cpu_count() or 1
    if options.threads > cores:
        raise ConfigError(f"--threads {options.threads} is more than this machine's {cores} cores")
    check_writable(options.output_json)
    check_writable(options.plot)
    if options.plot is not None and find_spec("matplotlib") is None:
        raise MissingExtraError("--plot", "notebooks")


def _chosen(there: dict[str, Contender], names: Sequence[str] | None) -> list[Contender]:
    unknown = [name for name in names or () if name not in there]
    if unknown:
        raise ConfigError(
            f"there is no engine {', '.join(unknown)} here, only {', '.join(there)}: name others, or the Python of a "
            "peer's environment by --vllm or --llama-cpp"
        )
    if names is None:
        return [contender for contender in there.values() if not contender.on_request]
    return [contender for name, contender in there.items() if name in names]


def _compare(comparison: Comparison, engines: list[Contender], dtype: str, files: ModelFiles, folder: Path) -> None:
    """All engines in one dtype: loaded together, measured in turn."""
    options = comparison.options
    longest = max(work.longest for work in comparison.works)
    rates = []
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for engine in engines:
            notes.print(f"{dtype}: loading {engine.name}")
            worker = stack.enter_context(engine.start(options.threads, folder / f"{engine.name}.log"))
            try:
                version = engine.load(worker, files, dtype, options.threads, longest)
            except EngineFailedError as error:
                comparison.results += [
                    Result(engine.name, dtype, work, error=_line(error)) for work in comparison.works
                ]
                notes.print(f"{engine.name}: {escape(_line(error))}", style="red", soft_wrap=True)
            else:
                comparison.versions[engine.name] = version
                workers[engine.name] = worker
        for work in comparison.works:
            results = [Result(name, dtype, work) for name in workers]
            comparison.results += results
            for result in results:
                _warm_up(workers[result.engine], result)
            rates.append(measure_rates(DTYPES[dtype]))
            for repeat in range(options.repeats):
                for result in results:
                    _measure(comparison, workers[result.engine], result, repeat)
    comparison.rates[dtype] = Rates.median(rates)


def _warm_up(worker: Worker, result: Result) -> None:
    """Compile, fill caches, touch memory: the prompts with short answers, unmeasured."""
    try:
        worker.ask({"run": result.work.shortened(WARM_UP_TOKENS).asks}, RUN_SECONDS)
    except EngineFailedError as error:
        _failed(result, error)


def _measure(comparison: Comparison, worker: Worker, result: Result, repeat: int) -> None:
    if result.error is not None:
        return
    allowed = min(RETRIES, RETRIES_IN_ALL - comparison.num_discarded)
    try:
        run = _quiet_run(worker, result.work, allowed)
    except EngineFailedError as error:
        _failed(result, error)
        return
    result.runs.append(run)
    speed = rate(result.work, run.first_token_seconds, run.seconds)
    disturbed = "" if run.was_quiet else f"  disturbed: others kept {run.others:.1f} cores busy"
    notes.print(
        f"{result.work.name} {result.dtype} {repeat + 1}/{comparison.options.repeats}  {result.engine:24} "
        f"first token {run.first_token_seconds:6.2f} s  {speed:8.1f} tokens/s{disturbed}",
        soft_wrap=True,
    )


def _quiet_run(worker: Worker, work: Workload, retries: int) -> Run:
    """Measure until others leave the machine alone; where they do not, the least disturbed run."""
    runs: list[Run] = []
    while not runs or (not runs[-1].was_quiet and len(runs) <= retries):
        if runs:
            wait_until_quiet(QUIET_SECONDS)
        worker.reset_peak()
        start = CpuTime.now(worker)
        answer = worker.ask({"run": work.asks}, RUN_SECONDS)
        end = CpuTime.now(worker)
        others = None if start is None or end is None else end.others_since(start)
        runs.append(Run(**answer, peak_bytes=worker.peak_bytes, others=others, discarded=len(runs)))
    return min(runs, key=lambda run: run.others or 0.0)._replace(discarded=len(runs) - 1)


def _failed(result: Result, error: EngineFailedError) -> None:
    result.error = _line(error)
    result.runs = []
    notes.print(f"{result.work.name} {result.engine}: {escape(result.error)}", style="red", soft_wrap=True)


def _line(error: Exception) -> str:
    """An error's first line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
