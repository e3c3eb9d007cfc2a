"""Leases: one process of many, on one machine or on several that share a folder, holds a piece of work.

A lease is a folder of numbered files, and the highest number counts. It lives while its process lives on this machine; seen from
elsewhere, while its heartbeat is fresh. Who finds it dead makes the next number, which the file system lets only one do.
"""

import json
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil

BEAT_SECONDS = 2.0
STALE_SECONDS = 300.0  # far above a beat, the cache of a network file system, and a call that keeps other threads waiting
CLOCK_SLACK_SECONDS = 10.0  # the start of a process is counted from the start of the system, which a set clock shifts


@contextmanager
def hold(folder: Path, *, stale: float = STALE_SECONDS, on_beat: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold a lease that no other process holds for as long as the block runs.

    Args:
        folder: the lease; its parent is shared by the machines.
        stale: seconds without a heartbeat after which the lease of another machine may be taken over.
        on_beat: called at every heartbeat, in the heartbeat's thread.

    Yields:
        True when the lease is ours, False when another process holds it.
    """
    mine = _take(folder, stale)
    if mine is None:
        yield False
        return
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(mine, ended, on_beat), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        ended.set()
        heart.join()
        for number in sorted(_generations(folder)):  # dead ones first, ours last
            if number <= int(mine.name):
                (folder / str(number)).unlink(missing_ok=True)
        with suppress(OSError):  # another process has just taken it
            folder.rmdir()


def is_held(folder: Path, *, stale: float = STALE_SECONDS) -> bool:
    """Tell whether a living process holds a lease.

    Args:
        folder: the lease.
        stale: seconds without a heartbeat after which the lease of another machine counts as dead.

    Returns:
        False also when nobody ever held it.
    """
    found = _generations(folder)
    return bool(found) and _lives(folder / str(max(found)), found[max(found)], stale)


def age(path: Path, *, beside: Path) -> float:
    """Measure how long ago a file was touched, by the clock of its file system, which may differ from this machine's.

    Args:
        path: the file.
        beside: a folder of the same file system, where a file is made for a moment.

    Returns:
        Seconds; 0 when the file is gone.
    """
    probe = beside / f".{uuid4().hex}.clock"
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _take(folder: Path, stale: float) -> Path | None:
    """Make the next generation of a lease unless the last one lives."""
    before = _generations(folder)
    last = max(before, default=-1)
    if before and _lives(folder / str(last), before[last], stale):
        return None
    owner = {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time(), "token": uuid4().hex}
    mine, text = folder / str(last + 1), json.dumps(owner)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with mine.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except (FileExistsError, FileNotFoundError):  # another process was faster, or has just put the folder away
        return None
    # What was judged above may have been put away and taken anew in between: then the newer lease stands.
    if _generations(folder) != before | {last + 1: text}:
        mine.unlink(missing_ok=True)
        return None
    return mine


def _generations(folder: Path) -> dict[int, str]:
    """Read the files of one lease by number."""
    found = {}
    for name in os.listdir(folder) if folder.is_dir() else []:
        with suppress(FileNotFoundError):
            found[int(name)] = (folder / name).read_text(encoding="utf-8")
    return found


def _lives(path: Path, text: str, stale: float) -> bool:
    """Tell whether the process that wrote a lease lives, as far as this machine can tell."""
    owner = json.loads(text) if text.endswith("}") else {}  # empty for a moment after it was made
    if owner.get("host") != _host():
        return age(path, beside=path.parent.parent) < stale
    try:
        process = psutil.Process(owner["pid"])
        # A process number may be given to another process later.
        same = abs(process.create_time() - owner["started"]) < CLOCK_SLACK_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beat(path: Path, ended: threading.Event, on_beat: Callable[[], None]) -> None:
    """Touch a lease until the work has ended."""
    while True:
        with suppress(OSError):  # the server of the folder is away for a moment
            os.utime(path)
        on_beat()
        if ended.wait(BEAT_SECONDS):
            return


def _host() -> str:
    """Name the machine, and the container, in which a process number means something."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {os.readlink(space) if space.is_symlink() else ''}".strip()
