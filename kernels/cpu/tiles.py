"""The inner loops of attention by tiles: products of 6 rows, and the online softmax of one row, as LLVM vectors.

A product is C += A · B with a number of A spread over a register and multiplied with a row of B. 6 × 64 sums (6 × 16
where registers have 256 bits) stay in registers from the first step to the last; each row of B is read once for 6 rows
of A, and each number of A once for 64 columns, so that arithmetic is what bounds it (Goto & van de Geijn 2008, "Anatomy
of High-Performance Matrix Multiplication", §4).

Numbers are 32-bit words: a float32, or, where the processor multiplies them (AVX512-BF16), a pair of bfloat16 that
follow each other along the summed dimension; one instruction multiplies 16 pairs and adds both products to 16 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from minillm.kernels.cpu.bfloat16 import nearest
from minillm.kernels.cpu.compiler import HAS_512_BITS, HAS_PAIRS
from minillm.kernels.cpu.vectors import CACHE_LINE, INDEX, LANES, NUMBER, WORD, Builder

ROWS, KEYS = 6, 64
"""Rows of A, and keys of a tile."""
WIDE, NARROW = 64 if HAS_512_BITS else 16, 16
"""Columns whose sums are carried together; those that are left are done 16 at a time."""
BLOCK, CHANNELS = 16, 64
"""Keys, and channels, that `attend_to_block_1` to `attend_to_block_4` take at a time."""
MASKED = -1e30
"""The score of a key that is not seen: finite, so that nothing becomes NaN before a row has seen its first key."""
PAIR_SUMS = 16
"""Sums of one instruction for pairs."""


class _BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def words(array):  # pragma: no cover
    """Stored numbers as words: float32 as they are, of bfloat16 each two that follow each other."""
    raise NotImplementedError("only inside compiled code")


@overload(words, inline="always")
def _words(array):
    if array.dtype == types.float32:
        return lambda array: array
    return lambda array: array.view(np.uint32)


class TileBuilder(Builder):
    """`Builder` with what tiles need."""

    def spread_word(self, address: Any, lanes: int) -> Any:
        """The word there, in all lanes."""
        return self.all_lanes(self.ir.load(self.ir.inttoptr(address, WORD.as_pointer())), lanes)

    def constant(self, value: float, lanes: int) -> Any:
        """A number, in all lanes."""
        return ir.Constant(self.vector(lanes), [value] * lanes)

    def add_pairs(self, a: Any, b: Any, total: Any) -> Any:
        """total[i] + a[2i] · b[2i] + a[2i + 1] · b[2i + 1]; in several instructions where there is not the one."""
        if not HAS_PAIRS:
            for first, second in zip(self.both(a), self.both(b), strict=True):
                total = self.multiply_add(first, second, total)
            return total
        pairs = ir.VectorType(_BFloat(), 2 * PAIR_SUMS)
        kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
        function = cgutils.get_or_insert_function(self.ir.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return self.ir.call(function, [total, self.ir.bitcast(a, pairs), self.ir.bitcast(b, pairs)])

    def side_by_side(self, first: Any, second: Any, count: int) -> list[Any]:
        """Of two rows of bfloat16 the pairs of numbers at the same place, as words, `PAIR_SUMS` in each vector."""
        pairs, half = [], ir.IntType(16)
        for start in range(0, count, 2 * PAIR_SUMS):
            kind = ir.VectorType(half, 2 * PAIR_SUMS).as_pointer()
            a, b = (self.ir.load(self.ir.inttoptr(self.plus(row, start, 2), kind), align=2) for row in (first, second))
            for begin in (0, PAIR_SUMS):
                lanes = [place for at in range(begin, begin + PAIR_SUMS) for place in (at, 2 * PAIR_SUMS + at)]
                pairs.append(self.ir.bitcast(self.shuffle(a, b, lanes), ir.VectorType(WORD, PAIR_SUMS)))
        return pairs

    def sums_of_fours(self, woven: Sequence[Any]) -> Any:
        """The sums of 16 vectors' 16 lanes, from four `woven_sums`."""

        def join(a: Any, b: Any, first: Sequence[int], second: Sequence[int]) -> Any:
            picked = [[4 * group + lane for group in groups for lane in range(4)] for groups in (first, second)]
            return self.ir.fadd(*(self.shuffle(a, b, lanes) for lanes in picked))

        halves = [join(woven[at], woven[at + 1], (0, 1, 4, 5), (2, 3, 6, 7)) for at in (0, 2)]
        return join(halves[0], halves[1], (0, 2, 4, 6), (1, 3, 5, 7))

    def narrow(self, numbers: Any) -> Any:
        """float32 → bfloat16."""
        if not HAS_PAIRS:
            return nearest(self.ir, numbers)
        return self.ir.fptrunc(numbers, ir.VectorType(_BFloat(), numbers.type.count))

    def larger(self, a: Any, b: Any) -> Any:
        """Elementwise."""
        return self.ir.select(self.ir.fcmp_ordered(">", a, b), a, b)

    def largest(self, numbers: Any) -> Any:
        """The largest of a vector, in all lanes (of numbers; where one is NaN, any of them or NaN)."""
        lanes = numbers.type.count
        step = lanes // 2
        while step:
            numbers = self.larger(numbers, self.shuffle(numbers, numbers, [i ^ step for i in range(lanes)]))
            step //= 2
        return numbers

    def sum(self, numbers: Any) -> Any:
        """The sum of a vector, in all lanes."""
        lanes = numbers.type.count
        step = lanes // 2
        while step:
            numbers = self.ir.fadd(numbers, self.shuffle(numbers, numbers, [i ^ step for i in range(lanes)]))
            step //= 2
        return numbers

    def exp2(self, x: Any) -> Any:
        """2ˣ for x ≤ 0, as `minillm.kernels.cpu.fast_math.exp2`; below −100 it is 2⁻¹⁰⁰, and NaN stays NaN."""
        lanes = x.type.count
        least = self.constant(-100.0, lanes)
        x = self.ir.select(self.ir.fcmp_unordered(">", x, least), x, least)
        kind = ir.FunctionType(x.type, [x.type])
        floor = cgutils.get_or_insert_function(self.ir.module, kind, f"llvm.floor.v{lanes}f32")
        whole = self.ir.call(floor, [x])
        f = self.ir.fsub(x, whole)
        factors = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)
        p, *rest = (self.constant(float(np.float32(factor)), lanes) for factor in factors)
        for factor in rest:
            p = self.multiply_add(p, f, factor)
        words = ir.VectorType(WORD, lanes)
        exponent = self.ir.shl(self.ir.fptosi(whole, words), ir.Constant(words, [23] * lanes))
        return self.ir.bitcast(self.ir.add(self.ir.bitcast(p, words), exponent), x.type)

    def online_softmax(self, powers: Sequence[Any], largest_at: Any, total_at: Any) -> tuple[list[Any], Any]:
        """Take one row's next scores, as powers of 2, into the numbers there: its largest, and its sum of exponentials.

        Returns the numerators, and by what earlier ones shrink. A score that is NaN or infinite makes the sum NaN.
        """
        lanes, best = powers[0].type.count, powers[0]
        for power in powers[1:]:
            best = self.larger(best, power)
        before = self.spread(largest_at, lanes)
        best = self.larger(self.largest(best), before)
        numerators = [self.exp2(self.ir.fsub(power, best)) for power in powers]
        added = numerators[0]
        for numerator in numerators[1:]:
            added = self.ir.fadd(added, numerator)
        shrunk = self.exp2(self.ir.fsub(before, best))
        total = self.multiply_add(self.spread(total_at, lanes), shrunk, self.sum(added))
        for place, value in ((largest_at, best), (total_at, total)):
            self.store_first(value, place)
        return numerators, shrunk

    def store_first(self, value: Any, address: Any) -> None:
        """Write a vector's first number."""
        first = self.ir.extract_element(value, WORD(0))
        self.ir.store(first, self.ir.inttoptr(address, NUMBER.as_pointer()))

    def number(self, array: Any, index: Any) -> Any:
        """The address of a number of a one-dimensional array."""
        return self.plus(self.ir.ptrtoint(array.data, INDEX), index, 4)


def _make_products(columns: int, adds: bool) -> Any:
    """C = A · B, or C = shrink · C + A · B, for `ROWS` rows of A and so many columns of B."""

    @intrinsic
    def products(typing_context, a, a_row, b, column, shrink, c, c_row, coming):
        """c[c_row + i, column:] (shrunk by shrink[i], or not counted) + Σₛ a[a_row + i, s] · b[s, column:].

        From the address `coming` on, a cache line is asked for in each step.
        """
        are_pairs = a.dtype != types.float32
        lanes = PAIR_SUMS if are_pairs else columns

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            t = TileBuilder(context, builder)
            left, right, less, out = (t.array(signature.args[at], args[at]) for at in (0, 2, 4, 5))
            steps, b_start = cgutils.unpack_tuple(builder, right.shape)[0], builder.ptrtoint(right.data, INDEX)
            b_start, b_stride = t.plus(b_start, args[3], 4), cgutils.unpack_tuple(builder, right.strides)[0]
            rows = [t.row(left, builder.add(args[1], INDEX(i))) for i in range(ROWS)]
            targets = [t.plus(t.row(out, builder.add(args[6], INDEX(i))), args[3], 4) for i in range(ROWS)]
            parts = range(0, columns, lanes)

            def body(step: Any, sums: Sequence[Any]) -> list[Any]:
                at = builder.add(b_start, builder.mul(step, b_stride))
                t.prefetch(t.plus(args[7], step, CACHE_LINE))
                after = []
                if are_pairs:
                    bs = [t.words(t.plus(at, part, 4), lanes) for part in parts]
                else:
                    bs = [t.load(t.plus(at, part, 4), lanes) for part in parts]
                for i, row in enumerate(rows):
                    place = t.plus(row, step, 4)
                    number = t.spread_word(place, lanes) if are_pairs else t.spread(place, lanes)
                    for j, beside in enumerate(bs):
                        total = sums[i * len(bs) + j]
                        after.append((t.add_pairs if are_pairs else t.multiply_add)(number, beside, total))
                return after

            before = []
            for i, target in enumerate(targets):
                for part in parts:
                    if adds:
                        factor = t.spread(t.number(less, INDEX(i)), lanes)
                        before.append(builder.fmul(factor, t.load(t.plus(target, part, 4), lanes)))
                    else:
                        before.append(t.constant(0.0, lanes))
            places = [t.plus(target, part, 4) for target in targets for part in parts]
            for total, place in zip(t.loop(INDEX(0), steps, 1, before, body), places, strict=True):
                t.store(total, place)
            return context.get_dummy_value()

        kinds = (a, types.intp, b, types.intp, shrink, c, types.intp, types.intp)
        return types.void(*kinds), generate

    return products


products_wide = _make_products(WIDE, adds=False)
add_products_wide, add_products_narrow = (_make_products(columns, adds=True) for columns in (WIDE, NARROW))


@intrinsic
def write_wide(typing_context, sums, added, out, first, last, column):
    """out[i, column:] = sums[i] + added, as out stores numbers, for first ≤ i < last and `WIDE` columns."""
    stored, lanes = out.dtype, min(WIDE, 16)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        t = TileBuilder(context, builder)
        given, more, target = (t.array(signature.args[at], args[at]) for at in range(3))
        size = 4 if stored == types.float32 else 2
        parts = range(0, WIDE, lanes)
        addeds = [t.load(t.number(more, INDEX(part)), lanes) for part in parts]

        def body(row: Any, _: Sequence[Any]) -> list[Any]:
            start = t.plus(t.row(target, row), args[5], size)
            for part, beside in zip(parts, addeds, strict=True):
                total = builder.fadd(t.load(t.plus(t.row(given, row), part, 4), lanes), beside)
                t.store(total if size == 4 else t.narrow(total), t.plus(start, part, size))
            return []

        t.loop(args[3], args[4], 1, [], body)
        return context.get_dummy_value()

    return types.void(sums, added, out, types.intp, types.intp, types.intp), generate


@intrinsic
def softmax_step(typing_context, scores, i, scale, row, largest, total, shrink, weights):
    """The online softmax's next step for one row, whose `KEYS` scores, times scale, are powers of 2.

    weights[i] are the new numerators, as words; largest[row] and total[row] take them in, and what was summed before
    shrinks by shrink[i].
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        t = TileBuilder(context, builder)
        given, high, sums, less, out = (t.array(signature.args[at], args[at]) for at in (0, 4, 5, 6, 7))
        source, target = t.row(given, args[1]), t.row(out, args[1])
        factor = t.all_lanes(args[2], LANES)
        parts = range(0, KEYS, LANES)
        powers = [builder.fmul(factor, t.load(t.plus(source, part, 4), LANES)) for part in parts]
        numerators, shrunk = t.online_softmax(powers, t.number(high, args[3]), t.number(sums, args[3]))
        t.store_first(shrunk, t.number(less, args[1]))
        are_numbers = signature.args[7].dtype == types.float32
        for part, numerator in zip(parts, numerators, strict=True):
            if are_numbers:
                t.store(numerator, t.plus(target, part, 4))
            else:
                t.store(t.narrow(numerator), t.plus(target, part, 2))
        return context.get_dummy_value()

    kinds = (scores, types.intp, types.float32, types.intp, largest, total, shrink, weights)
    return types.void(*kinds), generate


def _make_attend_to_block(heads: int) -> Any:
    """The online softmax's next step for so many queries of one group, and a block of `BLOCK` keys."""

    @intrinsic
    def attend_to_block(
        typing_context, queries, head, keys, values, block, kv_head, coming, first, last, scale, largest, total,
        weights, sums
    ):  # fmt: skip
        """Take the block's keys first ≤ t < last into largest, total and sums of the queries from `head` on.

        queries and weights hold words, keys and values stored numbers: ``[blocks, kv_heads, BLOCK, channels]``. The
        same cache lines of the block `coming` are asked for on the way.
        """
        are_pairs = queries.dtype != types.float32
        size = 2 if are_pairs else 4

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            t = TileBuilder(context, builder)
            names = {0: "q", 2: "keys", 3: "values", 10: "largest", 11: "total", 12: "weights", 13: "sums"}
            arrays = {name: t.array(signature.args[at], args[at]) for at, name in names.items()}

            def rows_of(name: str, number: Any) -> Any:
                """Address of a row of this head in block `number`, by the row's number."""
                strides = cgutils.unpack_tuple(builder, arrays[name].strides)
                start = builder.add(t.row(arrays[name], number), builder.mul(args[5], strides[1]))
                return lambda row: builder.add(start, builder.mul(row, strides[2]))

            key_at, coming_key_at, value_at, coming_value_at = (
                rows_of(name, number) for name in ("keys", "values") for number in (args[4], args[6])
            )
            numbers = [builder.add(args[1], INDEX(h)) for h in range(heads)]
            q_rows = [t.row(arrays["q"], number) for number in numbers]
            words = cgutils.unpack_tuple(builder, arrays["q"].shape)[1]
            add = t.add_pairs if are_pairs else t.multiply_add

            def load(address: Any) -> Any:
                return t.words(address, BLOCK) if are_pairs else t.load(address, BLOCK)

            def scores_of(four: int) -> list[Any]:
                rows, coming = ([at(INDEX(key)) for key in range(four, four + 4)] for at in (key_at, coming_key_at))

                def body(word: Any, sums: Sequence[Any]) -> list[Any]:
                    for row in coming:
                        t.prefetch(t.plus(row, word, 4))
                    qs, ks = ([load(t.plus(row, word, 4)) for row in some] for some in (q_rows, rows))
                    return [add(q, k, sums[h * 4 + i]) for h, q in enumerate(qs) for i, k in enumerate(ks)]

                zeros = [t.constant(0.0, BLOCK)] * (4 * heads)
                sums = t.loop(INDEX(0), words, BLOCK, zeros, body)
                return [t.woven_sums(sums[4 * h : 4 * h + 4]) for h in range(heads)]

            fours = [scores_of(four) for four in range(0, BLOCK, 4)]
            lanes = ir.Constant(ir.VectorType(INDEX, BLOCK), list(range(BLOCK)))
            seen = builder.and_(
                builder.icmp_signed(">=", lanes, t.all_lanes(args[7], BLOCK)),
                builder.icmp_signed("<", lanes, t.all_lanes(args[8], BLOCK)),
            )
            factor, shrunk = t.all_lanes(args[9], BLOCK), []
            for h, number in enumerate(numbers):
                powers = builder.fmul(factor, t.sums_of_fours([four[h] for four in fours]))
                powers = builder.select(seen, powers, t.constant(MASKED, BLOCK))
                state = (t.number(arrays[name], number) for name in ("largest", "total"))
                (numerators,), less = t.online_softmax([powers], *state)
                t.store(t.narrow(numerators) if are_pairs else numerators, t.row(arrays["weights"], number))
                shrunk.append(less)

            weights_at = [t.row(arrays["weights"], number) for number in numbers]
            totals_at = [t.row(arrays["sums"], number) for number in numbers]
            parts = range(CHANNELS // BLOCK)

            def channels(channel: Any, _: Sequence[Any]) -> list[Any]:
                places = [t.plus(t.plus(row, channel, 4), part, 4 * BLOCK) for row in totals_at for part in parts]
                sums = [builder.fmul(shrunk[at // len(parts)], t.load(place, BLOCK)) for at, place in enumerate(places)]

                def body(key: Any, sums: Sequence[Any]) -> list[Any]:
                    rows, coming = [value_at(key)], [coming_value_at(key)]
                    if are_pairs:  # one that is not seen, and may be no number, gives its place to the other
                        following = builder.add(key, INDEX(1))
                        coming.append(coming_value_at(following))
                        one = builder.select(builder.icmp_signed("<", key, args[7]), following, key)
                        other = builder.select(builder.icmp_signed("<", following, args[8]), following, key)
                        rows = [value_at(number) for number in (one, other)]
                    starts, asked = ([t.plus(row, channel, size) for row in some] for some in (rows, coming))
                    for start in asked:
                        for line in range(0, CHANNELS * size, CACHE_LINE):
                            t.prefetch(t.plus(start, line, 1))
                    if are_pairs:
                        values = t.side_by_side(starts[0], starts[1], CHANNELS)
                    else:
                        values = [t.load(t.plus(starts[0], part, 4 * BLOCK), BLOCK) for part in parts]
                    spread = t.spread_word if are_pairs else t.spread
                    ws = [spread(t.plus(at, key, size), BLOCK) for at in weights_at]
                    return [
                        add(w, value, sums[h * len(parts) + part])
                        for h, w in enumerate(ws)
                        for part, value in enumerate(values)
                    ]

                begin = builder.and_(args[7], INDEX(-2)) if are_pairs else args[7]
                sums = t.loop(begin, args[8], 2 if are_pairs else 1, sums, body)
                for value, place in zip(sums, places, strict=True):
                    t.store(value, place)
                return []

            end = cgutils.unpack_tuple(builder, arrays["values"].shape)[3]
            t.loop(INDEX(0), end, CHANNELS, [], channels)
            return context.get_dummy_value()

        numbers, scores = [types.intp] * 5, (types.float32, largest, total, weights, sums)
        kinds = (queries, types.intp, keys, values, *numbers, *scores)
        return types.void(*kinds), generate

    return attend_to_block


attend_to_block_1, attend_to_block_2, attend_to_block_3, attend_to_block_4 = (
    _make_attend_to_block(heads) for heads in (1, 2, 3, 4)
)
