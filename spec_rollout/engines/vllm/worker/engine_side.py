"""Requests that come to the engine by themselves: what each is to be drawn with, and drafted from.

A rollout call of `VLLMEngine` says all that of its requests. Here nobody does: the request is an
ordinary one of a trainer's or a server's, at most it names its sample (`wire.SampleName`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient
from spec_rollout.engines.vllm.admission import why_not_ours
from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import ReuseRequest, SampleName
from spec_rollout.engines.vllm.worker.sample_numbers import SampleNumbers
from spec_rollout.keys import noise_keys, prompt_key

Recall = Callable[[bytes, int], tuple[np.ndarray, np.ndarray] | None]

# Noise of different kinds of requests has nothing in common, whatever their numbers.
_FRESH, _SEEDED, _NAMED = 1, 2, 3
_GREEDY = -(2**62)  # tag of greedy rollouts


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, as the model runner has it.

    Attributes:
        prompt_ids: None where the prompt is not (only) tokens.
        params: vLLM's SamplingParams.
        namespace: What else decides about its text: adapter, images, the client's cache salt.
        name: What it calls itself, or None.
    """

    prompt_ids: Any
    params: Any
    namespace: str
    name: SampleName | None


@dataclass(frozen=True, slots=True)
class Served:
    """A request that our sampler serves.

    Attributes:
        request: Key, rule and draft.
        group: Its history is that of the requests with the same one. 16 bytes.
        sample: Its index within the prompt's group; -1: nobody said.
        tag: Under which `recall` finds what it generates; None: it does not.
    """

    request: ReuseRequest
    group: bytes
    sample: int = -1
    tag: int | None = None


@dataclass(slots=True)
class EngineCounters:
    """Since the engine started.

    Attributes:
        num_served: Requests that our sampler draws.
        num_passed_by: Requests left to vLLM's own sampler (penalties, structured output, ...).
        num_named: Of the served, those that are a sample of their prompt.
        num_repeated: Asked for a sample again before the weights changed: they were drawn with
            fresh noise.
        num_with_draft: Had an earlier rollout of their own to follow.
    """

    num_served: int = 0
    num_passed_by: int = 0
    num_named: int = 0
    num_repeated: int = 0
    num_with_draft: int = 0


class EngineSide:
    """Decides about requests that no rollout call announced.

    Args:
        options: Of the engine.
        engine_seed: vLLM's seed. Workers of one replica that share requests have the same.
        replica: Number of the data-parallel replica.
        salt: Of the noise of requests without a seed, where nobody gave the engine one: engines
            with the same seed count requests alike, so a group that is spread over them would be
            drawn with the same noise several times.
        logprobs_mode: What log-probs vLLM is to return.
        on_v2: vLLM's Model Runner V2 draws, which can do more beside proposals.
        has_peers: Other workers serve the same requests, and have to find the same drafts.
        recall: Group and tag -> the last rollout, as token ids [len], int32, and log-probs
            [len], float32; or None. Set before the first request.

    Attributes:
        counters: What has come.
        has_peers: As given.
        samples: Which samples were asked for; None where the mode knows none.
        weights_version: Number of weight changes seen.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        engine_seed: int,
        replica: int,
        salt: int = 0,
        logprobs_mode: str = "raw_logprobs",
        on_v2: bool = False,
        has_peers: bool = False,
        recall: Recall | None = None,
    ) -> None:
        self.options = options
        self.recall = recall
        self.has_peers = has_peers
        self._seed = engine_seed
        self._replica = replica
        self._salt = salt
        self._logprobs_mode = logprobs_mode
        self._on_v2 = on_v2
        self._num_fresh = 0
        self._lenient_offset = 0
        self.counters = EngineCounters()
        self.samples = SampleNumbers() if options.mode in ("coupled", "lenient") else None
        self.rule: AcceptanceRule = Coupled()
        if options.mode == "coupled":
            self.rule = Coupled(options.log_lenience)
        elif options.mode == "lenient":
            self.rule = Lenient(options.log_lenience)
        self.weights_version = 0
        self._served_since_change = False

    def weights_changed(self) -> None:
        """New weights are coming in; all calls between two requests are one change."""
        if self._served_since_change:
            self.weights_version += 1
            self._served_since_change = False

    def renew_noise(self, number: int) -> None:
        """Rollouts come from elsewhere, of an engine that may have counted requests alike.

        Lenient tests have other noise from now on than that which drew those; no other draw does.

        Args:
            number: Says which rollouts they are.
        """
        self._lenient_offset += number

    def admit(self, arrival: Arrival) -> Served | None:
        """What a request is served with; None where it is vLLM's to sample.

        Every worker of a replica gets the same requests in the same order, and so decides alike.
        """
        refused = why_not_ours(arrival.params, self._logprobs_mode, on_v2=self._on_v2)
        if arrival.prompt_ids is None or refused is not None:
            self.counters.num_passed_by += 1
            return None
        self.counters.num_served += 1
        self._served_since_change = True
        name, group = arrival.name, self.group_of(arrival)
        sample = self._sample(group, name, arrival.params)
        if self.samples is None or sample < 0:
            return self._unnamed(group, arrival.params)
        self.counters.num_named += 1
        if name is not None and not self.samples.begin(group, sample, self.weights_version):
            self.counters.num_repeated += 1
            return Served(ReuseRequest(self._fresh_key(group), Coupled()), group)
        request, tag = self._named(group, sample, name)
        return Served(request, group, sample, tag)

    def group_of(self, arrival: Arrival) -> bytes:
        """What requests for the same prompt have in common; see `Served.group`.

        Args:
            arrival: With a prompt of tokens.
        """
        name = arrival.name
        user_key = arrival.namespace if name is None else f"{arrival.namespace}/{name.prompt_id}"
        return prompt_key(arrival.prompt_ids, user_key)

    def info(self) -> dict[str, Any]:
        """Mode and counters."""
        return {"mode": self.options.mode, **asdict(self.counters)}

    def _unnamed(self, group: bytes, params: Any) -> Served:
        key = self._other_key(group, params)
        if params.temperature > 0:
            return Served(ReuseRequest(key, Coupled()), group)
        # The same weights give the same text again, and others much of it.
        draft = None if self.recall is None else self.recall(group, _GREEDY)
        if draft is None or not draft[0].size:
            return Served(ReuseRequest(key, Coupled()), group, tag=_GREEDY)
        self.counters.num_with_draft += 1
        return Served(ReuseRequest(key, Coupled(), draft[0]), group, tag=_GREEDY)

    def _sample(self, group: bytes, name: SampleName | None, params: Any) -> int:
        if params.temperature == 0:  # greedy: the same of every sample
            return -1
        if name is not None:
            return name.sample
        if params.seed is not None:  # which says what its noise is to be
            return -1
        if self.samples is not None and self.options.identity == "arrival":
            return self.samples.begin_next(group, self.weights_version)
        return -1

    def _named(
        self, group: bytes, sample: int, name: SampleName | None
    ) -> tuple[ReuseRequest, int]:
        """What a sample is served with, and the tag of its rollouts."""
        # Each replica counts the requests that come to it, from 0.
        seed, epoch = self.options.seed, self._replica
        if name is not None:
            epoch = name.epoch
            seed = seed if name.seed is None else name.seed
        if self.rule.fresh_noise:  # the uniforms of a lenient test must be new each time
            key = self._fresh_key(group, self._lenient_offset)
            tag = sample
        else:  # of other noise a rollout is no better a draft than anybody's
            tag = key = _key(seed, _NAMED, epoch, group, sample)
        draft = None if self.recall is None else self.recall(group, tag)
        if draft is None or not draft[0].size or np.isnan(draft[1]).any():
            return ReuseRequest(key, self.rule), tag
        self.counters.num_with_draft += 1
        return ReuseRequest(key, self.rule, draft[0], draft[1]), tag

    def _other_key(self, group: bytes, params: Any) -> int:
        """Of a request without a sample: by its own seed if it has one."""
        if params.seed is not None:
            return _key(int(params.seed), _SEEDED, 0, group, 0)
        return self._fresh_key(group)

    def _fresh_key(self, group: bytes, offset: int = 0) -> int:
        self._num_fresh += 1
        seed = (self._seed ^ self._salt) + offset
        return _key(seed, _FRESH, self._replica, group, self._num_fresh)


def _key(seed: int, kind: int, epoch: int, group: bytes, number: int) -> int:
    return int(noise_keys(seed, (kind << 56) + epoch, [group], [number])[0])
