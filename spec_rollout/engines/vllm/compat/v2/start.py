"""The hooks of a worker on V2 go in when the worker is made: there is no model runner yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spec_rollout.engines.vllm.compat.identity import is_v2


def hooked_worker(original: Callable) -> Callable:
    """For `WorkerBase.__init__`, which runs before there is a model runner.

    What it imports sets up devices.
    """

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if is_v2(vllm_config):
            from spec_rollout.engines.vllm.compat.v2.hooks import install_worker
            from spec_rollout.engines.vllm.compat.v2.warm_up import serve_after_warm_up

            install_worker()
            serve_after_warm_up(self)

    return __init__
