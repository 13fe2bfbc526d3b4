"""A real parallel corpus as Tatoeba and manythings.org publish it, its split, and BLEU."""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from minillm.errors import DownloadError, InvalidRequestError, MissingExtraError
from minillm.text import some
from minillm.training.split import hash_fraction

TIMEOUT_SECONDS = 30.0
"""How long a server may stay silent."""

Pair = tuple[str, str]
"""A sentence and its translation."""

Tokenize = Literal["13a", "zh", "char"]
"""How BLEU cuts sentences into words: for European languages, for Chinese, into characters."""


class BleuScore(NamedTuple):
    """BLEU, 0 to 100, and sacrebleu's signature: what must be equal for two scores to be comparable."""

    score: float
    signature: str


# --- pairs


def read_pairs(path_or_url: str | Path) -> list[Pair]:
    """Sentence pairs of a tab-separated UTF-8 file: the first two columns, each different pair once, in order.

    The format is that of https://www.manythings.org/anki/ (sentences of https://tatoeba.org, CC-BY 2.0 FR): source,
    translation and, in a third column that is not read, attribution. Blank lines are skipped.

    Args:
        path_or_url: the text file, or a .zip with one such .txt in it (``_about.txt`` aside), or where to download
            either from: http:// or https://, read into memory and not kept.

    Raises:
        InvalidRequestError: the file cannot be read, is empty, or holds something else; the message names the line.
        DownloadError: the address does not answer, refuses, or answers with a web page.
    """
    name = str(path_or_url)
    is_url = name.lower().startswith(("http://", "https://"))
    data = _download(name) if is_url else _read(Path(path_or_url).expanduser())
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        data, name = _unzip(data, name)
    return _parse(data, name)


def split_pairs(pairs: Sequence[Pair], held_out_share: float = 0.02) -> tuple[list[Pair], list[Pair]]:
    """`pairs` to train on and pairs held out, each in order, with no source sentence on both sides.

    A hash of the source decides, so the split is the same on every machine and does not change when pairs are added.

    Raises:
        InvalidRequestError: `held_out_share` is not between 0 and 1.
    """
    if not 0 < held_out_share < 1:
        raise InvalidRequestError(f"held_out_share is {held_out_share}: it must be between 0 and 1")
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        (held_out if hash_fraction(pair[0]) < held_out_share else train).append(pair)
    return train, held_out


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error


def _download(url: str) -> bytes:
    try:
        # Named, because manythings.org refuses urllib's own name.
        request = urllib.request.Request(url, headers={"User-Agent": "minillm"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            data: bytes = answer.read()
            kind = answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} answered {error.code} {error.reason}: check the address") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address that is none
        raise DownloadError(f"{url} cannot be downloaded ({error}): check the address and the connection") from error
    if kind == "text/html" or data.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise DownloadError(f"{url} is a web page: give the address of the .txt or .zip file itself")
    return data


def _unzip(data: bytes, name: str) -> tuple[bytes, str]:
    """The one text in an archive, and its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            texts = [member for member in archive.namelist() if _is_corpus(member)]
            if len(texts) != 1:
                raise InvalidRequestError(f"{name} must hold one .txt of pairs, and holds {some(texts) or 'none'}")
            return archive.read(texts[0]), f"{name}:{texts[0]}"
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise InvalidRequestError(f"{name} cannot be unpacked: {error}") from error


def _is_corpus(member: str) -> bool:
    file = member.rpartition("/")[2]
    return file.endswith(".txt") and not file.startswith(("_", "."))  # ._*.txt: what macOS adds


def _parse(data: bytes, name: str) -> list[Pair]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequestError(f"{name}, line {line_number}: this is not UTF-8; convert the file") from error
    # Not splitlines, which also cuts at characters that may stand inside a sentence.
    lines = enumerate(text.split("\n"), 1)
    pairs = [_pair(line, f"{name}, line {number}") for number, line in lines if line.strip()]
    if not pairs:
        raise InvalidRequestError(f"{name} is empty: it must hold lines of two sentences with a tab between them")
    return list(dict.fromkeys(pairs))


def _pair(line: str, where: str) -> Pair:
    source, _, rest = line.partition("\t")
    target = rest.partition("\t")[0]
    if not source.strip() or not target.strip():
        raise InvalidRequestError(f"{where}: a line must be two sentences with a tab between them, not {line[:80]!r}")
    return source.strip(), target.strip()


# --- BLEU


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize) -> BleuScore:
    """Corpus BLEU by sacrebleu, with several references a hypothesis, as many for each as there are.

    Papineni et al. 2002 (https://aclanthology.org/P02-1040), made comparable by Post 2018
    (https://aclanthology.org/W18-6319).

    Args:
        hypotheses: translations to judge.
        references: for each of them, one or more right ones.
        tokenize: by the target language: "13a" for European ones, "zh" for Chinese, "char" for single characters.

    Raises:
        InvalidRequestError: nothing to judge, a hypothesis without references, or an unknown `tokenize`.
        MissingExtraError: sacrebleu is not installed.
    """
    _check_references(hypotheses, references)
    if tokenize not in get_args(Tokenize):
        raise InvalidRequestError(f"tokenize is {tokenize!r}: it must be one of {', '.join(get_args(Tokenize))}")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise MissingExtraError("BLEU", "training") from error
    metric = BLEU(tokenize=tokenize)
    # sacrebleu wants the first references of all, then the second ones, …, and None where there is none.
    result = metric.corpus_score(list(hypotheses), list(zip_longest(*references)))
    return BleuScore(result.score, str(metric.get_signature()))


def _check_references(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not hypotheses:
        raise InvalidRequestError("BLEU needs at least one hypothesis")
    if len(hypotheses) != len(references):
        raise InvalidRequestError(
            f"{len(hypotheses)} hypotheses and {len(references)} lists of references: give one list for each hypothesis"
        )
    for index, right in enumerate(references):
        if isinstance(right, str) or not right:
            raise InvalidRequestError(f"references[{index}] is {right!r}: give a list of one or more sentences")
