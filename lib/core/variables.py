"""The environment variables of a process that computes: threads, memory, where the package lies."""

import os
import shlex
import sys
from collections.abc import Mapping

import joblib
import psutil

from lib.core.environment import ROOT

# glibc gives every large activation back to the kernel and faults it in again at the next step; with these values it keeps the
# memory. A training step on two cores went from 9.2 s to 2.0 s. Other allocators do not read them.
LINUX_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "34359738368",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}


def physical_cores() -> int:
    """Count the physical cores that this process may use, at least 1.

    Two threads on one core slow matrix products down, so hyper-threads do not count; a container's share of processors does.
    Only where a process is bound to both processors of a core they count as two.
    """
    usable = int(joblib.cpu_count())  # with only_physical_cores it would count hyper-threads wherever there is a share
    return min(usable, psutil.cpu_count(logical=False) or usable)


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that a run needs and the user has not set.

    Args:
        environ: the variables that are set already; they win, except that PYTHONPATH and JUPYTER_PATH get a first entry.

    Returns:
        Value by name.
    """
    wanted = {"OMP_NUM_THREADS": str(physical_cores()), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # A kernel named python3 in the home folder may start another Python than the one in use.
    wanted["JUPYTER_PREFER_ENV_PATH"] = "1"
    wanted["PYTHONUTF8"] = "1"  # notebooks and texts are UTF-8 whatever the locale says
    # Warnings of torch's C++ parts, one of them at every measurement of memory, would stand between the lines of the launcher.
    wanted["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if sys.platform.startswith("linux"):
        wanted |= LINUX_ALLOCATOR
    if environ.get("JUPYTER_PATH"):  # it goes before the environment, and may hold a python3 of another Python
        own = os.path.join(sys.prefix, "share", "jupyter")
        others = [entry for entry in environ["JUPYTER_PATH"].split(os.pathsep) if entry not in ("", own)]
        forced = {"JUPYTER_PATH": os.pathsep.join([own, *others])}
    else:
        forced = {}
    chosen = forced | {name: value for name, value in wanted.items() if name not in environ}
    others = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(ROOT)]
    return chosen | {"PYTHONPATH": os.pathsep.join([str(ROOT), *others])}


def main() -> None:
    """Print the variables and this interpreter as exports, for `eval` in a shell."""
    exports = settings() | {"SINKS_PYTHON": sys.executable}
    sys.stdout.write("".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()))


if __name__ == "__main__":
    main()
