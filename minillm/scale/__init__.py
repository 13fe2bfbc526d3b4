"""Replicas of the server, and offline batches, on Ray (needs the extra `scale`)."""

from __future__ import annotations

import os

from minillm.errors import MissingExtraError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody without being asked
if "RAY_ADDRESS" not in os.environ:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a cluster of this machine: Ray listens on 127.0.0.1 only

try:
    import ray.data
    import ray.serve  # noqa: F401
except ImportError as error:
    raise MissingExtraError("minillm.scale", "scale") from error

from minillm.scale.dataset import generate_dataset

__all__ = ["generate_dataset"]
