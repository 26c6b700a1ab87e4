"""What vLLM's workers can be asked for: `worker_extension_cls="...worker.ReuseWorker"`."""

from __future__ import annotations

from typing import Any

import torch

from spec_rollout import ops
from spec_rollout.engines.vllm import compat
from spec_rollout.engines.vllm.packed_history import PackedHistory, unpack_history


class ReuseWorker:
    """Mixed into vLLM's worker class, for `collective_rpc`; names start with `spec_rollout_`."""

    def spec_rollout_begin(
        self,
        num_requests: int,
        history: PackedHistory | None,
        stop_token_ids: list[int],
        keyed: bool,
    ) -> None:
        """Ahead of the requests of a rollout call: starts counters anew, takes its history.

        See `ChunkProposer.begin`.
        """
        unpacked = None if history is None else unpack_history(history)
        compat.call_of(self).begin(num_requests, unpacked, stop_token_ids, keyed)

    def spec_rollout_end(self) -> dict[str, Any]:
        """After the last request of a rollout call: forgets its history, returns its counters."""
        return compat.call_of(self).end().as_dict()

    def spec_rollout_take(self) -> tuple[bytes, ...]:
        """Log-probs and accepted lengths recorded since the last call (`collect.Collector.take`).

        Raises:
            ValueError: if a kernel has met bad values since (CUDA).
        """
        ops.check_status()
        return compat.call_of(self).take()

    def spec_rollout_metrics(self, reset: bool = False) -> dict[str, Any]:
        """Counters (`metrics.ReuseMetrics.as_dict`), optionally starting them anew."""
        return compat.call_of(self).take_metrics(reset).as_dict()

    def spec_rollout_history(self, action: str = "info", path: str | None = None) -> dict[str, Any]:
        """What an engine remembers by itself (`options.EngineOptions`).

        Args:
            action: `info`; `clear` forgets it; `export` and `import` write it to a file and add
                what a file holds.
            path: Of the file, on the worker's machine.

        Returns:
            What it is now, as with `info`. {} where the engine remembers nothing by itself.

        Raises:
            ValueError: naming the argument.
        """
        live = compat.live_requests(self)
        if action not in ("info", "clear", "export", "import"):
            raise ValueError(f"action: expected info, clear, export or import, got {action!r}")
        if (path is not None) != (action in ("export", "import")):
            raise ValueError(f"path: expected one with export and import only, got {path!r}")
        if live is None:
            return {}
        if action == "clear":
            live.clear()
        elif action == "export":
            live.history.export_to(str(path))
        elif action == "import":
            live.import_from(str(path))
        return live.info()

    def spec_rollout_destinations(self, weights: list[compat.Described]) -> dict[str, Any]:
        """Which layers take which weights of a checkpoint (`compat.destinations`)."""
        return compat.destinations(self, weights)

    def spec_rollout_start_update(self) -> None:
        """Before the first `spec_rollout_load` of an update."""
        self._spec_rollout_update = compat.start_update(self)

    def spec_rollout_load(self, named_tensors: list[tuple[str, Any]]) -> None:
        """Loads some of an update's weights.

        Args:
            named_tensors: Names as in the checkpoint, and tensors or (dtype name, shape, bytes) of
                them.
        """

        def tensor(value: Any) -> torch.Tensor:
            if isinstance(value, torch.Tensor):
                return value
            dtype, shape, data = value
            flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype))
            return flat.reshape(tuple(shape))

        self._spec_rollout_update.load((name, tensor(value)) for name, value in named_tensors)

    def spec_rollout_finish_update(self) -> None:
        """After the last `spec_rollout_load` of an update."""
        compat.finish_update(self, self._spec_rollout_update)

    def spec_rollout_abort_update(self) -> None:
        """Instead of the rest of an update: what is not loaded whole stays as it was."""
        self._spec_rollout_update.abort()

    def spec_rollout_weights_loaded(self) -> None:
        """After weights that others loaded, as a trainer's own transfer does.

        They count as changed since the last request, if they did not already. The prefix cache is
        not a worker's: whoever loads weights resets it (`LLM.reset_prefix_cache`), and where there
        is a KV connector what that has offloaded (`reset_connector=True`).
        """
        compat.weights_loaded(self)
