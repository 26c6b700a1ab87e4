"""An `LLM` with requests of others, and prompts that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_samples import EOS, LLM_ARGS, make_requests, random_prompts, rows_of

from spec_rollout.acceptance import Coupled
from spec_rollout.types import SamplingParams

PROMPTS = random_prompts(5, seed=51)
SAMPLING = SamplingParams(max_tokens=12, stop_token_ids=(EOS,))


def roll_out(engine: Any) -> list[list[int]]:
    return rows_of(engine.rollout(make_requests(PROMPTS), SAMPLING, Coupled()))


@pytest.fixture
def running(engine: Any) -> Any:
    """Two requests of somebody else, under way."""
    from vllm import SamplingParams as Params

    llm = engine.llm
    llm.enqueue(
        [{"prompt_token_ids": [5, 6, 7]}] * 2,
        Params(max_tokens=20, ignore_eos=True),
        use_tqdm=False,
    )
    llm.llm_engine.step()
    yield llm
    llm.wait_for_completion(use_tqdm=False)


@pytest.mark.parametrize("strategy", ["inflight", "two_pass"])
def test_a_rollout_waits_for_nobody_elses_requests(
    engine: Any, running: Any, strategy: Any
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    other = VLLMEngine.wrap(engine.llm, strategy=strategy)
    with pytest.raises(RuntimeError, match=r"llm: expected no unfinished requests .* got 2"):
        roll_out(other)
    outputs = running.wait_for_completion(use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 20]
    assert roll_out(other) == roll_out(engine)


def test_nothing_is_written_while_requests_run(engine: Any, hf_model: Any, running: Any) -> None:
    version = engine.policy_version
    changed = [(name, tensor + 0.1) for name, tensor in hf_model.named_parameters()]
    with pytest.raises(RuntimeError, match="prefix cache: expected no running requests"):
        engine.update_weights(changed)
    assert engine.policy_version == version
    running.wait_for_completion(use_tqdm=False)
    before = roll_out(engine)
    engine.update_weights(hf_model.named_parameters())
    assert roll_out(engine) == before


def test_a_cache_that_is_not_empty_after_an_update_is_emptied_before_the_next_rollout(
    engine: Any, hf_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, answers = roll_out(engine), [True, False, False, True]
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: answers.pop(0))
    with pytest.raises(RuntimeError, match="prefix cache: expected"):
        engine.update_weights(hf_model.named_parameters())
    with pytest.raises(RuntimeError, match="prefix cache: expected"):
        roll_out(engine)
    assert roll_out(engine) == before
    assert roll_out(engine) == before
    assert not answers


@pytest.fixture
def no_connector_after() -> Iterator[None]:
    """A connector is the process's, not an engine's: the engines of other tests have none."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    yield
    ensure_kv_transfer_shutdown()


def test_what_a_connector_keeps_is_emptied_too(
    model_dir: Path, hf_model: Any, monkeypatch: pytest.MonkeyPatch, no_connector_after: None
) -> None:
    import offloading

    from spec_rollout.engines.vllm import VLLMEngine

    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_connector_module_path": offloading.__name__,
        "kv_role": "kv_both",
    }
    llm_args = {**LLM_ARGS, "kv_transfer_config": transfer}
    engine = VLLMEngine(str(model_dir), num_speculative_tokens=8, llm_args=llm_args)
    monkeypatch.setattr(offloading, "answers", [True, False, True])
    before = roll_out(engine)
    assert len(offloading.answers) == 3
    for _ in range(2):  # the second has nothing to empty
        engine.update_weights(hf_model.named_parameters())
    assert len(offloading.answers) == 2
    assert roll_out(engine) == before
    with pytest.raises(RuntimeError, match=r"prefix cache: expected .*nor transfers"):
        engine.update_weights(hf_model.named_parameters())
    assert roll_out(engine) == before
    assert not offloading.answers


@pytest.mark.parametrize(
    ("connector", "extra", "message"),
    [
        ("OffloadingConnector", {}, None),
        ("OffloadingConnector", {"secondary_tiers": [{"type": "fs"}]}, "with secondary_tiers"),
        ("OffloadingConnector", {"spec_name": "Mine"}, "with spec_name Mine"),
        ("ExampleConnector", {}, "got ExampleConnector, which has no reset_cache"),
        ("MultiConnector", {"connectors": ["OffloadingConnector"]}, None),
        (
            "MultiConnector",
            {"connectors": ["OffloadingConnector", "ExampleConnector"]},
            "got ExampleConnector, which has no reset_cache",
        ),
    ],
)
def test_connectors_that_may_keep_what_they_have_are_refused(
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    connector: str,
    extra: dict[str, Any],
    message: str | None,
) -> None:
    from vllm.config import KVTransferConfig

    parts = [{"kv_connector": name, "kv_role": "kv_both"} for name in extra.get("connectors", ())]
    extra = {**extra, "connectors": parts} if parts else extra
    transfer = KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )
    monkeypatch.setattr(engine.llm.llm_engine.vllm_config, "kv_transfer_config", transfer)
    if message is None:
        engine.update_weights([])
        return
    with pytest.raises(
        ValueError, match=f"kv_transfer_config: expected a KV connector .*{message}"
    ):
        engine.update_weights([])
