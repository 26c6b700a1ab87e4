"""What a request carries into the engine: `SamplingParams.extra_args["spec_rollout"]`.

- Bytes (`ReuseRequest`): key, rule and draft. Little-endian: a fixed header (`_HEADER`), the
  draft's token ids as int32, then, if flagged, its log-probs as float32.
- A mapping (`SampleName`): which sample of its prompt the request is. The draft is what the engine
  remembers of it (`options.EngineOptions`).

Nothing in it depends on vLLM, so that clients need not have it installed.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, OneHot, RuleKind
from spec_rollout.checks import integer, of_kind

EXTRA_ARG = "spec_rollout"
# Added by the engine itself: the request's `cache_salt`, which vLLM does not hand to workers.
SALT_ARG = "spec_rollout_salt"
VERSION = 1

_MAGIC = b"sr"
# magic, version, flags, rule kind, first position, collect id, key, log_lenience, scale,
# min_target_prob, draft length
_HEADER = struct.Struct("<2sBBB3xIiqdddI")
_HAS_LOGPROBS = 1
_KNOWN_FLAGS = _HAS_LOGPROBS
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ReuseRequest:
    """Reuse parameters of one request.

    Attributes:
        key: Noise key (`spec_rollout.keys.noise_keys`); every token of the response is drawn with
            its noise.
        rule: Acceptance rule; the baselines (`RandomReuse`, ...) travel as the token test they come
            down to.
        draft_ids: The cached response to verify; empty for plain keyed sampling.
            [num_draft_tokens], int32.
        draft_logprobs: Their log-probs under the policy that drew them; None if neither the rule
            reads them nor a drafter that is given the draft. [num_draft_tokens], float32.
        first_position: Response position of the first token of this request, where the start of the
            response is already part of the prompt.
        collect_id: >= 0: the worker keeps the log-probs and the accepted length under this number
            until they are fetched, if a running call of `VLLMEngine` announced it; -1: it does not.
    """

    key: int
    rule: AcceptanceRule
    draft_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    draft_logprobs: np.ndarray | None = None
    first_position: int = 0
    collect_id: int = -1

    def __post_init__(self) -> None:
        ids = of_kind("draft_ids", self.draft_ids, np.ndarray, "an array of int32")
        of_kind("rule", self.rule, AcceptanceRule, "an acceptance rule such as Lenient(0.0)")
        if ids.ndim != 1 or ids.dtype != np.int32:
            raise ValueError(
                f"draft_ids: expected int32 of shape [num_draft_tokens], got {ids.dtype} "
                f"{list(ids.shape)}"
            )
        if ids.size and int(ids.min()) < 0:
            raise ValueError(f"draft_ids: expected token ids >= 0, got {int(ids.min())}")
        key = integer("key", self.key)
        first_position = integer("first_position", self.first_position)
        if not 0 <= first_position <= _MAX_ID:
            raise ValueError(f"first_position: expected 0 to 2**31 - 1, got {self.first_position}")
        collect_id = integer("collect_id", self.collect_id)
        if not -1 <= collect_id <= _MAX_ID:
            raise ValueError(f"collect_id: expected -1 to 2**31 - 1, got {self.collect_id}")
        # Python's own numbers, whatever library they came from.
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "first_position", first_position)
        object.__setattr__(self, "collect_id", collect_id)
        logprobs = self.draft_logprobs
        if logprobs is None:
            if ids.size and self.rule.needs_draft_logprobs:
                raise ValueError(f"draft_logprobs: expected an array for {self.rule}, got None")
            return
        of_kind("draft_logprobs", logprobs, np.ndarray, "an array of float32 or None")
        if logprobs.shape != ids.shape or logprobs.dtype != np.float32:
            raise ValueError(
                f"draft_logprobs: expected float32 of shape {list(ids.shape)}, "
                f"got {logprobs.dtype} {list(logprobs.shape)}"
            )
        if np.isnan(logprobs).any():
            raise ValueError("draft_logprobs: expected numbers, got NaN")


@dataclass(frozen=True, slots=True)
class SampleName:
    """Which rollout a request asks for, to an engine that remembers them.

    Attributes:
        sample: Index of the rollout within its prompt's group.
        epoch: Noise epoch: `Coupled` draws the same noise while it stays the same.
        prompt_id: Keeps equal prompts apart that are not the same to the trainer.
        seed: Of the noise; None is the engine's.
    """

    sample: int
    epoch: int = 0
    prompt_id: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_integer("sample", self.sample, 0, _MAX_ID)
        _check_integer("epoch", self.epoch, 0, _MAX_ID)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        if not isinstance(self.prompt_id, str):
            raise ValueError(f"prompt_id: expected text, got {self.prompt_id!r}")
        try:  # the worker, where an error would end the engine, hashes it
            self.prompt_id.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt_id: expected text of UTF-8, got {error}") from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SampleName:
        """The name in `extra_args["spec_rollout"]`, as JSON gives it.

        Raises:
            ValueError: saying what is wrong with it.
        """
        known = {"sample", "epoch", "prompt_id", "seed"}
        if unknown := sorted(set(map(str, values)) - known):
            raise ValueError(
                f"{EXTRA_ARG}: expected keys among {', '.join(sorted(known))}, got {unknown[0]}"
            )
        if "sample" not in values:
            raise ValueError(f"{EXTRA_ARG}: expected the key sample, got {sorted(values)}")
        fields = dict(values)
        if isinstance(fields.get("prompt_id"), int) and not isinstance(fields["prompt_id"], bool):
            fields["prompt_id"] = str(fields["prompt_id"])
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{EXTRA_ARG}: {error}") from None


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r}")


def encode(request: ReuseRequest) -> bytes:
    """The bytes of a request.

    Raises:
        ValueError: if it is none.
    """
    of_kind("request", request, ReuseRequest, "a ReuseRequest")
    kind, log_lenience, scale, min_target_prob = request.rule.kernel_params
    logprobs = request.draft_logprobs
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        0 if logprobs is None else _HAS_LOGPROBS,
        kind,
        request.first_position,
        request.collect_id,
        request.key,
        log_lenience,
        scale,
        min_target_prob,
        request.draft_ids.size,
    )
    body = request.draft_ids.astype("<i4", copy=False).tobytes()
    if logprobs is not None:
        body += logprobs.astype("<f4", copy=False).tobytes()
    return header + body


def extra_args(request: ReuseRequest) -> dict[str, Any]:
    """`SamplingParams(extra_args=...)` of a request.

    For HTTP (JSON), base64 of the bytes is accepted too.
    """
    return {EXTRA_ARG: encode(request)}


def decode(data: Any) -> ReuseRequest:
    """The request in `extra_args["spec_rollout"]`: bytes, or a base64 string of them.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ValueError(
                f"{EXTRA_ARG}: expected bytes or base64, got a string that is neither ({error})"
            ) from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ValueError(f"{EXTRA_ARG}: expected bytes, got {type(data).__name__}")
    data = bytes(data)
    if len(data) < _HEADER.size or data[:2] != _MAGIC:
        raise ValueError(
            f"{EXTRA_ARG}: expected a message made by spec_rollout.engines.vllm.wire.encode, "
            f"got {len(data)} bytes that are none"
        )
    if data[2] != VERSION:
        raise ValueError(
            f"{EXTRA_ARG}: expected format version {VERSION}, got {data[2]}; "
            "client and engine need the same version of spec_rollout"
        )
    (_, _, flags, kind, first_position, collect_id, key, *rule_values, num_tokens) = (
        _HEADER.unpack_from(data)
    )
    if flags & ~_KNOWN_FLAGS:
        raise ValueError(f"{EXTRA_ARG}: expected flags within {_KNOWN_FLAGS}, got {flags}")
    size = _HEADER.size + 4 * num_tokens * (2 if flags & _HAS_LOGPROBS else 1)
    if len(data) != size:
        raise ValueError(
            f"{EXTRA_ARG}: expected {size} bytes for {num_tokens} draft tokens, got {len(data)}"
        )
    ids = np.frombuffer(data, "<i4", num_tokens, _HEADER.size).astype(np.int32, copy=False)
    logprobs = None
    if flags & _HAS_LOGPROBS:
        logprobs = np.frombuffer(data, "<f4", num_tokens, _HEADER.size + 4 * num_tokens)
        logprobs = logprobs.astype(np.float32, copy=False)
    try:
        return ReuseRequest(
            key=key,
            rule=_rule(kind, *rule_values),
            draft_ids=ids,
            draft_logprobs=logprobs,
            first_position=first_position,
            collect_id=collect_id,
        )
    except ValueError as error:
        raise ValueError(f"{EXTRA_ARG}: {error}") from error


def parse(data: Any) -> ReuseRequest | SampleName:
    """What `extra_args["spec_rollout"]` says, in any of its forms.

    Bytes and base64 of them are a `ReuseRequest`. A mapping, JSON text of one (HTTP lets no mapping
    through) and a plain number, the sample's index, are a `SampleName`.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if isinstance(data, str) and data.lstrip().startswith("{"):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{EXTRA_ARG}: expected JSON, got {data[:80]!r} ({error})") from None
    if isinstance(data, Mapping):
        return SampleName.from_mapping(data)
    if isinstance(data, int):
        return SampleName.from_mapping({"sample": data})
    return decode(data)


def _rule(kind: int, log_lenience: float, scale: float, min_target_prob: float) -> AcceptanceRule:
    if kind == RuleKind.LENIENT:
        return Lenient(log_lenience, scale, min_target_prob)
    if kind == RuleKind.COUPLED:
        return Coupled(log_lenience)
    if kind == RuleKind.ONE_HOT:
        if log_lenience != 0.0 and not math.isnan(log_lenience):
            raise ValueError(f"log_lenience: expected 0 for OneHot, got {log_lenience}")
        return OneHot()
    raise ValueError(f"rule kind: expected 0, 1 or 2, got {kind}")
