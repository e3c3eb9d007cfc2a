"""Ray: connect to a cluster, or start one on this machine, and say how many groups of cells it has room for."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lib.core import hub
from lib.core.config import typed_path
from lib.core.errors import InputError, require
from lib.core.variables import physical_cores, settings

LOCK = "requirements-cluster.lock"
# Nothing is sent through Ray's memory, and its watch over memory kills by guess what the system kills by need.
LOCAL: dict[str, Any] = {
    "include_dashboard": False,
    "object_store_memory": 80 * 2**20,
    "_system_config": {"memory_monitor_refresh_ms": 0, "worker_niceness": 0},
}
# Threads that spin while they wait starve those that share a core.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


@dataclass(frozen=True)
class Room:
    """What a cluster offers: Ray itself, how many groups at one time, and threads for each."""

    ray: Any
    groups: int
    threads: int


@contextmanager
def connected(address: str | None, *, jobs: int | None, gpus_per_group: float) -> Iterator[Room]:
    """Connect to Ray for the time of a block; what still runs at its end is ended.

    Args:
        address: of a running cluster, `auto` for the one that this machine belongs to, None to start one here; not looked at when
            this process is connected already.
        jobs: groups at one time; None for as many as get their GPUs, or one on CPUs.
        gpus_per_group: GPUs that each gets for its own; below 1 it shares one.

    Yields:
        The room there is.

    Raises:
        InputError: Ray is not installed, there is no cluster, or it has no room for one group.
    """
    ray = _import()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, jobs)
    try:
        most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        rule = f"a process must find its GPUs on one machine, of which the largest has {most:g}"
        require(gpus_per_group <= most, rule, f"{gpus_per_group:g} wanted", "lower --gpus-per-cell")
        yield Room(ray, *room(ray.cluster_resources(), jobs=jobs, gpus_per_group=gpus_per_group))
    finally:
        if ours:
            ray.shutdown()


def room(resources: dict[str, float], *, jobs: int | None, gpus_per_group: float) -> tuple[int, int]:
    """Say how many groups fit on a cluster at one time, and how many threads each gets.

    Args:
        resources: as Ray lists them, with CPU and GPU.
        jobs: groups wanted; None for as many as get their GPUs, or one on CPUs.
        gpus_per_group: GPUs of each.

    Raises:
        InputError: there is no room.

    >>> room({"CPU": 64.0, "GPU": 8.0}, jobs=None, gpus_per_group=2)
    (4, 16)
    """
    cores, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0)
    most = int(gpus / gpus_per_group) if gpus_per_group else jobs or 1
    fits = min(jobs or most, most, cores)
    got = f"{cores} cores and {gpus:g} GPUs with {gpus_per_group:g} GPUs wanted for each"
    require(fits >= 1, "a Ray cluster must have room for one group of cells", got, "add nodes, or lower --gpus-per-cell")
    return fits, max(1, cores // fits)


def _import() -> Any:
    try:
        import ray
    except ImportError as error:
        remedy = f"python -m pip install -r {LOCK} -c requirements.lock"
        raise InputError(f"Ray must be installed to compute a grid, got no package ray: {remedy}") from error
    return ray


def _connect(ray: Any, address: str | None, jobs: int | None) -> None:
    """Connect to a cluster, or start one that sends nothing home."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # what gets no GPU still sees those that its user lets it see
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            ray.init(address, runtime_env={"env_vars": variables()}, **quiet)
        else:
            # As many cores as the machine has, or as many as are wanted where these are more: each group then finds one.
            with _environ(variables()):  # inherited: processes then wait ready, which those of a runtime_env cannot
                ray.init(num_cpus=max(physical_cores(), jobs or 1), **LOCAL, **quiet)
    except Exception as error:  # also of a start that took too long, which has no type of its own
        got = " ".join(str(error.__cause__ or error).split())
        remedy = "start one with ray start --head, or set RAY_AUTH_MODE=token where it asks for a token"
        raise InputError(f"a Ray cluster must answer at {address or 'this machine'}, got {got}: {remedy}") from error


@contextmanager
def _environ(changed: Mapping[str, str]) -> Iterator[None]:
    """Change variables of this process for the time of a block."""
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def variables() -> dict[str, str]:
    """Return the environment of a process that computes: where the package lies, which is the same on all machines, and the rest.

    Returns:
        Value by name.
    """
    # Without a network every file and data set, cached ones too, would be asked for in vain for half a minute.
    offline = {"HF_HUB_OFFLINE": "1"} if hub.problem() else {}
    wanted = settings({}) | {"PYTHONFAULTHANDLER": "1"}
    chosen = {name: os.environ.get(name, value) for name, value in wanted.items()}
    own = {"PYTHONPATH": settings()["PYTHONPATH"], "SINKS_CWD": str(typed_path("."))}
    return chosen | PASSIVE | own | offline
