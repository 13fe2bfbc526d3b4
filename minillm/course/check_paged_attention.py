"""What assignment 5's tests do with a student's functions: inputs, the right results by way of float64, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.cache import reference
from minillm.course.checks import check, check_close, check_equal, unchanged, without
from minillm.course.partial_attention import Partial, nothing
from minillm.engine.params import SamplingParams
from minillm.llm import LLM

ANSWERS = (
    "minillm.cache.reference:paged_attention",
    "minillm.cache.reference:_gather",
    "minillm.cache.reference:_attend",
    "minillm.transformer.attention:attend",
    "minillm.transformer.attention:dot_product_attention",
    "minillm.transformer.attention:sdpa_attention",
    "minillm.kernels.cpu.paged_attention:paged_attention",
    "minillm.kernels.cpu.paged_attention:attend",
    "minillm.kernels.gpu.paged_attention:paged_attention",
    "minillm.kernels.gpu.paged_attention:_attend",
    "minillm.kernels.gpu.paged_attention:_merge",
    "torch.nn.functional:scaled_dot_product_attention",
    "torch.nn.functional:softmax",
    "torch:softmax",
    "torch.special:softmax",
    "torch:logsumexp",
    "torch:Tensor.softmax",
    "torch:Tensor.logsumexp",
)
"""What is closed while a student's piece runs."""
PARTIALS = ("minillm.course.partial_attention:add_block", "minillm.course.partial_attention:merge")
"""What is closed as well where these two are the task; elsewhere they are lent."""

AROUND = 4096
"""Numbers before and behind a kernel's tensors, so that a missing mask is seen and does no harm."""


def check_online_sum(online_sum: Callable[..., Any], pieces: Sequence[Tensor], hint: str) -> None:
    """Compare (largest, total) with float64; a piece is overwritten when the next one is asked for."""

    def one_by_one() -> Iterator[Tensor]:
        for piece in pieces:
            shown = piece.clone()
            yield shown
            shown.fill_(torch.nan)

    row = torch.cat(list(pieces)).double()
    with without(*ANSWERS, *PARTIALS):
        got = online_sum(one_by_one())
    check(isinstance(got, tuple) and len(got) == 2, f"online_sum should return (largest, total), not {_kind(got)}")
    check_close(got[0], row.max().float(), "largest", hint=hint)
    check_close(got[1], (row - row.max()).exp().sum().float(), "total", hint=hint)


def check_add_block(
    add_block: Callable[..., Any],
    queries: Float[Tensor, "rows head_dim"],
    keys: Float[Tensor, "tokens head_dim"],
    values: Float[Tensor, "tokens head_dim"],
    sizes: Sequence[int],
    hint: str,
) -> None:
    """Add blocks of these sizes one after the other; after each, compare with float64 over all keys so far."""
    done, seen = nothing(*queries.shape), 0
    scores = queries.double() @ keys.double().T
    with without(*ANSWERS, *PARTIALS):
        for number, size in enumerate(sizes):
            block = keys[seen : seen + size], values[seen : seen + size]
            seen += size
            with unchanged(queries=queries, keys=keys, values=values, **done._asdict()):
                got = add_block(done, queries, *block)
            right = partial_of(scores[:, :seen], values[:seen])
            check_partial(got, right, f"after block {number}, the state", hint)
            done = Partial(*got)


def check_merge(merge: Callable[..., Any], a: Partial, b: Partial, right: Partial, hint: str) -> Partial:
    """Compare the merged state; return it."""
    given = {f"{name}.{part}": x for name, whole in (("a", a), ("b", b)) for part, x in whole._asdict().items()}
    with without(*ANSWERS, *PARTIALS), unchanged(**given):
        got = merge(a, b)
    check_partial(got, right, "the merged state", hint)
    return Partial(*got)


def check_partial(got: Any, right: Partial, what: str, hint: str) -> None:
    """Raise CheckError unless `got` is a Partial with these numbers."""
    check(isinstance(got, tuple) and len(got) == 3, f"{what} should be a Partial of three tensors, not {_kind(got)}")
    for name, mine, expected in zip(Partial._fields, got, right, strict=True):
        check_close(mine, expected, f"{what}.{name}", hint=hint)


def partial_of(scores: Float[Tensor, "rows tokens"], values: Float[Tensor, "tokens head_dim"]) -> Partial:
    """The state over these keys, by way of float64."""
    largest = scores.double().amax(dim=1)
    weights = (scores.double() - largest[:, None]).exp()
    return Partial(largest.float(), weights.sum(dim=1).float(), (weights @ values.double()).float())


def rows_of(state: Partial, rows: Tensor) -> Partial:
    """The state in these rows, nothing in the others."""
    blank = nothing(*state.weighted.shape)
    for mine, whole in zip(blank, state, strict=True):
        mine[rows] = whole[rows]
    return blank


class Decodes(NamedTuple):
    """The arguments of `paged_decode` but for the scale."""

    q: Float[Tensor, "seqs heads head_dim"]
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"]
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"]
    tables: Int[Tensor, "seqs max_blocks"]
    lengths: Int[Tensor, "seqs"]

    def attention(self, scale: float) -> Float[Tensor, "seqs heads head_dim"]:
        """What is right: the package's reference in float64."""
        q, k_cache, v_cache = self.q.double(), self.k_cache.double(), self.v_cache.double()
        where = self.tables, torch.arange(len(q) + 1), self.lengths
        right = reference.paged_attention(q, k_cache, v_cache, *where, max_query_len=1, scale=scale)
        return right.float()


def scattered(lengths: Sequence[int], kv_heads: int, group: int, head_dim: int, block_size: int) -> Decodes:
    """Random decodes: blocks anywhere in the pool, NaN in the slots that belong to nobody and behind a table's end."""
    counts = [ceil(length / block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 2)
    k_cache, v_cache = torch.full((2, len(order), kv_heads, block_size, head_dim), torch.nan)
    tables = order[-1].repeat(len(lengths), max(counts) + 1)  # the last block of the order stays NaN
    for seq, (length, own) in enumerate(zip(lengths, order[: sum(counts)].split(counts), strict=True)):
        tables[seq, : len(own)] = own
        position = torch.arange(length)
        slots = own[position // block_size] * block_size + position % block_size
        k, v = torch.randn(2, length, kv_heads, head_dim)
        reference.write_kv(k_cache, v_cache, k, v, slots)
    q = torch.randn(len(lengths), kv_heads * group, head_dim)
    return Decodes(q, k_cache, v_cache, tables, torch.tensor(lengths))


def check_decode(decode: Callable[..., Any], decodes: Decodes, scale: float, hint: str) -> None:
    """Compare a function for decodes with the reference."""
    right = decodes.attention(scale)
    with without(*ANSWERS), unchanged(**decodes._asdict()):
        got = decode(*decodes, scale)
    check_close(got, right, "the attention [seq, head, channel]", hint=hint)


def check_kernel(kernel: Any, decodes: Decodes, scale: float, hint: str) -> None:
    """Compare a Triton kernel for decodes with the reference, and look at what lies around its output."""
    from triton.runtime import KernelInterface  # on Linux only

    check(isinstance(kernel, KernelInterface), "decode_kernel should be a Triton kernel: keep @triton.jit")
    right = decodes.attention(scale)
    _, kv_heads, block_size, head_dim = decodes.k_cache.shape
    inside = Decodes(*(_surrounded(x, torch.nan if x.is_floating_point() else 0)[1] for x in decodes))
    memory, out = _surrounded(torch.full_like(decodes.q, torch.nan), 7)
    sizes = {"GROUP": decodes.q.shape[1] // kv_heads, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}
    with without(*ANSWERS), unchanged(**inside._asdict()):
        kernel[len(inside.q), kv_heads](*inside, out, scale, inside.tables.stride(0), **sizes, ROWS=16, KEYS=16)
    check_close(out, right, "out [seq, head, channel]", atol=1e-4, hint=hint)
    around = torch.cat([memory[:AROUND], memory[-AROUND:]])
    check(bool((around == 7).all()), "something was stored around `out`: has the store mask=is_row?")


def check_engine(engine_with: Callable[..., LLM], decode: Callable[..., Any], prompts: list[str], steps: int) -> None:
    """The engine must say with `decode` what it says with the package's attention, and must have called it."""
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        return decode(*arguments)

    def told(llm: LLM) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=steps)
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]

    plain: dict[str, Any] = {"dtype": "float32", "device": "cpu", "attention_backend": "reference"}
    with LLM("tiny", **plain, num_gpu_blocks_override=64) as llm:
        right = told(llm)
    with engine_with(counted) as llm, without(*ANSWERS):
        got = told(llm)
    hint = "Token 0 comes after the whole prompt. Does your function pass the checks of its own task?"
    for prompt, mine, expected in zip(prompts, got, right, strict=True):
        check_equal(mine, expected, f"the tokens after {prompt!r}", hint=hint)
    check(len(calls) >= steps, f"your function was called {len(calls)} times in {steps} steps: is it in the engine?")


def _surrounded(tensor: Tensor, filler: float) -> tuple[Tensor, Tensor]:
    """Memory with room around it, and the tensor inside."""
    memory = torch.full((tensor.numel() + 2 * AROUND,), filler, dtype=tensor.dtype)
    inside = memory[AROUND:-AROUND].view(tensor.shape)
    inside.copy_(tensor)
    return memory, inside


def _kind(value: Any) -> str:
    if value is None:
        return "None (is a return missing?)"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")
