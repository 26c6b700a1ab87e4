"""What tests do inside a server's worker: `--worker-extension-cls serving_worker.ServingWorker`."""

from __future__ import annotations

import vllm_samples


class ServingWorker:
    """Mixed into vLLM's worker class, for `collective_rpc` by name."""

    def even_steps(self) -> None:
        """From now on every step takes as long, with proposals and without."""
        vllm_samples.even_steps(self)
