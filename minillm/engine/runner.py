"""The one place that knows of devices: the weights, the keys and values, and a step's tensors.

A step's tokens are one flat batch without padding. The tensors that describe it are allocated once, as large as a step
can be, and filled anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.cache.backends import REFERENCE, AttentionBackend
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable, Copy
from minillm.cache.paged import PagedBatch, PagedKVCache
from minillm.cache.reference import NO_SLOT
from minillm.engine.cuda_graphs import DecodeGraphs, ladder
from minillm.engine.parallel import Leader
from minillm.engine.request import Request
from minillm.engine.scheduler import Schedule, SchedulerConfig
from minillm.errors import ConfigError, OutOfMemoryError
from minillm.transformer.decoder import Decoder
from minillm.transformer.sampling import draw, transform

DEFAULT_CPU_KV_BYTES = 2**30
"""Memory for keys and values on a CPU, where nothing else is said."""
WARM_UP_TOKENS = {"cpu": (1, 8, 32, 120, 128), "cuda": (1, 2, 4, 8, 16, 32, 64, 128)}
"""Lengths of prompts to compile for: a CPU's kernels divide many rows among threads; on CUDA, tiles grow with the
longest prompt of a step, up to 128 rows."""
LATE_CHUNK = 1024
"""Tokens of a sequence of which even a small last chunk has many scores, for which a CPU has a kernel of its own."""


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, as a step computes them.

    Attributes:
        tokens: the tokens themselves.
        start: position of the first.
        table: where the sequence lies.
        num_stored: leading ones that are stored already.
        copies: blocks to copy before.
    """

    tokens: Sequence[int]
    start: int
    table: BlockTable
    num_stored: int = 0
    copies: Sequence[Copy] = ()


class StepLogits(NamedTuple):
    """What a step's logits are wanted for.

    Attributes:
        next: a row for each scheduled part that samples, in order.
        prompt: for the requests that ask, a row for each token of their part that another prompt token follows.
    """

    next: Float[Tensor, "rows vocab"]
    prompt: dict[Request, Float[Tensor, "rows vocab"]]


class ModelRunner:
    """Computes hidden states and logits of steps.

    Args:
        decoder: the model.
        num_blocks: blocks of keys and values.
        sizes: how much a step may hold.
        backend: who does paged attention.

    Attributes:
        leader: sends this rank's steps to the others, where it is rank 0 of several.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        sizes: SchedulerConfig,
        backend: AttentionBackend = REFERENCE,
    ) -> None:
        self.decoder = decoder
        self.device = decoder.device
        self.sizes = sizes
        self.leader: Leader | None = None
        self.kv = PagedKVCache(
            decoder.config, num_blocks, block_size, dtype=decoder.dtype, device=self.device, backend=backend
        )
        max_blocks = min(-(-sizes.max_model_len // block_size), num_blocks)
        self.tokens = self._buffer(sizes.max_num_batched_tokens)
        self.positions = self._buffer(sizes.max_num_batched_tokens)
        self._slots = self._buffer(sizes.max_num_batched_tokens)
        self._query_starts = self._buffer(sizes.max_num_seqs + 1)
        self._seq_lens = self._buffer(sizes.max_num_seqs)
        self._block_tables = self._buffer(sizes.max_num_seqs, max_blocks)
        self._graphs: DecodeGraphs | None = None

    def _buffer(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def record_graphs(self, sizes: Sequence[int]) -> None:
        """On CUDA, record decode steps of these batch sizes; `compute` then replays them."""
        self._graphs = DecodeGraphs(self, list(sizes))

    def compute(self, step: Schedule) -> StepLogits:
        """Compute a step's tokens, and the logits that somebody wants."""
        chunks = [
            Chunk(
                part.request.tokens(part.start, part.start + part.count),
                part.start,
                part.request.table,
                part.num_stored,
                part.copies,
            )
            for part in step.scheduled
        ]
        are_decodes = all(
            part.count == 1 and part.samples and not part.wants_prompt_logprobs for part in step.scheduled
        )
        if self._graphs is not None and are_decodes and (size := self._graphs.size_for(len(chunks))):
            return StepLogits(self._replay(self._graphs, chunks, size), {})
        hidden = self.hidden(chunks)
        last, prompts, end = [], {}, 0
        for part in step.scheduled:
            start, end = end, end + part.count
            if part.samples:
                last.append(end - 1)
            if part.wants_prompt_logprobs:
                followed = min(part.count, len(part.request.prompt_token_ids) - 1 - part.start)
                prompts[part.request] = self.logits(hidden[start : start + followed])
        return StepLogits(self.logits(hidden[last]), prompts)

    def _replay(self, graphs: DecodeGraphs, chunks: Sequence[Chunk], size: int) -> Float[Tensor, "rows vocab"]:
        self.empty_decode_batch(size)
        self.kv.begin(self._fill_inputs(chunks))  # makes the copies, which are not recorded
        return graphs.replay(size)[: len(chunks)]

    def empty_decode_batch(self, size: int) -> PagedBatch:
        """The input tensors of a decode step of so many sequences, none of which has a key."""
        self.tokens[:size] = 0
        self.positions[:size] = 0
        self._slots[:size] = NO_SLOT
        self._seq_lens[:size] = 0
        torch.arange(size + 1, out=self._query_starts[: size + 1])
        return PagedBatch(
            self._slots[:size],
            self._query_starts[: size + 1],
            self._seq_lens[:size],
            self._block_tables[:size],
            1,
        )

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> Float[Tensor, "tokens hidden"]:
        """The last layer's output for every token of a step."""
        return self.run(self._fill_inputs(chunks))

    def run(self, batch: PagedBatch) -> Float[Tensor, "tokens hidden"]:
        """The last layer's output for a batch whose tokens and positions are in the input tensors."""
        count = len(batch.slot_mapping)
        tokens, positions = self.tokens[:count], self.positions[:count]
        if self.leader is None:
            return self._run(tokens, positions, batch)
        with self.leader.turn():
            self.leader.send_batch(tokens, positions, batch)
            return self._run(tokens, positions, batch)

    def _run(
        self, tokens: Int[Tensor, "tokens"], positions: Int[Tensor, "tokens"], batch: PagedBatch
    ) -> Float[Tensor, "tokens hidden"]:
        self.kv.begin(batch)
        return self.decoder.hidden(tokens, positions, self.kv)

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Scores of the next token, in float32."""
        if self.leader is None:
            return self.decoder.logits(hidden).float()
        with self.leader.turn():
            self.leader.send_hidden(hidden)
            return self.decoder.logits(hidden).float()

    def check(self) -> None:
        """Raise RankError where another rank has died."""
        if self.leader is not None:
            self.leader.check()

    def _fill_inputs(self, chunks: Sequence[Chunk]) -> PagedBatch:
        """Write down a step in the input tensors."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [at for chunk in chunks for at in range(chunk.start, chunk.start + len(chunk.tokens))]
        slots: list[int] = []
        starts = [0]
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            slots += [NO_SLOT] * chunk.num_stored + chunk.table.slots(chunk.start + chunk.num_stored, end)
            starts.append(starts[-1] + len(chunk.tokens))
        width = max(len(chunk.table.blocks) for chunk in chunks)
        rows = [chunk.table.blocks + [0] * (width - len(chunk.table.blocks)) for chunk in chunks]
        lengths = [chunk.start + len(chunk.tokens) for chunk in chunks]
        return self.fill(
            *(torch.tensor(numbers) for numbers in (tokens, positions, slots, starts, lengths, rows)),
            max_query_len=max(len(chunk.tokens) for chunk in chunks),
            copies=[copy for chunk in chunks for copy in chunk.copies],
        )

    def fill(
        self,
        tokens: Int[Tensor, "tokens"],
        positions: Int[Tensor, "tokens"],
        slots: Int[Tensor, "tokens"],
        query_starts: Int[Tensor, "sequences_plus_one"],
        seq_lens: Int[Tensor, "sequences"],
        block_tables: Int[Tensor, "sequences blocks"],
        *,
        max_query_len: int,
        copies: Sequence[Copy],
    ) -> PagedBatch:
        """Write a step's numbers into the input tensors."""
        _fill(self.tokens, tokens)
        _fill(self.positions, positions)
        sequences, width = block_tables.shape
        tables = self._block_tables[:sequences, :width]
        tables.copy_(block_tables)
        return PagedBatch(
            _fill(self._slots, slots),
            _fill(self._query_starts, query_starts),
            _fill(self._seq_lens, seq_lens),
            tables,
            max_query_len,
            copies,
        )

    def prepare(self) -> None:
        """Compile what must be compiled before the first request."""
        block_tokens = self.kv.num_blocks * self.kv.block_size
        limit = min(self.sizes.max_model_len, self.sizes.max_num_batched_tokens, block_tokens)
        for tokens in sorted({min(tokens, limit) for tokens in WARM_UP_TOKENS.get(self.device.type, (1,))}):
            self.warm_up(tokens)
        behind = min(self.sizes.max_model_len, block_tokens, LATE_CHUNK) - limit
        if self.device.type == "cpu" and limit < max(WARM_UP_TOKENS["cpu"]) and behind > 0:
            self.warm_up(limit, behind=behind)
        self._warm_up_decode()

    @torch.inference_mode()
    def _warm_up_decode(self) -> None:
        """A decode step with block tables as wide as can be, which CUDA's kernel divides among programs."""
        self.run(self.empty_decode_batch(1))

    @torch.inference_mode()
    def warm_up(self, num_tokens: int, *, behind: int = 0) -> None:
        """Compute and sample a step of so many tokens that nobody asked for, of as many sequences as can be.

        Each sequence has `behind` tokens before.

        What is compiled or set up at its first use is then ready before the first request, and the peak of memory is
        what a step takes. Needs blocks for these tokens; what they hold is lost.
        """
        pool = BlockPool(self.kv.num_blocks, self.kv.block_size, enable_prefix_caching=False)
        longest = self.sizes.max_model_len
        chunks = []
        for start in range(0, num_tokens, longest):
            table = BlockTable(pool)
            table.append(behind + min(longest, num_tokens - start))
            chunks.append(Chunk([0] * (table.num_tokens - behind), behind, table))
        logits = self.logits(self.hidden(chunks)[: self.sizes.max_num_seqs])
        probabilities = transform(logits, 1.0, top_k=logits.shape[-1], top_p=0.9).softmax(dim=-1)
        draw(probabilities, torch.rand(len(logits), device=self.device))

    def close(self) -> None:
        """Give weights, keys and values back; other ranks end."""
        if self.leader is not None:
            self.leader.close()
        del self.decoder, self.kv, self._graphs, self.tokens, self.positions, self._slots
        del self._query_starts, self._seq_lens, self._block_tables
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _fill(buffer: Tensor, values: Tensor) -> Tensor:
    """The buffer's beginning, holding these values."""
    part = buffer[: len(values)]
    part.copy_(values)
    return part


def num_kv_blocks(
    decoder: Decoder,
    block_size: int,
    sizes: SchedulerConfig,
    backend: AttentionBackend,
    *,
    kv_cache_memory_bytes: int | None,
    gpu_memory_utilization: float,
    graphs: bool,
) -> int:
    """How many blocks there is memory for: on a CPU a number of bytes, on CUDA what weights and steps leave.

    Args:
        kv_cache_memory_bytes: this much, on any device.
        gpu_memory_utilization: share of a CUDA device's memory to use in all.
        graphs: whether decode steps will be recorded there.

    Raises:
        OutOfMemoryError: there is no room for one block.
    """
    is_cuda = decoder.device.type == "cuda"
    block_bytes = block_size * decoder.config.kv_bytes_per_token(decoder.dtype)
    if kv_cache_memory_bytes is None:
        kv_cache_memory_bytes = DEFAULT_CPU_KV_BYTES
        if is_cuda:
            total = torch.cuda.get_device_properties(decoder.device).total_memory
            kv_cache_memory_bytes = int(total * gpu_memory_utilization) - _cuda_bytes(
                decoder, block_size, sizes, backend, graphs=graphs
            )
    if kv_cache_memory_bytes < block_bytes:
        raise OutOfMemoryError(
            f"{max(kv_cache_memory_bytes, 0) / 2**20:.1f} MiB are left for keys and values, and a block of "
            f"{block_size} tokens takes {block_bytes / 2**20:.1f}: "
            + ("raise gpu_memory_utilization" if is_cuda else "raise kv_cache_memory_bytes")
            + ", choose a smaller model, or a smaller block_size"
        )
    return kv_cache_memory_bytes // block_bytes


def _cuda_bytes(
    decoder: Decoder, block_size: int, sizes: SchedulerConfig, backend: AttentionBackend, *, graphs: bool
) -> int:
    """Memory of the device that other programs, the weights, graphs and a largest step take; the last two by trial."""
    tokens = min(sizes.max_num_batched_tokens, sizes.max_num_seqs * sizes.max_model_len)
    sequences = -(-tokens // sizes.max_model_len)
    try:
        trial = ModelRunner(decoder, sequences + tokens // block_size, block_size, sizes, backend)
        kept = trial.kv.num_bytes
        torch.cuda.reset_peak_memory_stats(decoder.device)
        trial.warm_up(tokens)
        peak = torch.cuda.max_memory_allocated(decoder.device) - kept
        torch.cuda.empty_cache()  # recording does so too, and the difference is to be the graphs'
        reserved = torch.cuda.memory_reserved(decoder.device)
        if graphs:
            trial.record_graphs(ladder(sizes.max_num_seqs)[-1:])
        peak += torch.cuda.memory_reserved(decoder.device) - reserved
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a step of {tokens} tokens does not fit beside the weights: lower max_num_batched_tokens or max_num_seqs, "
            "or choose a smaller model"
        ) from error
    trial.close()
    free, total = torch.cuda.mem_get_info(decoder.device)
    others = total - free - torch.cuda.memory_reserved(decoder.device)
    return others + peak


def check_gpu_memory_utilization(value: float) -> None:
    """Raise ConfigError unless it is a share."""
    if not 0 < value <= 1:
        raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {value}")
