"""Numbers in words: against spellings written by hand, and against other algorithms than the module's own."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import InvalidRequestError
from minillm.training.numbers import (
    LIMIT,
    chinese,
    english,
    from_chinese,
    from_english,
    has_inner_zero,
    is_held_out,
    sample,
)

WORDS = ("zero", "one", "twenty-two", "hundred", "and", "thousand", "million", "-")
NUMBERS = st.integers(1, 9).flatmap(lambda digits: st.integers(0, 10**digits - 1))
many = settings(max_examples=200, deadline=None, derandomize=True, database=None)

ENGLISH = {
    0: "zero",
    1: "one",
    7: "seven",
    10: "ten",
    11: "eleven",
    12: "twelve",
    13: "thirteen",
    15: "fifteen",
    18: "eighteen",
    19: "nineteen",
    20: "twenty",
    21: "twenty-one",
    30: "thirty",
    42: "forty-two",
    50: "fifty",
    68: "sixty-eight",
    80: "eighty",
    99: "ninety-nine",
    100: "one hundred",
    101: "one hundred and one",
    105: "one hundred and five",
    110: "one hundred and ten",
    342: "three hundred and forty-two",
    999: "nine hundred and ninety-nine",
    1_000: "one thousand",
    1_001: "one thousand and one",
    1_066: "one thousand and sixty-six",
    1_100: "one thousand one hundred",
    1_101: "one thousand one hundred and one",
    2_024: "two thousand and twenty-four",
    10_000: "ten thousand",
    11_042: "eleven thousand and forty-two",
    12_345: "twelve thousand three hundred and forty-five",
    86_400: "eighty-six thousand four hundred",
    100_000: "one hundred thousand",
    100_001: "one hundred thousand and one",
    105_000: "one hundred and five thousand",
    299_792: "two hundred and ninety-nine thousand seven hundred and ninety-two",
    1_000_000: "one million",
    1_000_100: "one million one hundred",
    1_010_000: "one million ten thousand",
    1_042_017: "one million forty-two thousand and seventeen",
    1_200_000: "one million two hundred thousand",
    3_000_007: "three million and seven",
    20_000_000: "twenty million",
    100_010_000: "one hundred million ten thousand",
    123_456_789: (
        "one hundred and twenty-three million four hundred and fifty-six thousand seven hundred and eighty-nine"
    ),
    900_000_090: "nine hundred million and ninety",
    999_999_999: (
        "nine hundred and ninety-nine million nine hundred and ninety-nine thousand nine hundred and ninety-nine"
    ),
}

CHINESE = {
    0: "零",
    1: "一",
    2: "二",
    9: "九",
    10: "十",
    11: "十一",
    12: "十二",
    19: "十九",
    20: "二十",
    22: "二十二",
    99: "九十九",
    100: "一百",
    101: "一百零一",
    110: "一百一十",
    112: "一百一十二",
    200: "二百",
    1_000: "一千",
    1_001: "一千零一",
    1_010: "一千零一十",
    1_100: "一千一百",
    2_222: "二千二百二十二",
    2_496: "二千四百九十六",
    10_000: "一万",
    10_010: "一万零一十",
    10_500: "一万零五百",
    11_042: "一万一千零四十二",
    100_000: "十万",
    110_000: "十一万",
    150_000: "十五万",
    1_010_000: "一百零一万",
    20_000_000: "二千万",
    200_000_000: "二亿",
    # As schoolbooks read them (grade 4, 大数的认识).
    54_621: "五万四千六百二十一",
    107_070: "十万七千零七十",
    142_950: "十四万二千九百五十",
    230_184: "二十三万零一百八十四",
    1_200_605: "一百二十万零六百零五",
    3_080_000: "三百零八万",
    4_005_900: "四百万五千九百",
    6_407_000: "六百四十万七千",
    7_035_000: "七百零三万五千",
    10_030_040: "一千零三万零四十",
    20_400_700: "二千零四十万零七百",
    24_960_000: "二千四百九十六万",
    40_080_501: "四千零八万零五百零一",
    40_500_000: "四千零五十万",
    240_000_000: "二亿四千万",
    300_700_400: "三亿零七十万零四百",
    384_080_000: "三亿八千四百零八万",
    456_146_658: "四亿五千六百一十四万六千六百五十八",
    506_200_000: "五亿零六百二十万",
    706_498_900: "七亿零六百四十九万八千九百",
    # A whole group of zeros, the ends of groups, 一十 after something.
    201_000: "二十万一千",
    100_000_001: "一亿零一",
    100_001_000: "一亿零一千",
    100_005_000: "一亿零五千",
    100_010_000: "一亿零一万",
    100_100_000: "一亿零一十万",
    110_000_000: "一亿一千万",
    101_001_010: "一亿零一百万一千零一十",
    999_999_999: "九亿九千九百九十九万九千九百九十九",
}


def english_by_digits(n: int) -> str:
    """Every digit of 123,456,789 spelled at its place, zeros included; then what nobody says is struck out."""
    ones = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    tens = ["", "onety", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    teens = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]
    groups = []
    for hundred, ten, one in re.findall("(.)(.)(.)", f"{n:09}"):
        groups.append(f"{ones[int(hundred)]} hundred and {tens[int(ten)]}-{ones[int(one)]}")
    text = "{} million {} thousand {}".format(*groups)
    for one, teen in enumerate([*teens, "nineteen"]):
        text = text.replace(f"onety-{ones[one]}", teen)
    text = re.sub(r"ty-zero", "ty", text)
    text = re.sub(r"(?<= )-", "", text)
    text = re.sub(r"(hundred) and zero", r"\1", text)  # one hundred and zero thousand
    text = re.sub(r"zero hundred and ", "& ", text)  # fewer than a hundred
    text = re.sub(r"zero hundred", "", text)
    text = re.sub(r"^\W*million|(?<=million)\W*thousand|^\W*thousand", "", text)
    text = re.sub(r"^\W+", "", text)
    text = re.sub(r"& (?=[\w-]+ (thousand|million))", "", text)  # "and" only before the last group
    return " ".join(text.replace("&", "and").split()) or "zero"


def chinese_by_digits(n: int) -> str:
    """Every digit with its unit, zeros as 零; then zeros are struck out: at the ends of groups, and doubled ones."""
    text = ""
    for group, name in zip(re.findall("....", f"{n:012}"), "亿万个", strict=True):
        digits = [d + u if d != "零" else d for d, u in zip(_digits(group), "千百十个", strict=True)]
        spelled = re.sub("零+$", "", "".join(digits))
        text += spelled + name if spelled else "零"
    text = re.sub("零+", "零", text.replace("个", ""))
    return re.sub("^一十", "十", text.strip("零")) or "零"


def _digits(group: str) -> str:
    return group.translate(str.maketrans("0123456789", "零一二三四五六七八九"))


@pytest.mark.parametrize("n", ENGLISH)
def test_english_as_written_by_hand(n: int) -> None:
    assert english(n) == ENGLISH[n]
    assert from_english(ENGLISH[n]) == n


@pytest.mark.parametrize("n", CHINESE)
def test_chinese_as_written_by_hand(n: int) -> None:
    assert chinese(n) == CHINESE[n]
    assert from_chinese(CHINESE[n]) == n


def test_another_algorithm_spells_the_same() -> None:
    rng = random.Random(0)
    with_zeros = [int("".join(rng.choice("0001259") for _ in range(9))) for _ in range(3000)]
    for n in [*range(2000), *with_zeros, *sample(rng, 3000, held_out=False)]:
        assert english(n) == english_by_digits(n)
        assert chinese(n) == chinese_by_digits(n)


@many
@given(NUMBERS)
def test_what_is_spelled_is_read_back(n: int) -> None:
    assert from_english(english(n)) == n
    assert from_chinese(chinese(n)) == n


@many
@given(NUMBERS)
def test_chinese_zeros(n: int) -> None:
    text = chinese(n)
    assert not re.search("零零|零[万亿千百十]|.零$|^零.|两|^一十", text)
    assert has_inner_zero(n) == ("零" in text and n > 0)


@many
@given(st.lists(st.sampled_from([*"零一二十百千万亿"]), max_size=12).map("".join))
def test_any_chinese_is_canonical_or_refused(text: str) -> None:
    try:
        assert chinese(from_chinese(text)) == text
    except InvalidRequestError:
        assert text not in CHINESE.values()


@many
@given(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join))
def test_any_english_is_canonical_or_refused(text: str) -> None:
    try:
        assert english(from_english(text)) == text
    except InvalidRequestError:
        assert text not in ENGLISH.values()


OTHER_ENGLISH = (
    *(
        "",
        " ",
        "Forty-two",
        "forty two",
        "one hundred five",
        "a hundred",
        "eleven hundred",
        "and seven",
        "seven ",
        "12",
    ),
    *("one billion", "one thousand thousand", "one thousand, two hundred", "one million and one hundred", "zero one"),
    *("one thousand million", "one million thousand", "forty-two-", "hundred", "two  hundred"),
)
OTHER_CHINESE = (
    *(
        "",
        " ",
        "一十",
        "一百十",
        "一百零十",
        "两百",
        "二〇",
        "零一",
        "一万五百",
        "一万零五千",
        "六百四十万零七千",
        "12",
    ),
    *("十亿", "万", "一亿零零一", "一万零", "一亿五千", "百", "一万亿", "十二万 ", "一百一", "一一", "二百三百"),
)


@pytest.mark.parametrize("text", OTHER_ENGLISH)
def test_other_english_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="english"):
        from_english(text)


@pytest.mark.parametrize("text", OTHER_CHINESE)
def test_other_chinese_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="chinese"):
        from_chinese(text)


def test_what_goes_on_and_on_is_refused_in_few_words() -> None:
    for read, word in (
        (from_chinese, "十"),
        (from_chinese, "九亿"),
        (from_english, "one hundred "),
        (from_english, "x"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            read(word * 100_000)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("n", [-1, LIMIT, 10**12])
def test_numbers_outside_the_range_are_refused(n: int) -> None:
    for spell in (english, chinese):
        with pytest.raises(InvalidRequestError, match=r"0 to 999999999"):
            spell(n)


def test_inner_zero() -> None:
    assert [n for n in (0, 10, 100, 101, 110, 1001, 6_407_000, 100_005_000) if has_inner_zero(n)] == [
        101,
        1001,
        100_005_000,
    ]


def test_split_is_a_tenth_and_never_moves() -> None:
    assert [n for n in range(60) if is_held_out(n)] == [2, 12, 13, 17, 28, 44, 51, 56]
    rng = random.Random(1)
    share = sum(is_held_out(rng.randrange(LIMIT)) for _ in range(50_000)) / 50_000
    assert 0.09 < share < 0.11


def test_both_sides_have_numbers_of_every_length() -> None:
    for digits in range(1, 10):
        sides = {is_held_out(n) for n in range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)[:1000]}
        assert sides == {True, False}


def test_samples_are_of_their_side() -> None:
    train = sample(random.Random(2), 3000, held_out=False)
    held_out = sample(random.Random(2), 3000, held_out=True)
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    assert not set(train) & set(held_out)
    assert train == sample(random.Random(2), 3000, held_out=False)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("max_digits", [1, 4, 9])
def test_every_length_comes_equally_often(held_out: bool, max_digits: int) -> None:
    numbers = sample(random.Random(3), 9000, held_out=held_out, max_digits=max_digits)
    counts = Counter(len(str(n)) for n in numbers)
    expected = 9000 / max_digits
    assert set(counts) == set(range(1, max_digits + 1))
    # The 0.999 quantile of chi-square with 8 degrees of freedom.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26.1


def test_within_a_length_every_number_comes_equally_often() -> None:
    counts = Counter(sample(random.Random(4), 7000, held_out=False, max_digits=1))
    assert set(counts) == {n for n in range(10) if not is_held_out(n)}
    expected = 7000 / len(counts)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26.1


@pytest.mark.parametrize(("count", "max_digits", "told"), [(-1, 9, "count"), (1, 0, "max_digits"), (1, 10, "1 to 9")])
def test_samples_that_cannot_be_are_refused(count: int, max_digits: int, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        sample(random.Random(0), count, held_out=False, max_digits=max_digits)
    assert sample(random.Random(0), 0, held_out=False) == []
