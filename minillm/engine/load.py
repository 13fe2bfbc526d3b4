"""From a model's folder to a runner that is ready for its first step, on one rank or on several."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minillm.cache.backends import attention_backend as choose_backend
from minillm.engine.cuda_graphs import ladder
from minillm.engine.parallel import Leader, follow, ignore_signals
from minillm.engine.ranks import Crew, DistributedRanks, check_ranks, torchrun_rank
from minillm.engine.runner import ModelRunner, num_kv_blocks
from minillm.engine.scheduler import SchedulerConfig
from minillm.errors import ConfigError, OutOfMemoryError
from minillm.models.loader import load_model, read_decoder_config, resolve_device
from minillm.progress import note
from minillm.transformer.decoder import Decoder
from minillm.transformer.linear import pack, quantize
from minillm.transformer.parallel import shard_config


@dataclass(frozen=True)
class RunnerConfig:
    """What a runner is made of: `LLM`'s arguments of the same names. Every rank has the same."""

    path: str
    dtype: str
    device: str
    quantization: str | None
    enforce_eager: bool
    attention_backend: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None


def start_runner(config: RunnerConfig, tensor_parallel_size: int = 1) -> ModelRunner:
    """The runner of a model, or of rank 0's part of it, with the other ranks behind it.

    They are processes that this one starts; where `torchrun` has started all of them, they call this function too, work
    for rank 0 in it, and end in it.

    Raises:
        MinillmError: a model that cannot be loaded, or divided so; too little memory.
        SystemExit: on another rank than 0, when rank 0 has closed its runner.
    """
    if tensor_parallel_size == 1:
        return make_runner(config)
    size, device = tensor_parallel_size, resolve_device(config.device).type
    if ":" in config.device:
        raise ConfigError(
            f"device {config.device!r} and tensor_parallel_size={size}: each rank takes the GPU of its number; give "
            "device='cuda', and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    check_ranks(size, device)
    shard_config(read_decoder_config(Path(config.path))[1], size)
    place = torchrun_rank()
    rank = 0 if place is None else place[0]
    crew = Crew(size, asdict(config), device) if place is None else None
    ranks: DistributedRanks | None = None
    try:
        if crew is not None:
            crew.wait_for_all()
        with contextlib.nullcontext() if crew is None else crew.waiting():
            ranks = DistributedRanks(rank, size, None if crew is None else crew.store, device)
            runner = make_runner(config, ranks)
            ranks.begin_work()
        if crew is not None:
            crew.started()
    except BaseException:
        if crew is not None:
            crew.kill()
        if ranks is not None:
            ranks.close()
        raise
    if rank > 0:
        ignore_signals()
        follow(runner, ranks)
        ranks.close()
        raise SystemExit(0)
    runner.leader = Leader(ranks, crew)
    return runner


def make_runner(config: RunnerConfig, ranks: DistributedRanks | None = None) -> ModelRunner:
    """The runner of a model, or of this rank's part, prepared; all ranks do this at the same time.

    Raises:
        MinillmError: as `start_runner`.
    """
    decoder = load_model(config.path, dtype=config.dtype, device=_device(config.device, ranks), ranks=ranks)
    decoder.requires_grad_(False)
    if config.quantization is not None:
        decoder.make_head()
        quantize(decoder, config.quantization)
    elif decoder.device.type == "cpu" and not config.enforce_eager:
        decoder.make_head()
        if pack(decoder):
            decoder.look_up_in_head()
            decoder.gather_layers()
    sizes = SchedulerConfig(config.max_num_seqs, config.max_num_batched_tokens, _context(decoder, config.max_model_len))
    backend = choose_backend(config.attention_backend, decoder.device, decoder.dtype)
    graphs = backend.name == "triton" and not config.enforce_eager and ranks is None
    with note("preparing kernels for this machine; what is compiled is kept on disk"):
        num_blocks = config.num_gpu_blocks_override
        if num_blocks is None:
            room = num_kv_blocks(
                decoder,
                config.block_size,
                sizes,
                backend,
                kv_cache_memory_bytes=config.kv_cache_memory_bytes,
                gpu_memory_utilization=config.gpu_memory_utilization,
                graphs=graphs,
            )
            _check_context(sizes.max_model_len, room * config.block_size)
            num_blocks = room
            if config.kv_cache_memory_bytes is None and decoder.device.type == "cpu":
                num_blocks = min(room, sizes.max_num_seqs * -(-sizes.max_model_len // config.block_size))
            if ranks is not None:
                num_blocks = ranks.least(num_blocks)
        runner = ModelRunner(decoder, num_blocks, config.block_size, sizes, backend)
        runner.prepare()
        if graphs:
            runner.record_graphs(ladder(config.max_num_seqs))
    _give_back_freed_memory()
    return runner


def _give_back_freed_memory() -> None:
    """Ask glibc for what it keeps of the memory that loading has freed: 46 to 99 MB for SmolLM2-135M."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _device(asked: str, ranks: DistributedRanks | None) -> torch.device:
    """The device to compute on: of several ranks of one machine, each has its own GPU."""
    device = resolve_device(asked)
    if ranks is None or device.type != "cuda":
        return device
    device = torch.device("cuda", ranks.rank if torchrun_rank() is None else int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _context(decoder: Decoder, max_model_len: int | None) -> int:
    context = decoder.config.max_position_embeddings
    if max_model_len is None:
        return context
    if max_model_len > context and decoder.config.positions == "learned":
        raise ConfigError(f"max_model_len={max_model_len} is more than the {context} positions that the model has")
    return max_model_len


def _check_context(max_model_len: int, room: int) -> None:
    """Raise where not even one sequence of full length fits."""
    if max_model_len > room:
        raise OutOfMemoryError(
            f"a sequence of max_model_len={max_model_len} tokens does not fit into the {room} for which there is "
            f"memory: set max_model_len={room} or lower, or raise kv_cache_memory_bytes (on a GPU, "
            "gpu_memory_utilization)"
        )
