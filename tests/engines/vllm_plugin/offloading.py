"""A KV connector that keeps nothing, and answers as it is told: `kv_connector_module_path`.

By the name of the one of vLLM's that cannot be emptied twice between two steps.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

answers: list[bool] = []  # of `reset_cache`, the next one first
flushing: list[str] = []  # set by it until the next step, as OffloadingConnector's


class OffloadingConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)

    def reset_cache(self) -> bool:
        assert not flushing
        answer = answers.pop(0)
        if answer:
            flushing.append("all")
        return answer

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_num_new_matched_tokens(self, *args: Any) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, *args: Any) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        flushing.clear()
        return KVConnectorMetadata()

    def request_finished_all_groups(self, *args: Any) -> tuple[bool, None]:
        return False, None
