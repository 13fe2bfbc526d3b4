"""Chat templates that clients send, each rendered in a process of its own.

Jinja's sandbox, as transformers sets it up, keeps a template from files, modules and Python's internals. It does not
bound how long a template runs or how much it writes: a process can be given little memory, and ended when its time is
over. Memory is bounded on Linux only. What clients may still do is keep `MAX_PROCESSES` cores busy.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from minillm.errors import InvalidRequestError, MinillmError, OverloadedError, TokenizerError
from minillm.models.chat_template import chat_text

TEMPLATE_SECONDS = 5
TEMPLATE_BYTES = 2**30
"""Address space of the process, Python's own included."""
MAX_TEXT_BYTES = 2**25
MAX_ERROR_LETTERS = 1000
MAX_PROCESSES = 4

_seats = threading.BoundedSemaphore(MAX_PROCESSES)


def chat_text_apart(conversation: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """As `chat_text`, in another process, by a template among the options.

    Args:
        options: plain data; the tokenizer's special tokens are among them.

    Raises:
        InvalidRequestError: data that is nested too deeply to be sent.
        TokenizerError: the template refuses the conversation, or takes too much time or memory.
        OverloadedError: too many templates are being rendered.
    """
    if not _seats.acquire(blocking=False):  # the threads that would wait are those that all requests need
        raise OverloadedError(f"{MAX_PROCESSES} templates of clients are being rendered already: try again later")
    try:
        is_text, text = json.loads(_answer(conversation, options))
    finally:
        _seats.release()
    if not is_text:
        raise TokenizerError(text)
    return cast(str, text)


def _answer(conversation: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> bytes:
    """What the process says: JSON, for whoever broke out of the sandbox could pickle anything."""
    reader, writer = _processes().Pipe(duplex=False)
    process = _processes().Process(target=_render, args=(writer, conversation, options), daemon=True)
    with reader:
        with writer:
            try:
                process.start()
            except RecursionError as error:  # from pickle
                raise InvalidRequestError("the request is nested too deeply") from error
        try:
            if not reader.poll(TEMPLATE_SECONDS):
                raise TimeoutError
            return reader.recv_bytes(MAX_TEXT_BYTES)
        except (EOFError, OSError) as error:
            raise TokenizerError(
                f"the chat template was stopped: it has {TEMPLATE_SECONDS} s, and {TEMPLATE_BYTES >> 20} MiB of memory "
                f"for at most {MAX_TEXT_BYTES >> 20} MiB of text"
            ) from error
        finally:
            process.kill()
            process.join()


@cache
def _processes() -> ForkServerContext | SpawnContext:
    """Where there is one, a server that has imported all and forks: milliseconds instead of a second."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _render(writer: Connection, conversation: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """The process: writes whether it went well, and the text or what was wrong."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (TEMPLATE_BYTES, TEMPLATE_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))  # should nobody be left to end it
    try:
        said = True, chat_text(PreTrainedTokenizerBase(), conversation, **options)
    except MinillmError as error:
        said = False, str(error)[:MAX_ERROR_LETTERS]
    try:
        writer.send_bytes(json.dumps(said).encode())
    except (MemoryError, BrokenPipeError):
        return  # the reader is told by the end of the pipe
