"""What happened in each step: the explorers draw from it, and Chrome and Perfetto show it as a timeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.engine.scheduler import Schedule, Scheduler


@dataclass(frozen=True)
class TracedPart:
    """A request's share of a step: tokens start … start + count - 1, and the blocks that it held."""

    name: str
    start: int
    count: int
    samples: bool
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class TracedStep:
    """One step.

    Attributes:
        start: in seconds, likewise `end`.
        waiting: names of the requests that wait, in order.
        preempted: names of those whose memory was taken.
        ref_counts: how many hold each block of the pool.
        num_cached_blocks: blocks that can be found by their content.
    """

    start: float
    end: float
    parts: tuple[TracedPart, ...]
    waiting: tuple[str, ...]
    running: tuple[str, ...]
    preempted: tuple[str, ...]
    ref_counts: tuple[int, ...]
    num_cached_blocks: int


@dataclass
class Trace:
    """All steps so far."""

    steps: list[TracedStep] = field(default_factory=list)

    def record(self, scheduler: Scheduler, step: Schedule, start: float, end: float) -> None:
        """Add a step, as it stands when it has been computed."""
        pool = scheduler.pool
        parts = tuple(
            TracedPart(part.request.name, part.start, part.count, part.samples, tuple(part.request.table.blocks))
            for part in step.scheduled
        )
        self.steps.append(
            TracedStep(
                start,
                end,
                parts,
                tuple(request.name for request in scheduler.waiting),
                tuple(request.name for request in scheduler.running),
                tuple(request.name for request in step.preempted),
                tuple(pool.ref_counts),
                sum(content is not None for content in pool.hashes),
            )
        )

    def save(self, path: str | Path) -> None:
        """Write Chrome's trace format (chrome://tracing, https://ui.perfetto.dev): a row a request, a bar a step."""
        events: list[dict[str, Any]] = []
        rows = {name: row for row, name in enumerate(dict.fromkeys(p.name for s in self.steps for p in s.parts))}
        for number, step in enumerate(self.steps):
            time, length = step.start * 1e6, (step.end - step.start) * 1e6
            for part in step.parts:
                kind = "decode" if part.count == 1 and part.samples else "prefill"
                args = {"step": number, "tokens": part.count, "first": part.start, "blocks": list(part.blocks)}
                events.append(_event(kind, rows[part.name], time, length, args))
            held = sum(count > 0 for count in step.ref_counts)
            for name, value in (("waiting", len(step.waiting)), ("running", len(step.running)), ("blocks held", held)):
                events.append({"name": name, "ph": "C", "pid": 0, "ts": time, "args": {name: value}})
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}}
            for name, row in rows.items()
        ]
        Path(path).write_text(json.dumps({"traceEvents": names + events}), encoding="utf-8")


def _event(name: str, row: int, time: float, length: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": 0, "tid": row, "ts": time, "dur": length, "args": args}
