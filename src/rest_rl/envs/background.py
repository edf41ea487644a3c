"""One event loop per process, in a thread of its own, for asynchronous tools and for connections to servers."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from typing import Any

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop; the first call starts its thread."""
    with _lock:
        # A fork copies the loop but not its thread, hence one loop per process id.
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="event loop of environments", daemon=True).start()
        return _loops[os.getpid()]


def finish(value: Any) -> Any:
    """Return the value, or what it results in if it can be awaited. Not for code that runs in the loop itself."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run_coroutine_threadsafe(wait(), background_loop()).result()
