"""TRL's vLLM server, which remembers by itself and is told the samples' names."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient
from spec_rollout.adapters.rows import Gather
from spec_rollout.adapters.trl_contract import broadcast_object
from spec_rollout.engines.vllm.options import section_of

_MODES = ("coupled", "lenient")  # those that know samples
_MAX_CONNECTIONS = 64  # that TRL's session keeps open
_OF_EVALUATION = "spec_rollout evaluation"  # cache salt

_Answer = tuple[list[int], list[float]]  # token ids of a response, and their log-probs


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
        """A response to each row, named by its sample; without reuse by none, so that it has no
        draft of its own. Every rank calls it at the same time.

        Returns:
            Token ids and log-probs of each of this rank's rows.
        """
        ranks = self._gather(list(zip(prompt_ids, samples.tolist(), strict=True)))
        first = sum(map(len, ranks[: self._rank]))
        answers: list[_Answer] = []
        accelerator = self._trainer.accelerator
        if accelerator.is_main_process:
            answers = self._ask_all([row for rank in ranks for row in rank], is_eval)
        if accelerator.num_processes > 1:
            answers = broadcast_object(answers)
        mine = answers[first : first + len(prompt_ids)]
        return [ids for ids, _ in mine], [logprobs for _, logprobs in mine]

    def _ask_all(self, rows: Sequence[tuple[list[int], int]], is_eval: bool) -> list[_Answer]:
        """Rows with the same sample's number go in one request, as all that it says is the same for
        them: there are as many as a group has samples, and every row is with the server at once."""
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, (_, sample) in enumerate(rows):
            places[sample].append(place)

        def ask(sample: int) -> list[_Answer]:
            return self._ask([rows[place][0] for place in places[sample]], sample, is_eval)

        found: dict[int, _Answer] = {}
        with ThreadPoolExecutor(max_workers=_MAX_CONNECTIONS) as pool:
            for sample, answers in zip(places, pool.map(ask, places), strict=True):
                found.update(zip(places[sample], answers, strict=True))
        return [found[place] for place in range(len(rows))]

    def _ask(self, prompts: list[list[int]], sample: int, is_eval: bool) -> list[_Answer]:
        trainer = self._trainer
        generation = trainer.vllm_generation
        given = generation.generation_kwargs or {}
        output = generation.vllm_client.generate(
            prompts=prompts,
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
        logprobs = [[values[0] for values in tokens] for tokens in output["logprobs"]]
        return list(zip(output["completion_ids"], logprobs, strict=True))

    def _name(self, sample: int, given: dict[str, Any], is_eval: bool) -> dict[str, Any]:
        """What a request says of whose it is.

        Args:
            sample: Of its rows.
            given: The user's own parameters, which it replaces in part.
            is_eval: Of an evaluation.
        """
        named: dict[str, Any] = {}
        if is_eval:  # remembered apart, if at all, and nobody's sample
            named["cache_salt"] = _evaluation_salt(given.get("cache_salt"))
        elif self._reuse:
            epoch = int(self._trainer.state.epoch or 0)
            noise_epoch = 0 if self._refresh_epochs is None else epoch // self._refresh_epochs
            name = json.dumps({"sample": sample, "epoch": noise_epoch})
            # Its noise is that of the sample: where vLLM's own sampler draws, with a seed, all
            # samples of a prompt would be the same.
            return {
                "vllm_xargs": {**(given.get("vllm_xargs") or {}), "spec_rollout": name},
                "seed": None,
            }
        if given.get("seed") is not None:
            # As vLLM does for the samples of one request; these are requests of their own.
            named["seed"] = given["seed"] + sample
        return named


def _evaluation_salt(given: str | None) -> str:
    """Of the requests of an evaluation: as secret as the user's own; vLLM takes 128 characters."""
    if given is None:
        return _OF_EVALUATION
    return f"{_OF_EVALUATION} {hashlib.blake2b(given.encode(), digest_size=16).hexdigest()}"


def server_section(trainer: Any) -> dict[str, Any]:
    """What the server was told of this package."""
    info = trainer.vllm_generation.vllm_client.get_server_info()
    return section_of(info.get("additional_config"))


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
