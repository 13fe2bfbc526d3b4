"""Products of a few rows with weights as oneDNN has laid them out, read where they lie.

What it computes: x · weightᵀ + bias. For one row this is reading the weight once; nothing else takes time, if reading
is done well. oneDNN's own product of one row reads at half to two thirds of what the memory gives.

How it maps to the hardware: `PackedLinear` keeps the weight in blocks of 64 outputs (32 on some processors), in each of
which the inputs follow one another, so that a block is one stretch of memory: ``[outputs / 64, inputs, 64]``, in
bfloat16 ``[outputs / 64, inputs / 2, 64, 2]``. A number of x is multiplied with a row of 64 weights and added to 64
sums, which stay in registers from the first input to the last. Numba's own loops wrote them to memory and read them
again, and were no faster than oneDNN; so the loop is given to LLVM as it is to be (`_make_add_products`). Two blocks
are read at the same time, because two streams keep the memory busier than one. In bfloat16 each is asked for 2 KiB
ahead; in float32 the hardware is ahead by itself. The blocks are divided among the threads.

Where registers have 512 bits, up to 96 rows are multiplied here, 6 rows × 64 outputs at a time
(`minillm.kernels.cpu.tiles`). A part of a block stays in the first-level cache for all rows, which ask for the next
part meanwhile: without that, the first rows waited for it, and oneDNN was as fast. Tiles of 6 rows × 64 outputs are
dealt out to the threads, so that 9 or 15 blocks are as much for each of two.

All of SmolLM2-135M's products but the head, ms, medians on two cores, oneDNN / here: float32 without AVX-512 20 / 12,
float32 with AVX-512 18 / 14, bfloat16 with AVX-512 9.4 / 5.9. What bounds it: reading.

Definition of right: ``torch.nn.functional.linear`` of the weight that was packed.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import bits, read, write
from minillm.kernels.cpu.compiler import HAS_512_BITS, HAS_PAIRS
from minillm.kernels.cpu.fast_math import ONLY_PRANGE, use_torch_threads
from minillm.kernels.cpu.tiles import ROWS, WIDE, add_products_wide, products_wide, words, write_wide
from minillm.kernels.cpu.vectors import CACHE_LINE, INDEX, Builder

FEW_ROWS = 4
"""So many rows are multiplied one by one: their product is bound by reading the weight."""
MANY_ROWS = 96
"""So many are better served here than by oneDNN where registers have 512 bits.

Measured, all of SmolLM2-135M's products but the head, bfloat16, two cores, oneDNN / here: 8 rows 8.8 / 8.7 ms, 16 rows
9.2 / 8.1, 24 rows 11.2 / 8.0, 32 rows 13.2 / 11.6, 48 rows 17.2 / 13.2, 64 rows 21.5 / 17.8, 96 rows 27.8 / 24.1, 128
rows 35.0 / 32.7, 256 rows 62.6 / 62.1. (More would leave no step of few scores for `WARM_UP_TOKENS` to compile with.)
"""
LINES_OF_A_ROW = WIDE * 4 // CACHE_LINE
STEPS = 72
"""Rows of a block whose products with all rows of x are made before the next ones: 18 KiB; as many are asked for."""
INPUTS_AT_A_TIME = 128
"""Where there are several rows: a block's weights for so many inputs stay in the first-level cache for all rows."""
WEIGHTS_PER_THREAD = 2**16
"""Fewer are multiplied before another thread has woken up."""
AHEAD = 2048
"""Bytes before its turn that a part of a block is asked for, in bfloat16: 8.2 ms became 7.9, and 6.9 became 5.9, for
all of SmolLM2's on two AVX-512 cores. In float32 asking takes time: 12.8 ms with, 11.5 without, on two cores without
AVX-512."""
WIDTHS = (64, 32)
"""Outputs of a block, in the layouts that are read here; oneDNN chooses by processor, dtype and sizes."""
SIDE_BY_SIDE = {torch.float32: 1, torch.bfloat16: 2}
"""Consecutive inputs of an output that lie side by side."""


def side_by_side(weight):  # pragma: no cover
    """`SIDE_BY_SIDE` of a weight."""
    raise NotImplementedError("only inside compiled code")


@overload(side_by_side, inline="always")
def _side_by_side(weight):
    inputs = SIDE_BY_SIDE[torch.float32 if weight.dtype == types.float32 else torch.bfloat16]
    return lambda weight: inputs


def _make_add_products(streams: int, lanes: int) -> Any:
    """The inner loop, for so many blocks of so many outputs at the same time."""

    @intrinsic
    def add_products(typing_context, weight, block, x, first, last, sums):
        """sums[s, j] += Σᵢ x[i] · weight[block + s][i, j], over first ≤ i < last, for each stream s."""
        pairs = weight.dtype != types.float32

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            b = Builder(context, builder)
            weights, xs, totals = (b.array(signature.args[at], args[at]) for at in (0, 2, 5))
            starts = [b.row(weights, builder.add(args[1], INDEX(s))) for s in range(streams)]
            x_at = builder.ptrtoint(xs.data, INDEX)
            targets = [b.plus(builder.ptrtoint(totals.data, INDEX), s, 4 * lanes) for s in range(streams)]

            def body(i: Any, sums: Sequence[Any]) -> list[Any]:
                numbers = [b.spread(b.plus(b.plus(x_at, i, 4), k, 4), lanes) for k in range(1 + pairs)]
                after = []
                for total, start in zip(sums, starts, strict=True):
                    place = b.plus(start, i, 2 * lanes if pairs else 4 * lanes)
                    if not pairs:
                        rows = [b.load(place, lanes)]
                    else:
                        for line in range(0, 4 * lanes, CACHE_LINE):
                            b.prefetch(b.plus(place, AHEAD + line, 1))
                        rows = b.load_pairs(place, lanes)
                    for number, row in zip(numbers, rows, strict=True):
                        total = b.multiply_add(number, row, total)
                    after.append(total)
                return after

            before = [b.load(target, lanes) for target in targets]
            for total, target in zip(b.loop(args[3], args[4], 1 + pairs, before, body), targets, strict=True):
                b.store(total, target)
            return context.get_dummy_value()

        return types.void(weight, block, x, first, last, sums), generate

    return add_products


_add_products_64, _add_products_of_two_64 = (_make_add_products(streams, 64) for streams in (1, 2))
_add_products_32, _add_products_of_two_32 = (_make_add_products(streams, 32) for streams in (1, 2))


@njit(inline="always")
def _add_products_of_rows(x, row, some, adds, ones, sums, target, coming):
    if adds:
        add_products_wide(x, row, some, 0, ones, sums, target, coming)
    else:
        products_wide(x, row, some, 0, ones, sums, target, coming)


@njit(nogil=True, cache=True)
def _some_tiles(weight, x, rest, bias, out, begin, end):
    """These of the tiles, of `ROWS` rows and `WIDE` outputs each, block by block; of weight and x the words.

    Args:
        rest: the last rows of x where they are not `ROWS`, filled up with zeros.
    """
    steps, ones = weight.shape[1], np.ones(ROWS, np.float32)
    whole, tiles = len(x) // ROWS * ROWS, -(-len(x) // ROWS)
    sums, added = np.empty((tiles * ROWS, WIDE), np.float32), np.zeros(WIDE, np.float32)
    for block in range(begin // tiles, -(-end // tiles)):
        top, bottom = max(begin - block * tiles, 0) * ROWS, min(end - block * tiles, tiles) * ROWS
        for first in range(0, steps, STEPS):
            part = slice(first, first + STEPS)
            some, xs, rests = weight[block, part], x[:, part], rest[:, part]
            coming = some.ctypes.data + some.size * some.itemsize
            for row in range(top, bottom, ROWS):
                ask_for = coming + row // ROWS % LINES_OF_A_ROW * STEPS * CACHE_LINE
                if row < whole:
                    _add_products_of_rows(xs, row, some, first > 0, ones, sums, row, ask_for)
                else:
                    _add_products_of_rows(rests, 0, some, first > 0, ones, sums, row, ask_for)
        start, bottom = block * WIDE, min(bottom, len(x))
        count = min(WIDE, out.shape[1] - start)
        if len(bias):
            for j in range(count):
                added[j] = read(bias[start + j])
        if top >= bottom:
            continue
        if count == WIDE:
            write_wide(sums, added, out, top, bottom, start)
        else:
            for row in range(top, bottom):
                for j in range(count):
                    out[row, start + j] = write(out[row, start + j], sums[row, j] + added[j])


@njit(nogil=True, cache=True)
def _some_blocks(weight, x, bias, out, begin, end):
    """The outputs of these blocks."""
    rows, inputs = x.shape
    outputs = weight.shape[2] // side_by_side(weight)
    sums = np.empty((rows, 2, outputs), np.float32)
    step = inputs if rows == 1 else INPUTS_AT_A_TIME
    for block in range(begin, end, 2):
        sums[:] = 0
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            for row in range(rows):
                if outputs == 64 and block + 1 < end:
                    _add_products_of_two_64(weight, block, x[row], first, last, sums[row])
                elif outputs == 64:
                    _add_products_64(weight, block, x[row], first, last, sums[row])
                elif block + 1 < end:
                    _add_products_of_two_32(weight, block, x[row], first, last, sums[row])
                else:
                    _add_products_32(weight, block, x[row], first, last, sums[row])
        for row in range(rows):
            here, target = sums[row].reshape(2 * outputs), out[row]
            start = block * outputs
            for j in range(min(end * outputs, len(target), start + 2 * outputs) - start):
                more = read(bias[start + j]) if len(bias) else np.float32(0)
                target[start + j] = write(target[start + j], here[j] + more)


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def multiply(threads, weight, x, bias, out):
    """x · weightᵀ + bias, for x and out as they are stored; an empty bias is none."""
    blocks = weight.shape[0]
    parts = max(1, min(threads, weight.size // WEIGHTS_PER_THREAD))
    if len(x) > FEW_ROWS and weight.shape[2] == WIDE * side_by_side(weight):
        rest = np.zeros((ROWS, x.shape[1]), x.dtype)
        rest[: len(x) % ROWS] = x[len(x) // ROWS * ROWS :]
        numbers, rows, last_rows = words(weight), words(x), words(rest)
        tiles = blocks * -(-len(x) // ROWS)
        parts = min(parts, tiles)
        for part in prange(parts):
            begin, end = tiles * part // parts, tiles * (part + 1) // parts
            _some_tiles(numbers, rows, last_rows, bias, out, begin, end)
        return
    wide = np.empty(x.shape, np.float32)
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            wide[row, i] = read(x[row, i])
    for part in prange(parts):
        _some_blocks(weight, wide, bias, out, blocks * part // parts, blocks * (part + 1) // parts)


class FewRows(NamedTuple):
    """A packed weight as `product` reads it: oneDNN's memory, which `packed` keeps.

    Attributes:
        blocks: ``[blocks, inputs / s, width · s]``, s inputs of an output side by side.
        bias: ``[outputs]``, or empty.
        most_rows: of an x that `product` takes.
    """

    packed: Tensor
    blocks: Any
    bias: Any
    outputs: int
    most_rows: int


def most_rows(dtype: torch.dtype, width: int) -> int:
    """How many rows of x `product` takes, for a weight in blocks of so many outputs."""
    multiplies = dtype is torch.float32 or HAS_PAIRS
    return MANY_ROWS if HAS_512_BITS and multiplies and width == WIDE else FEW_ROWS


def views(packed: Tensor, bias: Float[Tensor, "out"] | None, outputs: int, inputs: int) -> list[FewRows]:
    """For `product`: the ways in which the numbers can lie in oneDNN's memory, to be tried by the caller."""
    beside = SIDE_BY_SIDE.get(packed.dtype)
    if beside is None or inputs % beside:
        return []
    try:
        address, num_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    except (AttributeError, RuntimeError):  # a PyTorch without these
        return []
    stored = np.float32 if packed.dtype is torch.float32 else np.uint16
    memory = np.frombuffer((ctypes.c_char * num_bytes).from_address(address), stored)
    bias_bits = np.empty(0, stored) if bias is None else bits(bias)
    found = []
    for width in WIDTHS:
        shape = (-(-outputs // width), inputs // beside, width * beside)
        if math.prod(shape) == memory.size:
            rows = most_rows(packed.dtype, width)
            found.append(FewRows(packed, memory.reshape(shape), bias_bits, outputs, rows))
    return found


def product(x: Float[Tensor, "rows in"], weight: FewRows) -> Float[Tensor, "rows out"]:
    """x · weightᵀ + bias; x is float32 or bfloat16 as the weight is, and has at most `most_rows`. Has no gradient."""
    out = torch.empty(len(x), weight.outputs, dtype=x.dtype)
    multiply(use_torch_threads(), weight.blocks, bits(x.contiguous()), weight.bias, bits(out))
    return out


def look_up(weight: FewRows, numbers: Int[Tensor, "rows"]) -> Float[Tensor, "rows in"]:
    """These rows of the weight that was packed: an embedding's tokens, in a head that is the same table.

    Raises:
        IndexError: there is no such row.
    """
    asked = numbers.numpy()
    if len(asked) and not 0 <= asked.min() <= asked.max() < weight.outputs:
        raise IndexError(f"rows from 0 to {weight.outputs - 1} can be looked up, not {asked.min()} to {asked.max()}")
    blocks, steps, numbers_of_a_step = weight.blocks.shape
    beside = SIDE_BY_SIDE[weight.packed.dtype]
    width = numbers_of_a_step // beside
    block, place = np.divmod(asked, width)
    found = weight.blocks.reshape(blocks, steps, width, beside)[block, :, place]
    return torch.from_numpy(found.reshape(len(asked), steps * beside)).view(weight.packed.dtype)
