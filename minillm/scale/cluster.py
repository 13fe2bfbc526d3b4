"""The Ray cluster: one that is there, or one on this machine that ends with the command."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

import ray

from minillm.errors import ConfigError

OBJECT_STORE_BYTES = 200 * 2**20
"""Of a cluster on this machine, for what processes hand each other; requests and answers are small."""


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Inside, Ray is there: the cluster that `RAY_ADDRESS` names, or else a new one of this machine alone.

    A connection that there is already stays.

    Raises:
        ConfigError: the cluster cannot be reached, or can only be reached in a way in which answers do not stream.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is Ray Client's: start the command on a machine of the cluster, with"
            " RAY_ADDRESS=auto"
        )
    try:
        if address == "local":
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises no narrower one where its processes do not start in time
        raise ConfigError(f"no Ray cluster can be had by RAY_ADDRESS={address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def has_gpus() -> bool:
    """Whether the cluster has a GPU somewhere."""
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def uses_gpus(device: str) -> bool:
    """Whether models of this `device` argument go to GPUs: "auto" means the cluster's, not this machine's."""
    return device.startswith("cuda") or (device == "auto" and has_gpus())


def resources(device: str, ranks: int, models: int, *, spare_cores: int = 0) -> dict[str, float]:
    """What each of so many models takes of the cluster: a GPU for each rank, or else its share of the cores.

    Args:
        spare_cores: which the models leave to other tasks.

    Raises:
        ConfigError: more GPUs than a cluster of this machine has (another may grow), or no core that is free.
    """
    if uses_gpus(device):
        there = ray.cluster_resources().get("GPU", 0)
        if "RAY_ADDRESS" not in os.environ and models * ranks > there:
            raise ConfigError(f"{models} replicas of {ranks} GPUs are more than the {there:g} here: take fewer")
        return {"num_cpus": 0, "num_gpus": ranks}
    cores = [int(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources().get("CPU", 0.0)
    if free < 1:
        raise ConfigError(f"others hold all {sum(cores)} cores of the cluster: wait for them, or end them")
    share = share_of_cores(cores, models, spare_cores)
    if share * models > free:  # what others hold, they hold anywhere
        share = share_of_cores([int(free)], models, spare_cores)
    return {"num_cpus": share}


def share_of_cores(cores: Sequence[int], models: int, spare: int = 0) -> float:
    """The most cores that each of so many models can have, where each stays on one machine.

    Args:
        cores: of each machine.
        spare: cores that are left over, one by one from the machine that then has most.
    """
    left = list(cores)
    for _ in range(spare):
        left[left.index(max(left))] = max(max(left) - 1, 0)
    for share in range(max(left), 0, -1):
        if sum(there // share for there in left) >= models:
            return float(share)
    return 1 / -(-models // sum(left)) if any(left) else 0.0
