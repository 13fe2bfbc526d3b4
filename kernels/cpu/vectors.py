"""Inner loops given to LLVM as they are to be, where Numba's own loops are not turned into good ones.

LLVM makes vectors of Numba's loops by rules of thumb: it keeps sums in memory, adds up a vector's lanes for each result
alone, and, on newer Intel processors, takes half of the 512 bits that there are. Here loops are written with LLVM's
vectors, which are as wide as one likes: what does not fit a register becomes several instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from minillm.kernels.cpu.compiler import HAS_512_BITS

NUMBER, INDEX, WORD, BYTES = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
CACHE_LINE = 64
LANES = 16 if HAS_512_BITS else 8
"""Numbers of a register."""
KEYS_AT_A_TIME = 4
HEADS_AT_A_TIME = 4 if HAS_512_BITS else 3
"""Keys × heads sums are carried in registers."""


class Builder:
    """LLVM's builder for vectors of float32."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.ir = context, builder

    def array(self, kind: Any, value: Any) -> Any:
        """A Numba array's `data`, `shape` and `strides`."""
        return self.context.make_array(kind)(self.context, self.ir, value)

    def row(self, array: Any, number: Any) -> Any:
        """The address of ``array[number]``."""
        stride = cgutils.unpack_tuple(self.ir, array.strides)[0]
        return self.ir.add(self.ir.ptrtoint(array.data, INDEX), self.ir.mul(number, stride))

    def plus(self, address: Any, count: Any, size: int) -> Any:
        """The address `count` things of `size` bytes further; count is a number or a value."""
        if isinstance(count, int):
            return self.ir.add(address, INDEX(count * size))
        return self.ir.add(address, self.ir.mul(count, INDEX(size)))

    def vector(self, lanes: int) -> Any:
        """The type."""
        return ir.VectorType(NUMBER, lanes)

    def load(self, address: Any, lanes: int, stored: Any = types.float32) -> Any:
        """Consecutive numbers, float32 or bfloat16 as they are stored, as float32."""
        if stored == types.float32:
            return self.ir.load(self.ir.inttoptr(address, self.vector(lanes).as_pointer()), align=4)
        halves = self.ir.load(self.ir.inttoptr(address, ir.VectorType(ir.IntType(16), lanes).as_pointer()), align=2)
        return self.upper(self.ir.zext(halves, ir.VectorType(WORD, lanes)), lanes)

    def load_pairs(self, address: Any, lanes: int) -> list[Any]:
        """Consecutive pairs of bfloat16 as two vectors: the first of each pair, and the second."""
        return self.both(self.words(address, lanes))

    def words(self, address: Any, lanes: int) -> Any:
        """Consecutive 32-bit words."""
        return self.ir.load(self.ir.inttoptr(address, ir.VectorType(WORD, lanes).as_pointer()), align=4)

    def both(self, pairs: Any) -> list[Any]:
        """Of pairs of bfloat16, the first ones and the second ones."""
        lanes = pairs.type.count
        second = self.ir.and_(pairs, ir.Constant(pairs.type, [0xFFFF0000] * lanes))
        return [self.upper(pairs, lanes), self.ir.bitcast(second, self.vector(lanes))]

    def prefetch(self, address: Any) -> None:
        """Ask the memory for a cache line that will be read soon."""
        kind = ir.FunctionType(ir.VoidType(), [BYTES, WORD, WORD, WORD])
        function = cgutils.get_or_insert_function(self.ir.module, kind, "llvm.prefetch.p0")
        read, near, data = WORD(0), WORD(3), WORD(1)
        self.ir.call(function, [self.ir.inttoptr(address, BYTES), read, near, data])

    def upper(self, words: Any, lanes: int) -> Any:
        """The bfloat16s in the lower halves of 32-bit words."""
        return self.ir.bitcast(self.ir.shl(words, ir.Constant(words.type, [16] * lanes)), self.vector(lanes))

    def store(self, value: Any, address: Any) -> None:
        """Write a vector of float32 or bfloat16."""
        align = 4 if value.type.element == NUMBER else 2
        self.ir.store(value, self.ir.inttoptr(address, value.type.as_pointer()), align=align)

    def spread(self, address: Any, lanes: int) -> Any:
        """The float32 there, in all lanes."""
        return self.all_lanes(self.ir.load(self.ir.inttoptr(address, NUMBER.as_pointer())), lanes)

    def all_lanes(self, value: Any, lanes: int) -> Any:
        """A value, in all lanes."""
        nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        return self.shuffle(self.ir.insert_element(nothing, value, WORD(0)), nothing, [0] * lanes)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """These lanes of a and, numbered on, of b."""
        return self.ir.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(lanes)), list(lanes)))

    def multiply_add(self, a: Any, b: Any, total: Any) -> Any:
        """a · b + total."""
        name = f"llvm.fma.v{total.type.count}f32"
        kind = ir.FunctionType(total.type, [total.type] * 3)
        return self.ir.call(cgutils.get_or_insert_function(self.ir.module, kind, name), [a, b, total])

    def loop(self, first: Any, last: Any, step: int, carried: Sequence[Any], body: Any) -> list[Any]:
        """``carried = body(i, carried)`` for first ≤ i < last, at least once."""
        before = self.ir.block
        inside, behind = self.ir.append_basic_block("inside"), self.ir.append_basic_block("behind")
        self.ir.branch(inside)
        self.ir.position_at_end(inside)
        i = self.ir.phi(INDEX)
        i.add_incoming(first, before)
        values = [self.ir.phi(value.type) for value in carried]
        after = body(i, values)
        end_of_body = self.ir.block
        following = self.ir.add(i, INDEX(step))
        for value, start, end in zip([i, *values], [first, *carried], [following, *after], strict=True):
            if value is not i:
                value.add_incoming(start, before)
            value.add_incoming(end, end_of_body)
        self.ir.cbranch(self.ir.icmp_signed("<", following, last), inside, behind)
        self.ir.position_at_end(behind)
        return list(after)

    def woven_sums(self, vectors: Sequence[Any]) -> Any:
        """Of four vectors a, b, c, d, for each four of their lanes: the sum of a's, of b's, of c's and of d's.

        Two vectors at a time are woven together and added, so that no vector's lanes are added up alone.
        """
        lanes = vectors[0].type.count
        groups = range(0, lanes, 4)

        def weave(a: Any, b: Any, places: tuple[int, int], pairs: bool) -> Any:
            picked = []
            for g in groups:
                one, other = (g + places[0], g + places[1])
                theirs = (lanes + one, lanes + other)
                picked += [one, other, *theirs] if pairs else [one, theirs[0], other, theirs[1]]
            return self.shuffle(a, b, picked)

        def join(a: Any, b: Any, pairs: bool) -> Any:
            return self.ir.fadd(weave(a, b, (0, 1), pairs), weave(a, b, (2, 3), pairs))

        return join(join(vectors[0], vectors[1], False), join(vectors[2], vectors[3], False), True)

    def four_sums(self, vectors: Sequence[Any]) -> Any:
        """The sums of the lanes of four vectors, as a vector of four."""
        total, lanes = self.woven_sums(vectors), vectors[0].type.count
        while lanes > 4:
            lanes //= 2
            upper = self.shuffle(total, total, range(lanes, 2 * lanes))
            total = self.ir.fadd(self.shuffle(total, total, range(lanes)), upper)
        return total


@intrinsic
def _pointer(typing_context, like, address):
    """An address as one of numbers as `like` holds."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(pointer))

    return pointer(like, types.int64), generate


@njit(inline="always")
def numbers_at(like, address, shape):
    """A contiguous array of numbers as `like` holds, from an address on."""
    return carray(_pointer(like, address), shape)


@intrinsic
def _ask_for(typing_context, address):
    """`Builder.prefetch`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Builder(context, builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@njit(inline="always")
def prefetch(rows):
    """Ask for all of a contiguous array, a cache line at a time."""
    start = rows.ctypes.data
    for line in range(0, rows.size * rows.itemsize, CACHE_LINE):
        _ask_for(np.intp(start + line))


def _make_dots(heads: int) -> Any:
    @intrinsic
    def dots(typing_context, queries, head, keys, key, dims, scores):
        """scores[head + h, key + k] = queries[head + h] · keys[key + k], over the first dims, a multiple of `LANES`."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            b = Builder(context, builder)
            q, k, out = (b.array(signature.args[at], args[at]) for at in (0, 2, 5))
            stored = signature.args[2].dtype
            size = 4 if stored == types.float32 else 2
            rows = [b.row(q, builder.add(args[1], INDEX(h))) for h in range(heads)]
            keys_at = [b.row(k, builder.add(args[3], INDEX(t))) for t in range(KEYS_AT_A_TIME)]
            zeros = ir.Constant(b.vector(LANES), [0.0] * LANES)

            def body(d: Any, sums: Sequence[Any]) -> list[Any]:
                qs = [b.load(b.plus(row, d, 4), LANES) for row in rows]
                ks = [b.load(b.plus(at, d, size), LANES, stored) for at in keys_at]
                return [
                    b.multiply_add(qs[h], ks[t], sums[h * KEYS_AT_A_TIME + t])
                    for h in range(heads)
                    for t in range(KEYS_AT_A_TIME)
                ]

            sums = b.loop(INDEX(0), args[4], LANES, [zeros] * (heads * KEYS_AT_A_TIME), body)
            for h in range(heads):
                target = b.plus(b.row(out, builder.add(args[1], INDEX(h))), args[3], 4)
                b.store(b.four_sums(sums[h * KEYS_AT_A_TIME : (h + 1) * KEYS_AT_A_TIME]), target)
            return context.get_dummy_value()

        return types.void(queries, types.intp, keys, types.intp, types.intp, scores), generate

    return dots


def _make_add_weighted(heads: int, lanes: int) -> Any:
    @intrinsic
    def add_weighted(typing_context, weights, head, values, first, last, dim, shrink, sums):
        """sums[head + h, dim:] = shrink[head + h] · sums[head + h, dim:] + Σₜ weights[head + h, t] · values[t, dim:].

        Over first ≤ t < last, of which there is one; for `lanes` dims.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            b = Builder(context, builder)
            w, v, less, out = (b.array(signature.args[at], args[at]) for at in (0, 2, 6, 7))
            stored = signature.args[2].dtype
            size = 4 if stored == types.float32 else 2
            numbers = [builder.add(args[1], INDEX(h)) for h in range(heads)]
            targets = [b.plus(b.row(out, number), args[5], 4) for number in numbers]
            weights_at = [b.row(w, number) for number in numbers]
            before = [
                builder.fmul(b.load(target, lanes), b.spread(b.row(less, number), lanes))
                for target, number in zip(targets, numbers, strict=True)
            ]

            def body(t: Any, totals: Sequence[Any]) -> list[Any]:
                value = b.load(b.plus(b.row(v, t), args[5], size), lanes, stored)
                return [
                    b.multiply_add(b.spread(b.plus(at, t, 4), lanes), value, total)
                    for at, total in zip(weights_at, totals, strict=True)
                ]

            for total, target in zip(b.loop(args[3], args[4], 1, before, body), targets, strict=True):
                b.store(total, target)
            return context.get_dummy_value()

        kinds = (weights, types.intp, values, types.intp, types.intp, types.intp, shrink, sums)
        return types.void(*kinds), generate

    return add_weighted


dots_of_1, dots_of_2, dots_of_3, dots_of_4 = (_make_dots(heads) for heads in (1, 2, 3, 4))
add_weighted_1, add_weighted_2, add_weighted_3, add_weighted_4 = (
    _make_add_weighted(heads, 2 * LANES) for heads in (1, 2, 3, 4)
)
