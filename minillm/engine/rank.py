"""`python -m minillm.engine.rank`: one rank of several, as rank 0 starts it on its own machine (`ranks.Crew`)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import warnings

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from minillm.engine.load import RunnerConfig, make_runner
from minillm.engine.parallel import follow, ignore_signals
from minillm.engine.ranks import DistributedRanks, failure, here
from minillm.errors import MinillmError


def main() -> None:
    """Load this rank's part and follow rank 0; end when it does."""
    rank, size, port, device = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ignore_signals()
    warnings.simplefilter("ignore")  # rank 0 says the same
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    torch.set_num_threads(arguments.pop("threads"))
    store = TCPStore("127.0.0.1", port, size, is_master=False)
    try:
        store.set(here(rank), "")
        ranks = DistributedRanks(rank, size, store, device)
        runner = make_runner(RunnerConfig(**arguments), ranks)
        ranks.begin_work()
        follow(runner, ranks)
        ranks.close()
    except (MinillmError, RuntimeError) as error:
        with contextlib.suppress(RuntimeError):  # rank 0 may be gone, and the store with it
            store.set(failure(rank), str(error))
        sys.exit(f"minillm, rank {rank}: {error}")


def _end_with_rank_0() -> None:
    """End when the other side of standard input is gone."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
