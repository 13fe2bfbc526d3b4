"""The engine in a thread of its own, and coroutines that wait for its outputs.

Between two steps the thread obeys what has been asked of it (add this request, stop that one); after a step it hands
the outputs to the event loop. Whatever concerns streams happens in the event loop, whatever concerns the engine in the
thread, so that neither needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from llguidance import LLMatcher

from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestOutput
from minillm.engine.params import SamplingParams
from minillm.errors import EngineDeadError, MinillmError, OverloadedError, ShuttingDownError

CHECK_SECONDS = 1.0
"""How often an engine that has nothing to do is asked whether it still could."""

Result = TypeVar("Result")
Listener = Callable[[list[RequestOutput], float], None]
"""Told of a step's outputs, and of what an aborted request had, with the time; in the engine's thread."""


class RequestStream:
    """The outputs of one request, as they come; the last one is `finished`.

    Raises:
        MinillmError: while it is iterated over, when the request will not be answered.
    """

    def __init__(self, engine: EngineThread, request_id: str, num_answers: int) -> None:
        self.request_id = request_id
        self.num_answers = num_answers
        self._engine = engine
        self._outputs: asyncio.Queue[RequestOutput | MinillmError] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        if isinstance(output, MinillmError):
            self._ended = True
            raise output
        self._ended = output.finished
        return output

    def put(self, output: RequestOutput | MinillmError) -> None:
        self._outputs.put_nowait(output)

    def abort(self) -> None:
        """Stop the request before the next step, unless it has ended. Whoever stops listening must call it."""
        if not self._ended:
            self._ended = True
            self._engine.abort(self.request_id)


class EngineThread:
    """Drives an engine from a coroutine's point of view.

    Args:
        max_requests: answers that are waited for at a time.
        listener: told of every step's outputs.
    """

    def __init__(self, engine: Engine, *, max_requests: int, listener: Listener | None = None) -> None:
        self.max_requests = max_requests
        self.error: BaseException | None = None
        self._engine = engine
        self._listener = listener
        self._streams: dict[str, RequestStream] = {}
        self._asked: set[asyncio.Future[Any]] = set()
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # --- in the event loop

    def start(self) -> None:
        """Begin; to be called in the event loop that will wait for outputs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Answers that are waited for."""
        return sum(stream.num_answers for stream in self._streams.values())

    def check_alive(self) -> None:
        """Raise EngineDeadError where the engine has failed."""
        if self.error is not None:
            raise EngineDeadError(f"the engine has failed: {self.error}")

    def check_room(self, num_answers: int = 0) -> None:
        """Raise OverloadedError where so many more answers are too many."""
        waiting = self.num_unfinished
        if waiting + num_answers > self.max_requests:
            raise OverloadedError(f"{waiting} answers are being waited for already: try again later")

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        matcher: LLMatcher | None = None,
    ) -> RequestStream:
        """Hand a request to the engine and return its outputs-to-be, once the engine has taken it.

        Args:
            matcher: of its `structured_outputs`, compiled: the engine's thread has no time for that.

        Raises:
            InvalidRequestError: what cannot be generated.
            OverloadedError: there are too many requests.
            EngineDeadError: the engine has failed.
        """
        self.check_room(params.n)
        stream = self._streams[request_id] = RequestStream(self, request_id, params.n)
        arrival = self._engine.clock()
        try:
            await self.ask(
                lambda engine: engine.add_request(
                    request_id, prompt_token_ids, params, prompt=prompt, arrival_time=arrival, matcher=matcher
                )
            )
        except asyncio.CancelledError:
            stream.abort()
            raise
        except Exception:
            self._streams.pop(request_id, None)
            raise
        return stream

    async def ask(self, work: Callable[[Engine], Result]) -> Result:
        """What a function of the engine returns or raises; it runs in the engine's thread, between two steps.

        Raises:
            EngineDeadError: the engine has failed.
        """
        self.check_alive()
        asked: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)

        def answer() -> None:
            try:
                result = work(self._engine)
            except Exception as error:  # the work's own; the engine is as it was
                self._in_loop(_fail, asked, error)
            else:
                self._in_loop(_settle, asked, result)

        self._inbox.put(answer)
        return await asked

    def abort(self, request_id: str) -> None:
        """Stop a request before the next step; its stream gives nothing more."""
        if self._streams.pop(request_id, None) is not None:
            self._inbox.put(partial(self._abort, request_id))

    def abort_all(self, reason: str) -> None:
        """Stop everything; whoever waits is told the reason."""
        for request_id, stream in list(self._streams.items()):
            self.abort(request_id)
            stream.put(ShuttingDownError(reason))

    async def close(self) -> None:
        """Stop the thread after its step; whoever still waits is told so."""
        self.abort_all("the server has stopped")
        await asyncio.to_thread(self.join)

    def join(self) -> None:
        """Stop the thread after its step, and wait for that."""
        if self._thread.is_alive():
            self._inbox.put(self._stop)
            self._thread.join()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # else it has been aborted
                stream.put(output)
                if output.finished:
                    del self._streams[output.request_id]

    def _die(self, error: BaseException) -> None:
        """Tell everybody; nothing more will come."""
        self.error = error
        dead = EngineDeadError(f"the engine has failed: {error}")
        for asked in self._asked:
            _fail(asked, dead)
        for stream in self._streams.values():
            stream.put(dead)
        self._streams.clear()

    # --- in the thread

    def _work(self) -> None:
        try:
            while not self._stopped:
                self._obey(wait=not self._engine.has_unfinished_requests)
                outputs = self._engine.step()
                if outputs:
                    self._in_loop(self._deliver, outputs)
                    self._tell(outputs)
        except BaseException as error:
            self._in_loop(self._die, error)
            raise

    def _obey(self, *, wait: bool) -> None:
        """Do what has been asked; with `wait`, until something is."""
        while wait:
            try:
                self._inbox.get(timeout=CHECK_SECONDS)()
                wait = False
            except queue.Empty:
                self._engine.check()
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _abort(self, request_id: str) -> None:
        output = self._engine.abort(request_id)
        if output is not None:
            self._tell([output])

    def _tell(self, outputs: list[RequestOutput]) -> None:
        if self._listener is not None:
            self._listener(outputs, self._engine.clock())

    def _stop(self) -> None:
        self._stopped = True

    def _in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[Result], result: Result) -> None:
    """Resolve a future that may have been cancelled, or resolved, meanwhile."""
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """The same, with an error."""
    if not future.done():
        future.set_exception(error)
