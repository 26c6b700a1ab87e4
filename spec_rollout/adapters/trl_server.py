"""TRL's vLLM server, which remembers by itself and is told the samples' names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient
from spec_rollout.adapters.rows import Gather

_MODES = ("coupled", "lenient")  # those that know samples
_MAX_CONNECTIONS = 64  # TRL's own number


class Server:
    """The server of a trainer with `vllm_mode="server"`, asked by its main process for all ranks.

    Args:
        trainer: The `GRPOTrainer`.
        gather, rank: Of the trainer's processes.
        reuse: False tells it no samples, so that it draws with fresh noise.
        refresh_epochs: As in `RolloutSession`.

    Attributes:
        rule: By which it tests drafts; None in processes that do not talk to it.

    Raises:
        ValueError: if it does not remember, or does not know samples by name.
    """

    def __init__(
        self, trainer: Any, gather: Gather, rank: int, *, reuse: bool, refresh_epochs: int | None
    ) -> None:
        self._trainer = trainer
        self._gather = gather
        self._rank = rank
        self._reuse = reuse
        self._refresh_epochs = refresh_epochs
        self.rule: AcceptanceRule | None = None
        if trainer.accelerator.is_main_process:
            section = server_section(trainer)
            check_section(section)
            make = Lenient if section["mode"] == "lenient" else Coupled
            self.rule = make(section.get("log_lenience", 0.0))

    def generate(
        self, prompt_ids: Sequence[list[int]], samples: np.ndarray, *, is_eval: bool
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One request per row, named by its sample; without reuse by none, so that it has no draft
        of its own. Every rank calls it at the same time.

        Returns:
            Token ids and log-probs of each of this rank's rows.
        """
        rows = [
            row
            for rank in self._gather(list(zip(prompt_ids, samples.tolist(), strict=True)))
            for row in rank
        ]
        first = sum(self._gather(len(prompt_ids))[: self._rank])
        answers: list[tuple[list[int], list[float]]] | None = None
        if self._trainer.accelerator.is_main_process:
            with ThreadPoolExecutor(max_workers=_MAX_CONNECTIONS) as pool:
                answers = list(pool.map(lambda row: self._ask(*row, is_eval=is_eval), rows))
        everyone = next(given for given in self._gather(answers) if given is not None)
        mine = everyone[first : first + len(prompt_ids)]
        return [ids for ids, _ in mine], [logprobs for _, logprobs in mine]

    def _ask(self, ids: list[int], sample: int, *, is_eval: bool) -> tuple[list[int], list[float]]:
        trainer = self._trainer
        generation = trainer.vllm_generation
        given = generation.generation_kwargs or {}
        output = generation.vllm_client.generate(
            prompts=[ids],
            n=1,
            repetition_penalty=trainer.repetition_penalty,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p or 0.0,
            max_tokens=trainer.max_completion_length,
            logprobs=0,
            structured_outputs_regex=generation.structured_outputs_regex,
            generation_kwargs={**given, **self._name(sample, given, is_eval)},
        )
        return output["completion_ids"][0], [lp[0] for lp in output["logprobs"][0]]

    def _name(self, sample: int, given: dict[str, Any], is_eval: bool) -> dict[str, Any]:
        """What a request says of whose it is."""
        named: dict[str, Any] = {}
        if is_eval:  # remembered apart, if at all, and nobody's sample
            named = {"cache_salt": "spec_rollout evaluation"}
        elif self._reuse:
            epoch = int(self._trainer.state.epoch or 0)
            noise_epoch = 0 if self._refresh_epochs is None else epoch // self._refresh_epochs
            name = json.dumps({"sample": sample, "epoch": noise_epoch})
            return {"vllm_xargs": {"spec_rollout": name}}
        if given.get("seed") is not None:
            # As vLLM does for the samples of one request; these are requests of their own.
            named["seed"] = given["seed"] + sample
        return named


def server_section(trainer: Any) -> dict[str, Any]:
    """What the server was told of this package."""
    info = trainer.vllm_generation.vllm_client.get_server_info()
    return (info.get("additional_config") or {}).get("spec_rollout") or {}


def check_section(section: dict[str, Any]) -> None:
    """Raises for a server that does not remember, or does not know samples."""
    if section.get("mode") not in _MODES:
        raise ValueError(
            "vllm server: expected one started with SPEC_ROLLOUT=coupled (or lenient) in its "
            f"environment, got mode {section.get('mode', 'off')}"
        )
    # Requests of an evaluation name no sample: they would be counted, and draw in every evaluation
    # what they drew in the last.
    if section.get("identity", "request") != "request":
        raise ValueError(
            'vllm server: expected one started with identity "request" in SPEC_ROLLOUT, as '
            "training requests name their samples and evaluation draws afresh, got "
            f"{section['identity']!r}"
        )
