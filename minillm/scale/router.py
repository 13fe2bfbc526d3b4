"""Which replica answers a request: the one that has computed its prompt's beginning, unless it has much more to do.

Ray Serve LLM has such a router (`ray.serve.llm.request_router`), which cannot be imported without vLLM or SGLang. This
one is made from the same public parts, `ray.serve.request_router`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

PIECE = 64
"""Characters by which prompts are compared; about a block of keys and values."""
MOST_BEGINNINGS = 2**17
"""That are remembered; the least recently used are forgotten first, as in a replica's memory."""
SLACK = 16
"""A replica may have so many more requests than the idlest before its prompts are sent elsewhere."""


def beginnings(prompt: str) -> list[int]:
    """A number for each beginning of whole pieces, the shortest first: equal where the beginnings are."""
    found, parent = [], 0
    for start in range(0, len(prompt) - PIECE + 1, PIECE):
        parent = hash((parent, prompt[start : start + PIECE]))
        found.append(parent)
    return found


class PrefixRouter(RequestRouter):
    """Remembers where beginnings were sent. A request is a `Forwarded`, the only positional argument.

    One that begins like none before goes to the idler of two that are drawn.
    """

    def initialize_state(self) -> None:
        """Called by Ray once."""
        self._homes: OrderedDict[int, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, to be tried one after the other; of a group, Ray takes the idlest that has room."""
        drawn = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [drawn]
        pending_request.routing_context.should_backoff = True  # else Ray asks again at once where all are full
        home = self._home(beginnings(pending_request.args[0].prompt), candidate_replicas)
        return [drawn] if home is None else [[home], drawn]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remember where its beginnings are now."""
        for number in beginnings(pending_request.args[0].prompt):
            self._homes[number] = replica_id
            self._homes.move_to_end(number)
        while len(self._homes) > MOST_BEGINNINGS:
            self._homes.popitem(last=False)

    def _home(self, numbers: Sequence[int], replicas: Sequence[RunningReplica]) -> RunningReplica | None:
        """The replica that has the longest of these beginnings and is not too busy."""
        there = {replica.replica_id: replica for replica in replicas}
        idlest = min(map(self._length, there), default=0)
        for number in reversed(numbers):
            replica_id = self._homes.get(number)
            if replica_id in there and self._length(replica_id) <= idlest + SLACK:
                return there[replica_id]
        return None

    def _length(self, replica_id: ReplicaID) -> int:
        """How many requests it has, as far as is known."""
        return self.replica_queue_len_cache.get(replica_id) or 0
