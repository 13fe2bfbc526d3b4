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

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minillm.kernels.cpu.compiler import HAS_512_BITS
from minillm.kernels.cpu.vectors import CACHE_LINE, INDEX, LANES, NUMBER, WORD, Builder

ROWS, KEYS = 6, 64
"""Rows of A, and keys of a tile."""
WIDE, NARROW = 64 if HAS_512_BITS else 16, 16
"""Columns whose sums are carried together; those that are left are done 16 at a time."""
HAS_PAIRS = bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))
"""Whether pairs of bfloat16 can be multiplied."""
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


class TileBuilder(Builder):
    """`Builder` with what tiles need."""

    def spread_word(self, address: Any, lanes: int) -> Any:
        """The word there, in all lanes."""
        value = self.ir.load(self.ir.inttoptr(address, WORD.as_pointer()))
        nothing = ir.Constant(ir.VectorType(WORD, lanes), ir.Undefined)
        return self.shuffle(self.ir.insert_element(nothing, value, WORD(0)), nothing, [0] * lanes)

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

    def narrow(self, numbers: Any) -> Any:
        """float32 → bfloat16."""
        return self.ir.fptrunc(numbers, ir.VectorType(_BFloat(), numbers.type.count))

    def larger(self, a: Any, b: Any) -> Any:
        """Elementwise."""
        return self.ir.select(self.ir.fcmp_ordered(">", a, b), a, b)

    def largest(self, numbers: Any) -> Any:
        """The largest of a vector, in all lanes."""
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
        """2ˣ for x ≤ 0: `minillm.kernels.cpu.fast_math.exp2`."""
        lanes = x.type.count
        x = self.larger(x, self.constant(-126.0, lanes))
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


products_wide, products_narrow = (_make_products(columns, adds=False) for columns in (WIDE, NARROW))
add_products_wide, add_products_narrow = (_make_products(columns, adds=True) for columns in (WIDE, NARROW))


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
        nothing = ir.Constant(t.vector(LANES), ir.Undefined)
        factor = t.shuffle(builder.insert_element(nothing, args[2], WORD(0)), nothing, [0] * LANES)
        parts = range(0, KEYS, LANES)
        powers = [builder.fmul(factor, t.load(t.plus(source, part, 4), LANES)) for part in parts]
        best = powers[0]
        for power in powers[1:]:
            best = t.larger(best, power)
        before = t.spread(t.number(high, args[3]), LANES)
        best = t.larger(t.largest(best), before)
        numerators = [t.exp2(builder.fsub(power, best)) for power in powers]
        added = numerators[0]
        for numerator in numerators[1:]:
            added = builder.fadd(added, numerator)
        shrunk = t.exp2(builder.fsub(before, best))
        after = t.multiply_add(t.spread(t.number(sums, args[3]), LANES), shrunk, t.sum(added))
        for array, place, value in ((high, args[3], best), (sums, args[3], after), (less, args[1], shrunk)):
            first = builder.extract_element(value, WORD(0))
            builder.store(first, builder.inttoptr(t.number(array, place), NUMBER.as_pointer()))
        are_numbers = signature.args[7].dtype == types.float32
        for part, numerator in zip(parts, numerators, strict=True):
            if are_numbers:
                t.store(numerator, t.plus(target, part, 4))
            else:
                t.store(t.narrow(numerator), t.plus(target, part, 2))
        return context.get_dummy_value()

    kinds = (scores, types.intp, types.float32, types.intp, largest, total, shrink, weights)
    return types.void(*kinds), generate
