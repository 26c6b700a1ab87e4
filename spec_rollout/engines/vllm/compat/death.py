"""An engine in a process of its own that dies: whoever waits for it is told.

vLLM notices (its client starts a thread that watches the process) and refuses what is asked of the
engine afterwards. But who waits for an answer already, in `LLM.generate` or `collective_rpc`, waits
on: nothing is put into the queue that it reads (seen in vLLM 0.32).
"""

from __future__ import annotations

import time
import weakref
from concurrent.futures import InvalidStateError
from contextlib import suppress
from threading import Thread
from typing import Any

_SECONDS = 0.5


def tell_of_death(llm: Any) -> None:
    """From now on calls of an `LLM` that wait for its engine end with `EngineDeadError` if that
    dies; nothing where the engine is in this process."""
    core = llm.llm_engine.engine_core
    if all(hasattr(core, name) for name in ("outputs_queue", "utility_results", "resources")):
        watched = weakref.ref(core)
        Thread(target=_watch, args=(watched,), daemon=True, name="spec_rollout_death").start()


def _watch(watched: weakref.ref[Any]) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    while (core := watched()) is not None:
        if core.resources.engine_dead:
            core.outputs_queue.put_nowait(EngineDeadError())
            for future in list(core.utility_results.values()):
                with suppress(InvalidStateError):  # it has its answer
                    future.set_exception(EngineDeadError())
            return
        if not core._finalizer.alive:  # shut down
            return
        del core
        time.sleep(_SECONDS)
