"""Ray as the engine of `lib.grid.sweep`: connect to a cluster, or start one on this machine, and say what a worker of it gets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lib.core import environment
from lib.core.errors import InputError, require

LOCK = "requirements-cluster.lock"
# Nothing is sent through Ray's memory, and its watch over memory would end our small workers instead of the large processes.
LOCAL = {
    "include_dashboard": False,
    "object_store_memory": 80 * 2**20,
    "_system_config": {"memory_monitor_refresh_ms": 0, "worker_niceness": 0},
}


@contextmanager
def pool(address: str | None, *, jobs: int, gpus_per_worker: float) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Connect to Ray for the time of a block.

    Args:
        address: of a running cluster, `auto` for the one that this machine belongs to, None to start one here; not looked at when
            this process is connected already.
        jobs: workers wanted.
        gpus_per_worker: GPUs that each worker gets for its own.

    Yields:
        How many workers the cluster has room for, threads for each, and the settings for `joblib.parallel_config`.

    Raises:
        InputError: Ray is not installed, there is no cluster, or it has no room for two workers.
    """
    ray = _import()
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address, jobs)
    try:
        total = ray.cluster_resources()
        cores, gpus = int(total.get("CPU", 0)), total.get("GPU", 0)
        room = min(jobs, cores, int(gpus / gpus_per_worker) if gpus_per_worker else jobs)
        got = f"room for {room} ({cores} cores, {gpus:g} GPUs, {gpus_per_worker:g} GPUs for each of {jobs} processes)"
        require(room > 1, "a Ray cluster must have room for two processes at once", got, "add nodes, or run without Ray")
        # A worker without a core of its own would be put on the first node with all the others.
        each = {"num_cpus": 1, "num_gpus": gpus_per_worker, "scheduling_strategy": "SPREAD"}
        yield room, max(1, cores // room), {"backend": "ray", "ray_remote_args": each}
    finally:
        if not connected:
            ray.shutdown()


def _import() -> Any:
    """Import Ray, and make it known to joblib."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        remedy = f"python -m pip install -r {LOCK} -c requirements.lock"
        raise InputError(f"the engine ray must be installed, got no package ray: {remedy}") from error
    register_ray()
    return ray


def _connect(ray: Any, address: str | None, jobs: int) -> None:
    """Connect to a cluster, or start one that sends nothing home."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers find the package where this process finds it: the machines share the repository's folder.
    same = {"runtime_env": {"env_vars": {"PYTHONPATH": environment.settings()["PYTHONPATH"]}}}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address, **same, **quiet) if address else ray.init(num_cpus=jobs, **LOCAL, **same, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        got = " ".join(str(error.__cause__ or error).split())
        remedy = "start one with ray start --head, or set RAY_AUTH_MODE=token where it asks for a token"
        raise InputError(f"a Ray cluster must answer at {address or 'this machine'}, got {got}: {remedy}") from error
