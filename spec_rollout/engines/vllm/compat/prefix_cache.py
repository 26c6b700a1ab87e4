"""What an engine keeps of prompts, which is to be empty when its weights change.

That is vLLM's prefix cache and, behind a KV connector, whatever this offloads to. vLLM takes a
connector that cannot be emptied for one that has been.
"""

from __future__ import annotations

from typing import Any

# Of `OffloadingConnector`: these empty what they hold themselves. Others may have taken over the
# base class's way, which is to do nothing.
_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")


def empty_prefix_cache(llm: Any, *, connector: bool = True) -> bool:
    """Empties an `LLM`'s prefix cache.

    Args:
        connector: Also what is behind its KV connector.

    Returns:
        Whether that is empty now. It cannot be while requests run, or transfers of a connector.
    """
    # Where there is no connector, older versions answer False if they are asked for it.
    transfer = llm.llm_engine.vllm_config.kv_transfer_config
    if not connector or transfer is None:
        return bool(llm.reset_prefix_cache())
    try:
        return bool(llm.reset_prefix_cache(reset_connector=True))
    except AssertionError:
        if transfer.kv_connector != "OffloadingConnector":
            raise
        # Its own, between two steps: it has been emptied, and no step has been since that could
        # have put anything there. (In a process of its own the core has no such error: such an
        # update fails.)
        return bool(llm.reset_prefix_cache())


def check_connector(llm: Any) -> None:
    """Checks that all that an `LLM` keeps of prompts can be emptied.

    Raises:
        ValueError: naming the KV connector of which that is not known.
    """
    transfer = llm.llm_engine.vllm_config.kv_transfer_config
    kept = None if transfer is None else _kept(transfer)
    if kept is not None:
        raise ValueError(
            "kv_transfer_config: expected a KV connector that can be emptied when weights change, "
            f"got {kept}: prompts would be answered from what the old weights computed"
        )


def _kept(transfer: Any) -> str | None:
    """What of a `KVTransferConfig` cannot be emptied, or need not have been when it says so."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    name, extra = transfer.kv_connector, transfer.kv_connector_extra_config
    kind = KVConnectorFactory.get_connector_class(transfer)
    kinds = {each.__name__ for each in kind.__mro__}
    if "MultiConnector" in kinds:
        parts = [type(transfer)(**part) for part in extra.get("connectors", ())]
        return next((kept for part in parts if (kept := _kept(part)) is not None), None)
    if getattr(kind, "reset_cache", None) in (None, KVConnectorBase_V1.reset_cache):
        return f"{name}, which has no reset_cache"
    if "OffloadingConnector" in kinds:
        if (spec := extra.get("spec_name", _SPECS[0])) not in _SPECS:
            return f"{name} with spec_name {spec}"
        if extra.get("secondary_tiers"):
            return f"{name} with secondary_tiers, which keep what they have"
    return None
