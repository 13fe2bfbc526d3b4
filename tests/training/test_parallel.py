"""Parallel corpora from files, archives and a server on this machine; BLEU against sacrebleu called directly."""

from __future__ import annotations

import io
import random
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sacrebleu

from minillm.errors import DownloadError, InvalidRequestError, MissingExtraError
from minillm.training.numbers import chinese, english, sample
from minillm.training.parallel import Pair, bleu, read_pairs, split_pairs
from tests.helpers import SHARED

CMN_ENG = SHARED / "text" / "cmn_eng.txt"
PAIRS = [(english(n), chinese(n)) for n in sorted(set(sample(random.Random(0), 50, held_out=False)))]
TEXT = "".join(f"{source}\t{target}\n" for source, target in PAIRS).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


ZIP = zipped({"_about.txt": b"no pairs\n", "num.txt": TEXT})


def written(folder: Path, data: bytes) -> Path:
    path = folder / "pairs.txt"
    path.write_bytes(data)
    return path


# --- files


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    assert read_pairs(path) == PAIRS
    assert read_pairs(str(path)) == PAIRS


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        ("Hi.\t嗨。\tCC-BY 2.0 (France)\nRun.\t跑。\tsomeone\tmore", [("Hi.", "嗨。"), ("Run.", "跑。")]),
        ("\ufeffHi.\t嗨。\n", [("Hi.", "嗨。")]),
        ("Hi.\t嗨。\r\n\r\n  \nRun.\t跑。\r\n", [("Hi.", "嗨。"), ("Run.", "跑。")]),
        ("b\t2\na\t1\nb\t3\nb\t2\tother\na\t1\n", [("b", "2"), ("a", "1"), ("b", "3")]),
        ("one\u2028line\t一\x0b行\n", [("one\u2028line", "一\x0b行")]),
        (" Hi. \t 嗨。 \n", [("Hi.", "嗨。")]),
    ],
    ids=["attribution", "byte order mark", "blank lines, CRLF", "duplicates", "other line separators", "spaces"],
)
def test_forms_of_lines(tmp_path: Path, data: str, pairs: list[Pair]) -> None:
    assert read_pairs(written(tmp_path, data.encode())) == pairs


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n \n", "is empty"),
        (b"a\tb\n\nno tab here\n", r"pairs\.txt, line 3.*no tab here"),
        (b"a\tb\nc\t\tattribution\n", r"line 2"),
        (b"\tb\n", r"line 1"),
        (b"a\tb\nc\t\xff\n", r"line 2: this is not UTF-8"),
        ("a\tb\n".encode("utf-16"), r"line 1: this is not UTF-8"),
        (zipped({"_about.txt": b"x"}), "one .txt of pairs, and holds none"),
        (zipped({}), "holds none"),
        (zipped({"a.txt": TEXT, "b.txt": TEXT}), r"holds a\.txt, b\.txt"),
        (zipped({"num.txt": b"a\tb\nc\n"}), r"pairs\.txt:num\.txt, line 2"),
        (ZIP[:-30], "cannot be unpacked"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        read_pairs(written(tmp_path, data))


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    start = ZIP.index(b"num.txt") + len(b"num.txt")
    for place in range(start, start + 60, 3):
        damaged = ZIP[:place] + bytes([ZIP[place] ^ 0xFF]) + ZIP[place + 1 :]
        with pytest.raises(InvalidRequestError, match="cannot be unpacked"):
            read_pairs(written(tmp_path, damaged))
    encrypted = bytearray(ZIP)
    encrypted[ZIP.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InvalidRequestError, match="cannot be unpacked"):
        read_pairs(written(tmp_path, bytes(encrypted)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            read_pairs(path)


def test_archives(tmp_path: Path) -> None:
    for members in ({"_about.txt": b"x", "num.txt": TEXT}, {"f/num.txt": TEXT, "__MACOSX/f/._num.txt": b"x"}):
        assert read_pairs(written(tmp_path, zipped(members))) == PAIRS


# --- downloads

PAGE = b"\n<!DOCTYPE html><html><body>a\tb</body></html>"
ANSWERS = {
    "/num.txt": (200, "text/plain", TEXT),
    "/num.zip": (200, "application/zip", ZIP),
    "/page": (200, "text/html; charset=utf-8", b"a\tb\n"),
    "/hidden-page.txt": (200, "text/plain", PAGE),
    "/broken": (500, "text/plain", b"a\tb\n"),
    "/bad-line.txt": (200, "text/plain", b"a\tb\nc\n"),
}


class Handler(BaseHTTPRequestHandler):
    """Answers what the table says; refuses urllib's own name, as manythings.org does; cuts /short and /silent."""

    def do_GET(self) -> None:
        if "urllib" in self.headers["User-Agent"].lower():
            self.send_error(406)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/num.txt")
            self.end_headers()
        elif self.path in ("/short", "/silent"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(TEXT)))
            self.end_headers()
            self.wfile.write(TEXT[:100])
            if self.path == "/silent":
                self.server.closing.wait(10)
        elif self.path in ANSWERS:
            status, kind, data = ANSWERS[self.path]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(data)
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("minillm.training.parallel.TIMEOUT_SECONDS", 0.5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.closing = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["/num.txt", "/num.zip", "/moved"])
def test_downloads(url: str, path: str) -> None:
    assert read_pairs(url + path) == PAIRS


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/none", "answered 404 Not Found: check the address"),
        ("/broken", "answered 500"),
        ("/page", "is a web page"),
        ("/hidden-page.txt", "is a web page"),
        ("/short", "cannot be downloaded"),
        ("/silent", "cannot be downloaded .*timed out"),
    ],
)
def test_downloads_that_fail(url: str, path: str, told: str) -> None:
    with pytest.raises(DownloadError, match=told):
        read_pairs(url + path)


def test_a_download_with_a_bad_line(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{url}/bad-line\.txt, line 2"):
        read_pairs(f"{url}/bad-line.txt")


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/x", "http://", "https://[x/y", "http://127.0.0.1:x/", "http://a b"]
)
def test_addresses_that_do_not_answer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        read_pairs(address)


# --- the split


def test_no_source_stands_on_both_sides() -> None:
    pairs = [(english(n), text) for n in sample(random.Random(5), 4000, held_out=False) for text in (chinese(n), "x")]
    train, held_out = split_pairs(pairs)
    assert sorted(train + held_out) == sorted(pairs)
    assert not {source for source, _ in train} & {source for source, _ in held_out}
    kept = set(train)
    assert train == [pair for pair in pairs if pair in kept]
    sources = {source for source, _ in pairs}
    assert len({source for source, _ in held_out}) / len(sources) == pytest.approx(0.02, abs=0.006)


def test_the_split_never_moves() -> None:
    pairs = [(english(n), chinese(n)) for n in range(300)]
    held_out = split_pairs(pairs)[1]
    assert [target for _, target in held_out] == ["一百三十三", "一百六十七"]
    assert split_pairs(pairs[::-2])[1] == [pair for pair in pairs[::-2] if pair in held_out]
    assert set(held_out) < set(split_pairs(pairs, 0.4)[1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_shares_that_are_refused(share: float) -> None:
    with pytest.raises(InvalidRequestError, match="between 0 and 1"):
        split_pairs(PAIRS, share)


def test_tatoeba() -> None:
    if not CMN_ENG.exists():
        pytest.skip("no shared/text/cmn_eng.txt beside the checkout")
    pairs = read_pairs(CMN_ENG)
    assert len(pairs) == 29055
    assert pairs[:2] == [("Hi.", "嗨。"), ("Hi.", "你好。")]
    train, held_out = split_pairs(pairs)
    assert len(train) + len(held_out) == len(pairs)
    assert len(held_out) / len(pairs) == pytest.approx(0.02, abs=0.003)
    assert not {source for source, _ in train} & {source for source, _ in held_out}


# --- BLEU

HYPOTHESES = ["the cat sat on the mat .", "It is raining, isn't it?", "I have two dogs."]
REFERENCES = [
    ["The cat sat on the mat.", "A cat was sitting on the mat."],
    ["It's raining, isn't it?", "It is raining, right?"],
    ["I have two dogs.", "I own two dogs."],
]
CHINESE = ["今天天气很好。", "我有2只dog", "他在学校学习中文"]
CHINESE_REFERENCES = [["今天天气真好。"], ["我有两只狗。"], ["他在学校里学中文。"]]


@pytest.mark.parametrize("tokenize", ["13a", "zh", "char"])
def test_bleu_is_sacrebleus(tokenize: str) -> None:
    columns = [[right[0] for right in REFERENCES], [right[1] for right in REFERENCES]]
    metric = sacrebleu.BLEU(tokenize=tokenize)
    expected = metric.corpus_score(HYPOTHESES, columns)
    score = bleu(HYPOTHESES, REFERENCES, tokenize=tokenize)
    assert score == (expected.score, str(metric.get_signature()))
    assert score.score > 20
    assert f"tok:{tokenize}|" in score.signature
    assert "nrefs:2" in score.signature
    one = sacrebleu.corpus_bleu(CHINESE, [[right[0] for right in CHINESE_REFERENCES]], tokenize=tokenize)
    assert bleu(CHINESE, CHINESE_REFERENCES, tokenize=tokenize).score == one.score


def test_ragged_references() -> None:
    ragged = [REFERENCES[0], REFERENCES[1][:1], [*REFERENCES[2], "I've got two dogs."]]
    columns = [[right[0] for right in ragged], [ragged[0][1], None, ragged[2][1]], [None, None, ragged[2][2]]]
    score = bleu(HYPOTHESES, ragged, tokenize="13a")
    assert score.score == sacrebleu.corpus_bleu(HYPOTHESES, columns).score
    assert "nrefs:var" in score.signature
    # A reference said twice changes nothing: so a ragged table scores like one filled up by repeating.
    filled = [[*right, *[right[0]] * (3 - len(right))] for right in ragged]
    assert (
        score.score == sacrebleu.corpus_bleu(HYPOTHESES, [list(column) for column in zip(*filled, strict=True)]).score
    )


def test_bleu_of_right_and_wrong() -> None:
    targets = [target for _, target in PAIRS]
    assert bleu(targets, [[target] for target in targets], tokenize="zh").score == pytest.approx(100)
    assert bleu(["x"] * len(targets), [["一", target] for target in targets], tokenize="char").score == 0


@pytest.mark.parametrize(
    ("hypotheses", "references", "told"),
    [
        ([], [], "at least one"),
        (["a"], [["a"], ["b"]], "1 hypotheses and 2 lists"),
        (["a", "b"], [["a"], []], r"references\[1\] is \[\]"),
        (["a"], ["a"], r"references\[0\] is 'a'"),
    ],
)
def test_bleu_refuses(hypotheses: list[str], references: list[list[str]], told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        bleu(hypotheses, references, tokenize="13a")


def test_bleu_refuses_other_tokenizers() -> None:
    unchecked = getattr(bleu, "__wrapped__", bleu)  # while tests run, signatures are checked, too
    with pytest.raises(InvalidRequestError, match="one of 13a, zh, char"):
        unchecked(["a"], [["a"]], tokenize="intl")


def test_bleu_without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingExtraError, match=r"BLEU needs .*minillm-engine\[training\]"):
        bleu(["a"], [["a"]], tokenize="13a")
