"""A translation task that needs no download: numbers in words, English to Chinese, from 0 to 10⁹ − 1.

"eleven thousand and forty-two" becomes "一万一千零四十二". Small as it is, this is translation: English groups digits
by three and Chinese by four, so words do not map one to one; a zero between digits is silent in English, spoken in
Chinese. Every number has exactly one spelling in each language, so an answer is right or wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.errors import InvalidRequestError
from minillm.training.split import hash_fraction

MAX_DIGITS = 9
LIMIT = 10**MAX_DIGITS
"""The first number that is too large."""

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_CHINESE_DIGITS = "零一二三四五六七八九"
_CHINESE_UNITS = {10**8: "亿", 10**4: "万", 1000: "千", 100: "百", 10: "十"}


@dataclass(frozen=True)
class _Words:
    """What the words of a language stand for, by what they do."""

    digits: dict[str, int]
    """Added to what follows the last unit."""
    units: dict[str, int]
    """Multiply the digits before them, inside a group; alone, they stand for themselves (十)."""
    scales: dict[str, int]
    """Multiply the whole group before them, and close it."""


_ENGLISH = _Words(
    digits={word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)} | {"and": 0},
    units={"hundred": 100},
    scales={"thousand": 1000, "million": 10**6},
)
_CHINESE = _Words(
    digits={word: n for n, word in enumerate(_CHINESE_DIGITS)},
    units={word: unit for unit, word in _CHINESE_UNITS.items() if unit < 10**4},
    scales={word: unit for unit, word in _CHINESE_UNITS.items() if unit >= 10**4},
)


def english(n: int) -> str:
    """A number in British English, without commas: "one million two hundred thousand", "three million and seven".

    "and" stands after each "hundred" that is not alone in its group, and before a last group below one hundred, as in
    the rules "spellout-cardinal-verbose" of Unicode's CLDR for English, which set commas besides.

    Raises:
        InvalidRequestError: the number is negative, or 10⁹ or more.
    """
    _check_range(n)
    words = []
    rest = n
    for name, scale in (("million", 10**6), ("thousand", 1000)):
        if rest >= scale:
            words += [_english_group(rest // scale), name]
        rest %= scale
    if rest and rest < 100 and words:
        words.append("and")
    if rest or not words:
        words.append(_english_group(rest))
    return " ".join(words)


def chinese(n: int) -> str:
    """A number in Chinese as schoolbooks read it: 100010000 is 一亿零一万, 6407000 is 六百四十万七千.

    The rules (People's Education Press, mathematics, grade 4, volume 1, 大数的认识):

    - Digits are grouped by four from the right; a group is read like a number below 10000, and 万 or 亿 follows it.
    - Zeros at the end of a group are silent (每级末尾的 0 都不读), whatever follows; any other run of zeros, however
      long, is read as one 零, and so is a whole group of zeros between others: 一亿零五千.

    Both together say: 零 stands where a number continues, but not in the place right below the unit just read.
    Where usage varies, one spelling is chosen: 2 is always 二, never 两; 10 to 19 drop their 一 at the very beginning
    (十二万) and keep it inside (一百一十二, 一亿零一十二万).

    Raises:
        InvalidRequestError: the number is negative, or 10⁹ or more.
    """
    _check_range(n)
    text = _chinese_inside(n)
    return text.removeprefix("一") if text.startswith("一十") else text


def from_english(text: str) -> int:
    """The number that `english` spells so.

    Raises:
        InvalidRequestError: `english` spells no number so.
    """
    n = _value(text.replace("-", " ").split(" "), _ENGLISH)
    if n is None or n >= LIMIT or english(n) != text:
        raise InvalidRequestError(f"{text[:80]!r} is not how english() spells a number below 10⁹")
    return n


def from_chinese(text: str) -> int:
    """The number that `chinese` spells so.

    Raises:
        InvalidRequestError: `chinese` spells no number so.
    """
    n = _value(text, _CHINESE)
    if n is None or n >= LIMIT or chinese(n) != text:
        raise InvalidRequestError(f"{text[:80]!r} is not how chinese() spells a number below 10⁹")
    return n


def has_inner_zero(n: int) -> bool:
    """Whether a number's Chinese has a 零 between other digits: the hard part of the task.

    Raises:
        InvalidRequestError: the number is negative, or 10⁹ or more.
    """
    return n != 0 and "零" in chinese(n)


HELD_OUT_SHARE = 0.1


def is_held_out(n: int) -> bool:
    """Whether a number belongs to the tenth that training never sees: by a hash, so on every machine the same."""
    return hash_fraction(str(n)) < HELD_OUT_SHARE


def sample(rng: random.Random, count: int, *, held_out: bool, max_digits: int = MAX_DIGITS) -> list[int]:
    """Random numbers of one side of the split: every count of digits equally often, then every number of that length.

    Args:
        rng: the source of randomness; the same state gives the same numbers.
        count: how many; a number may come twice.
        held_out: whether from the held-out tenth, or from the rest.
        max_digits: digits of the longest numbers, 1 to 9.

    Raises:
        InvalidRequestError: `count` is negative, or `max_digits` is not within 1 to 9.
    """
    if count < 0:
        raise InvalidRequestError(f"count is {count}: it must be 0 or more")
    if not 1 <= max_digits <= MAX_DIGITS:
        raise InvalidRequestError(f"max_digits is {max_digits}: it must be 1 to {MAX_DIGITS}")
    return [_draw(rng, rng.randint(1, max_digits), held_out) for _ in range(count)]


def _draw(rng: random.Random, digits: int, held_out: bool) -> int:
    smallest = 0 if digits == 1 else 10 ** (digits - 1)
    while True:
        n = rng.randrange(smallest, 10**digits)
        if is_held_out(n) == held_out:
            return n


def _check_range(n: int) -> None:
    if not 0 <= n < LIMIT:
        raise InvalidRequestError(f"{n} cannot be spelled: numbers go from 0 to {LIMIT - 1}")


def _english_group(n: int) -> str:
    """A number below 1000."""
    if n >= 100:
        rest = f" and {_english_group(n % 100)}" if n % 100 else ""
        return f"{_ONES[n // 100]} hundred{rest}"
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def _chinese_inside(n: int) -> str:
    """A number as it is read after something else: with the 一 of 一十."""
    for unit, name in _CHINESE_UNITS.items():
        if n >= unit:
            head, rest = divmod(n, unit)
            zero = "零" if 0 < rest < unit // 10 else ""
            return _chinese_inside(head) + name + zero + (_chinese_inside(rest) if rest else "")
    return _CHINESE_DIGITS[n]


def _value(spelled: Sequence[str], words: _Words) -> int | None:
    """What a canonical spelling stands for; anything for others, and None where a word is unknown."""
    total = group = digits = 0
    for word in spelled:
        if word in words.digits:
            digits += words.digits[word]
        elif word in words.units:
            group, digits = group + max(digits, 1) * words.units[word], 0
        elif word in words.scales:
            total, group, digits = total + (group + digits) * words.scales[word], 0, 0
        else:
            return None
    return total + group + digits
