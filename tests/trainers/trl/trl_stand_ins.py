"""As much of a trainer, and of a server's client, as is asked before anything is computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

# Of the warnings.
BIASED = "trained on as if the current policy had drawn them: TRL"


def trainer(**changes: Any) -> SimpleNamespace:
    """As much of a trainer as is looked at before anything is computed."""
    from spec_rollout.adapters.trl_contract import TRAINER_ATTRIBUTES

    given: dict[str, Any] = dict.fromkeys(TRAINER_ATTRIBUTES)
    given.update(
        repetition_penalty=1.0, use_vllm=False, args=SimpleNamespace(generation_kwargs=None)
    )
    return SimpleNamespace(**{**given, **changes})


class Client:
    """TRL's client of a server, whose answers are made up."""

    def __init__(self, **section: Any) -> None:
        self.section = section
        self.asked: list[dict[str, Any]] = []
        self.num_prompts: list[int] = []

    def get_server_info(self) -> dict[str, Any]:
        return {"additional_config": {"spec_rollout": self.section}}

    def generate(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request["generation_kwargs"])
        self.num_prompts.append(len(request["prompts"]))
        return {
            "completion_ids": [[7, *prompt] for prompt in request["prompts"]],
            "logprobs": [[[-0.5]] * (1 + len(prompt)) for prompt in request["prompts"]],
        }


def with_server(client: Client, **generation_kwargs: Any) -> SimpleNamespace:
    return trainer(
        use_vllm=True,
        vllm_mode="server",
        accelerator=SimpleNamespace(num_processes=1, process_index=0, is_main_process=True),
        model=SimpleNamespace(training=True),
        state=SimpleNamespace(global_step=0, epoch=0.0),
        vllm_generation=SimpleNamespace(
            vllm_client=client,
            generation_kwargs=generation_kwargs,
            structured_outputs_regex=None,
        ),
    )
