"""Which tokens of which requests are computed in the next step.

Continuous batching (Yu et al. 2022, "Orca", §3): a request joins and leaves the batch at any step. Chunked prefill
(Agrawal et al. 2024, "Sarathi-Serve", §4): a long prompt is computed in pieces that share their steps with other
requests' next tokens, so that these do not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import Copy
from minillm.checks import check_sizes
from minillm.engine.request import Request, Status
from minillm.errors import ConfigError, InvalidRequestError


@dataclass(frozen=True)
class SchedulerConfig:
    """How much a step may hold.

    Attributes:
        max_num_seqs: requests in one step.
        max_num_batched_tokens: tokens in one step, over all requests.
        max_model_len: tokens of one sequence, prompt and answer.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    def __post_init__(self) -> None:
        check_sizes(self, "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each request needs one token a step"
            )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's share of a step: its tokens start … start + count - 1.

    Attributes:
        num_stored: leading tokens of these whose keys and values are stored already, and which are computed only for
            their logits.
        copies: blocks to copy before these tokens are written.
    """

    request: Request
    start: int
    count: int
    num_stored: int = 0
    copies: list[Copy] = field(default_factory=list)

    @property
    def samples(self) -> bool:
        """Whether these are the last of its tokens, so that a next one can be chosen."""
        return self.start + self.count == self.request.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of prompt tokens in it are asked for."""
        request = self.request
        return request.params.prompt_logprobs is not None and self.start < len(request.prompt_token_ids) - 1


@dataclass
class Schedule:
    """One step.

    Attributes:
        budget: tokens that may still be given out.
        preempted: requests whose memory was taken.
        filled: blocks that this step fills, by content. Requests that join it may share them at once, since a layer
            writes all keys and values of a step before it attends to any.
    """

    budget: int
    scheduled: list[Scheduled] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    filled: dict[bytes, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(part.count for part in self.scheduled)


class Scheduler:
    """Two queues, first come, first served.

    Running requests come before waiting ones, and among them those that need one token (decodes) first. When a running
    request needs a block and none is free, the youngest running request gives its blocks back and waits, in front; what
    it had computed is computed again (Kwon et al. 2023, §4.5, "recomputation"). The oldest is never preempted, and a
    request that could not run alone is refused when it comes, so something always ends.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            InvalidRequestError: it could not be held even if it were alone.
        """
        longest = len(request.prompt_token_ids) + request.max_tokens
        # The last token is given out and never stored.
        blocks = self.pool.blocks_for(longest - 1)
        if blocks > self.pool.num_blocks:
            raise InvalidRequestError(
                f"{len(request.prompt_token_ids)} prompt tokens and max_tokens={request.max_tokens} need {blocks} "
                f"blocks of keys and values, and there are {self.pool.num_blocks}: lower max_tokens, shorten the "
                "prompt, or make the cache larger"
            )
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """The next step; empty only where there is nothing to do."""
        step = Schedule(self.config.max_num_batched_tokens)
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        return step

    def _schedule_running(self, step: Schedule) -> None:
        decodes = [request for request in self.running if request.num_uncomputed_tokens == 1]
        others = [request for request in self.running if request.num_uncomputed_tokens > 1]
        for request in decodes + others:
            if step.budget and request.status is Status.RUNNING:
                count = min(request.num_uncomputed_tokens, step.budget)
                if self._make_room(request, count, step):
                    self._take(request, count, step)

    def _make_room(self, request: Request, count: int, step: Schedule) -> bool:
        """Preempt the youngest until there is room; False where that was `request` itself."""
        while request.table.blocks_for(count) > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest, step)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request, step: Schedule) -> None:
        for part in [part for part in step.scheduled if part.request is request]:
            step.scheduled.remove(part)
            step.budget += part.count
        self.running.remove(request)
        request.table.free()
        request.num_computed_tokens = 0
        request.status = Status.WAITING
        request.metrics.num_preemptions += 1
        self.waiting.appendleft(request)
        step.preempted.append(request)

    def _schedule_waiting(self, step: Schedule) -> None:
        while self.waiting and step.budget and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            found = list(self._found_blocks(request, step))
            stored = len(found) * self.pool.block_size
            start = min(stored, request.num_tokens - 1)  # a prompt that is found whole still needs its last logits
            count = min(request.num_tokens - start, step.budget)
            held_by_none = sum(self.pool.ref_counts[block] == 0 for block in found)
            new = self.pool.blocks_for(max(start + count, stored)) - len(found)
            if new + held_by_none > self.pool.num_free:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.status = Status.RUNNING
            request.table.adopt(found)
            request.num_computed_tokens = start
            if request.num_cached_tokens is None:
                request.num_cached_tokens = start
            self._take(request, count, step, num_stored=stored - start)

    def _found_blocks(self, request: Request, step: Schedule) -> Iterator[int]:
        """The blocks that hold the request's beginning, or will in this step; none where its logits are asked for."""
        if self.pool.enable_prefix_caching and request.params.prompt_logprobs is None:
            for content in request.hashes(request.num_tokens):
                block = self.pool.find(content)
                block = step.filled.get(content) if block is None else block
                if block is None:
                    return
                yield block

    def _take(self, request: Request, count: int, step: Schedule, num_stored: int = 0) -> None:
        copies = request.table.append(count - num_stored)
        part = Scheduled(request, request.num_computed_tokens, count, num_stored, copies)
        step.scheduled.append(part)
        step.budget -= count
        step.filled.update(self._filled_blocks(part))

    def _filled_blocks(self, part: Scheduled) -> Iterator[tuple[bytes, int]]:
        """Content and block of those that are full when this part has been computed."""
        if self.pool.enable_prefix_caching:
            first = part.start // self.pool.block_size
            full = part.request.hashes(part.start + part.count)
            yield from zip(full[first:], part.request.table.blocks[first:], strict=False)

    def take_back(self) -> None:
        """A step was interrupted: what tables say may never have been written. All that ran waits and begins again."""
        for request in reversed(list(self.running)):
            self._preempt(request, Schedule(0))

    def computed(self, step: Schedule) -> None:
        """The step has been computed: its tokens are stored, and full blocks can be found by others."""
        for part in step.scheduled:
            part.request.num_computed_tokens += part.count
            for content, block in self._filled_blocks(part):
                self.pool.remember(block, content)

    def fork(self, parent: Request) -> list[Request]:
        """The siblings that find a seat beside their parent begin with its memory; the others wait for their own.

        Returns:
            Those that run from now on.
        """
        seats = self.config.max_num_seqs - len(self.running)
        forked, rest = parent.siblings[:seats], parent.siblings[seats:]
        for request in forked:
            request.table = parent.table.fork()
            request.num_computed_tokens = parent.num_computed_tokens
            request.num_cached_tokens = parent.num_cached_tokens
            request.status = Status.RUNNING
            self.running.append(request)
        self.waiting.extendleft(reversed(rest))
        parent.siblings = []
        return forked

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its memory back."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING and request in self.waiting:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.table.free()
