"""`minillm serve --replicas N`: replicas on Ray behind a door on a port, until a signal comes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from minillm.errors import ConfigError
from minillm.models.source import resolve
from minillm.scale.cluster import connected, resources
from minillm.scale.door import Door, door_app
from minillm.scale.replica import Replica
from minillm.scale.router import PrefixRouter
from minillm.server.serve import Server
from minillm.server.service import SPARE_REQUESTS, ServerConfig

HEALTH_PERIOD_SECONDS = 1.0


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are.

    Attributes:
        least: these are started first.
        most: as many are added as keep the requests of each at `LLM`'s max_num_seqs, and taken away again.

    Raises:
        ConfigError: none, or fewer at most than at least.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"{self.least} to {self.most} replicas cannot be: give 1 <= least <= most")

    @classmethod
    def of(cls, replicas: int | None, least: int | None, most: int | None) -> Scaling:
        """What the command's three options say, of which one at least is given.

        Raises:
            ConfigError: they contradict each other.
        """
        if replicas is not None:
            if least is not None or most is not None:
                raise ConfigError("--replicas is a fixed number: leave it or --min-replicas and --max-replicas out")
            return cls(replicas, replicas)
        if most is None:
            raise ConfigError("--min-replicas needs --max-replicas, up to which replicas are added")
        return cls(1 if least is None else least, most)


def serve(
    arguments: dict[str, Any], config: ServerConfig, scaling: Scaling, *, host: str, port: int, drain_seconds: float
) -> int:
    """Serve until a signal comes.

    Args:
        arguments: `LLM`'s, of every replica.
        config: the server's; `max_requests` is of each replica.

    Returns:
        The process's exit status: 0, or 1 where it was stopped at once.

    Raises:
        MinillmError: the replicas cannot be started.
    """
    with connected(), deployed(arguments, config, scaling, drain_seconds=drain_seconds) as handle:
        door = Door(handle, config, scaling.most)
        server: Server[Door] = Server(door_app(door), host=host, port=port, drain_seconds=drain_seconds)
        server.run()
        return server.exit_status


@contextmanager
def deployed(
    arguments: dict[str, Any], config: ServerConfig, scaling: Scaling, *, drain_seconds: float
) -> Iterator[DeploymentHandle[Any]]:
    """Inside, replicas run on the cluster that this process is connected to.

    Raises:
        MinillmError: they cannot be started.
    """
    if "RAY_ADDRESS" not in os.environ:
        resolve(arguments["model"])  # once, before several replicas do it at the same time
    most = config.max_requests + SPARE_REQUESTS
    deployment = ray_serve.deployment(Replica).options(
        ray_actor_options=resources(arguments["device"], arguments["tensor_parallel_size"], scaling.most),
        max_ongoing_requests=most,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=drain_seconds,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **_numbers(scaling, arguments["max_num_seqs"]),
    )
    name = f"minillm-{uuid4().hex[:8]}"  # several may be served on a cluster
    ray_serve.start(proxy_location="Disabled")  # Ray's own door does not look into requests
    try:
        yield _run(deployment.bind(arguments, config), name)
    finally:
        ray_serve.delete(name)


def _run(application: Application, name: str) -> DeploymentHandle[Any]:
    """Start an application and wait until it runs.

    Raises:
        ConfigError: it does not.
    """
    try:
        return ray_serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        raise ConfigError(f"the replicas did not start: {error}") from error


def _numbers(scaling: Scaling, seats: int) -> dict[str, Any]:
    if scaling.least == scaling.most:
        return {"num_replicas": scaling.least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scaling.least, max_replicas=scaling.most, target_ongoing_requests=seats
        )
    }
