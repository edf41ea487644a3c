"""Confine a process that handles model output: limit CPU time and memory, refuse files, network and other processes."""

# What this isolates, and what it does not. A model's calls are JSON values passed to known methods (see
# `release.write_call`), so running arbitrary code would take a bug there or in a backend. This is the second line of
# defense: rlimits bound CPU, memory, file size and processes; the audit hook refuses files outside the Python path,
# sockets, processes, signals and ctypes; if the kernel allows it, the network namespace is empty. An audit hook is not
# a security boundary: it does not see native code. Never use this to run arbitrary untrusted code.

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
from typing import Any

REFUSED_EVENTS = (
    *("ctypes.", "fcntl.", "mmap.", "msvcrt.", "os.", "pty.", "resource.", "shutil.", "signal.", "socket."),
    *("sqlite3.", "subprocess.", "syslog.", "tempfile.", "webbrowser.", "winreg."),
)
"""Prefixes of the audit events that raise a PermissionError."""
READ_EVENTS = {"os.listdir", "os.scandir"}


def enter_empty_network() -> bool:
    """Move into an empty network namespace; return whether the kernel allowed it."""
    new_user_and_network = 0x10000000 | 0x40000000  # CLONE_NEWUSER | CLONE_NEWNET
    try:
        if sys.version_info >= (3, 12):
            os.unshare(new_user_and_network)
            return True
        ctypes = importlib.import_module("ctypes")
        return ctypes.CDLL(None).unshare(new_user_and_network) == 0
    except (OSError, AttributeError, ImportError):
        return False


def set_limit(kind: int, value: int, grace: int = 0) -> None:
    """Lower a resource limit, with a hard limit `grace` above it, if the system supports it (macOS: not for memory)."""
    _, most = resource.getrlimit(kind)
    hard = value + grace if most == resource.RLIM_INFINITY else min(value + grace, most)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (min(value, hard), hard))


def confine(seconds: int, memory_mb: int) -> None:
    """Limit this process's CPU time and memory, and refuse files, network and processes. This is irrevocable."""
    set_limit(resource.RLIMIT_AS, memory_mb << 20)
    set_limit(resource.RLIMIT_CPU, seconds, grace=2)
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        set_limit(nothing, 0)
    install_audit_guard([os.path.abspath(folder) for folder in sys.path if folder])  # noqa: PTH100


def install_audit_guard(readable: list[str]) -> None:
    """Refuse files, network and processes irrevocably, except for reading files in the given folders."""
    folders = tuple(folder.rstrip(os.sep) + os.sep for folder in readable)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes or not is_below(path, folders):
                raise PermissionError("no files here")
        elif event in READ_EVENTS and arguments and is_below(arguments[0], folders):
            return
        elif event.startswith(REFUSED_EVENTS):
            raise PermissionError(f"not here: {event}")

    sys.addaudithook(refuse)


def is_below(path: Any, folders: tuple[str, ...]) -> bool:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    # not Path.resolve: it accesses the file system, which would call the guard again
    return (os.path.abspath(os.fsdecode(path)) + os.sep).startswith(folders)  # noqa: PTH100


def describe_exit(status: int) -> tuple[str, bool]:
    """Return why a process with this wait status ended, and whether it was the cause (always, except for SIGKILL)."""
    code = os.waitstatus_to_exitcode(status)
    if -code in (signal.SIGXCPU, signal.SIGPROF):
        return "it ran out of processor time", True
    if code < 0:
        return f"signal {-code} ended it", code != -signal.SIGKILL
    return "it ended early, probably out of memory", True
