"""What a worker is told about the model of its engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.worker.engine_side import EngineSide


def log(line: str) -> None:
    """Writes a line to vLLM's log, which shows only loggers below its own."""
    from vllm.logger import init_logger

    init_logger("vllm.plugins.spec_rollout").info(line)


@functools.cache
def attach_calls(calls: type) -> None:
    """Lets `collective_rpc` find our calls on workers that have an extension of somebody else's.

    Found last, when the worker has nothing of that name: with `worker_extension_cls` vLLM insists
    that a worker's class has none of the extension's names.

    Args:
        calls: `ReuseWorker`.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    missing = getattr(WorkerBase, "__getattr__", None)

    def __getattr__(self: Any, name: str) -> Any:
        if name.startswith("spec_rollout_") and hasattr(calls, name):
            return getattr(calls, name).__get__(self)
        if missing is not None:
            return missing(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    WorkerBase.__getattr__ = __getattr__


def watched_adapters(side_of: Callable[[Any], EngineSide | None]) -> Callable[[Callable], Callable]:
    """For `add_lora` of model runners: the weights of an adapter are weights.

    A trainer of adapters sends its new ones under the number of the old ones, past the model's
    `load_weights`. Without a word of it every sample would count as asked for twice, and none would
    find its last rollout.

    Args:
        side_of: Of a model runner; None where its engine serves nothing by itself.
    """

    def watched(original: Callable) -> Callable:
        def add_lora(self: Any, *args: Any, **kw: Any) -> Any:
            if (side := side_of(self)) is not None:
                side.weights_changed()
            return original(self, *args, **kw)

        return add_lora

    return watched


def watch_weights(model: Any, side: EngineSide) -> None:
    """Counts the weight changes of a model in `side.weights_version`.

    On CPUs, weights that come without a word to us are packed before they are used.

    Whatever way new weights take into a worker (`reload_weights`, a trainer's extension, a transfer
    engine), they are put into the model by its `load_weights`. A change that comes in many calls
    counts once: requests between them are none.
    """
    from vllm.platforms import current_platform

    from spec_rollout.engines.vllm.compat import cpu_wheels

    on_cpu = current_platform.is_cpu()
    original = model.load_weights

    def load_weights(*args: Any, **kw: Any) -> Any:
        side.weights_changed()
        if on_cpu:
            cpu_wheels.pack_before_next_forward(model)
        return original(*args, **kw)

    # On this object only, past nn.Module.__setattr__.
    object.__setattr__(model, "load_weights", load_weights)
