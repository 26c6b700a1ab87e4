"""The variable SPEC_ROLLOUT, names of samples, and who they are: all without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spec_rollout.acceptance import Coupled, Lenient
from spec_rollout.cli import main
from spec_rollout.engines.vllm.compat import configured_options
from spec_rollout.engines.vllm.options import EngineOptions, first_chunk, section_of
from spec_rollout.engines.vllm.wire import ReuseRequest, SampleName, encode, parse
from spec_rollout.engines.vllm.worker.engine_side import Arrival, EngineSide
from spec_rollout.engines.vllm.worker.live import LiveRequests
from spec_rollout.engines.vllm.worker.sample_numbers import SampleNumbers


def test_the_variable_names_a_mode_or_holds_options() -> None:
    assert EngineOptions.from_environment({}) == EngineOptions(mode="off")
    assert EngineOptions.from_environment({"SPEC_ROLLOUT": " off "}).is_on is False
    assert EngineOptions.from_environment({"SPEC_ROLLOUT": "drafting"}).mode == "drafting"
    options = EngineOptions.from_text('{"mode": "lenient", "log_lenience": 0.5, "seed": 3}')
    assert (options.mode, options.log_lenience, options.seed) == ("lenient", 0.5, 3)
    assert EngineOptions.from_text('{"history_bytes": 2097152}').mode == "drafting"
    assert EngineOptions(mode="drafting").max_proposal == 15
    assert EngineOptions(mode="coupled").max_proposal == 31
    assert EngineOptions(mode="coupled", num_speculative_tokens=7).max_proposal == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draftin", "SPEC_ROLLOUT: mode: expected one of off, drafting, coupled, lenient, got"),
        ("{", "SPEC_ROLLOUT: expected a mode .* or a JSON object"),
        ('{"mode": "coupled", "lenience": 1}', "SPEC_ROLLOUT: lenience: expected one of mode,"),
        ('{"identity": "guess"}', "identity: expected one of request, arrival, got 'guess'"),
        ('{"history_bytes": 1}', "history_bytes: expected an integer from 1048576"),
        ('{"history_bytes": true}', "history_bytes: expected an integer"),
        ('{"num_speculative_tokens": -1}', "num_speculative_tokens: expected an integer from 0"),
        ('{"log_lenience": NaN}', "log_lenience: expected a finite number"),
        ('{"log_lenience": "x"}', "log_lenience: expected a finite number"),
        ('{"lagged_tokens": 16}', "lagged_tokens: expected an integer from 0 to 15, got 16"),
        ('{"log_seconds": -1}', "log_seconds: expected a finite number >= 0"),
        ('{"share": "folder"}', "share: expected the absolute path of a folder, got 'folder'"),
        ('{"share": 1}', "share: expected the absolute path"),
        (
            '{"mode": "coupled", "identity": "arrival", "share": "/tmp/x"}',
            "share: expected identity .request. with it, got .arrival.",
        ),
        ('{"require_lossless": 1}', "require_lossless: expected true or false, got 1"),
        (
            '{"mode": "lenient", "require_lossless": true}',
            "require_lossless: expected a lossless mode .* got lenient",
        ),
        (
            '{"mode": "coupled", "log_lenience": 0.1, "require_lossless": true}',
            "require_lossless: expected a lossless mode",
        ),
    ],
)
def test_wrong_options_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions.from_text(text)


def test_options_in_the_engines_config_mean_what_they_mean_in_the_variable() -> None:
    def of(section: dict[str, Any]) -> EngineOptions | None:
        return configured_options({"spec_rollout": section})

    assert of({"history_bytes": 1 << 32}) == EngineOptions("drafting", history_bytes=1 << 32)
    assert of({"mode": "coupled", "seed": 3}) == EngineOptions("coupled", seed=3)
    assert of({"mode": "off", "seed": 3}) == EngineOptions("off", seed=3)
    # What `engine_args()` writes says nothing of it: then the variable does.
    assert of({"first_chunk": 8, "model_runner": "v2"}) is None
    assert of({}) is configured_options(None) is None
    with pytest.raises(ValueError, match=r"^additional_config\.spec_rollout: lenience: expected"):
        of({"lenience": 1})


def test_text_in_the_engines_config_is_read_as_in_the_variable() -> None:
    def of(section: Any) -> EngineOptions | None:
        return configured_options({"spec_rollout": section, "other": 1})

    assert of("coupled") == EngineOptions("coupled")
    assert of('{"seed": 3}') == EngineOptions("drafting", seed=3)
    assert of("off") == EngineOptions("off")
    assert of(" ") is None  # nothing is said: the variable counts
    assert first_chunk({"spec_rollout": "drafting"}) == 16
    with pytest.raises(
        ValueError, match=r"^additional_config\.spec_rollout: mode: expected one of"
    ):
        of("draughting")


@pytest.mark.parametrize("section", [None, 7, ["drafting"], True])
def test_a_section_that_is_no_mapping_is_named(section: Any) -> None:
    for read in (configured_options, first_chunk):
        with pytest.raises(
            ValueError, match=r"^additional_config\.spec_rollout: expected a mapping"
        ):
            read({"spec_rollout": section})


def test_what_has_no_section() -> None:
    assert section_of(None) == section_of({}) == section_of(SimpleNamespace()) == {}
    with pytest.raises(ValueError, match=r"^additional_config: expected a mapping, got 'drafting'"):
        section_of("drafting")
    section = {"seed": 3}
    section_of({"spec_rollout": section})["seed"] = 4
    assert section == {"seed": 3}


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions("off"),
        EngineOptions("off", seed=3),
        EngineOptions("drafting"),
        EngineOptions("lenient", log_lenience=0.5),
    ],
    ids=lambda options: options.mode,
)
def test_arguments_of_an_engine_give_the_options_back(options: EngineOptions) -> None:
    assert configured_options(options.vllm_arguments("v2")["additional_config"]) == options


def test_vllm_args_prints_what_the_variable_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-args", '{"mode": "coupled", "identity": "arrival"}', "--json"]) == 0
    arguments = json.loads(capsys.readouterr().out)
    assert arguments["speculative_config"]["num_speculative_tokens"] == 31
    options = {"mode": "coupled", "identity": "arrival"}
    assert arguments["additional_config"] == {"spec_rollout": options}
    assert main(["vllm-args"]) == 0
    flags = capsys.readouterr().out.split(" --")
    assert flags[0].startswith("--speculative-config '{")
    assert flags[1] == 'additional-config \'{"spec_rollout": {"mode": "drafting"}}\'\n'
    capsys.readouterr()
    assert main(["vllm-args", "--json", "--model-runner", "v2"]) == 0
    on_v2 = json.loads(capsys.readouterr().out)
    assert on_v2["speculative_config"]["method"] == "ngram_gpu"
    assert on_v2["additional_config"] == {
        "spec_rollout": {"mode": "drafting", "model_runner": "v2"}
    }
    assert main(["vllm-args", "off"]) == 2
    assert "expected drafting, coupled or lenient, got off" in capsys.readouterr().err


def test_a_sample_is_named_in_any_form_that_json_has() -> None:
    name = SampleName(3, epoch=1, prompt_id="7", seed=5)
    values = {"sample": 3, "epoch": 1, "prompt_id": 7, "seed": 5}
    assert parse(values) == parse(json.dumps(values)) == name
    assert parse(3) == SampleName(3)
    assert isinstance(parse(encode(ReuseRequest(1, Coupled()))), ReuseRequest)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected the key sample, got"),
        ({"sample": -1}, "sample: expected an integer from 0"),
        ({"sample": "1"}, "sample: expected an integer"),
        ({"sample": 1, "row": 2}, "expected keys among epoch, prompt_id, sample, seed, got row"),
        ({"sample": 1, "prompt_id": [1]}, "prompt_id: expected text"),
        ('{"sample": }', "expected JSON, got"),
        (True, "sample: expected an integer"),
        ([1], "expected bytes, got list"),
    ],
)
def test_wrong_names_are_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"spec_rollout: .*{message}"):
        parse(data)


def test_a_sample_is_asked_for_once_between_weight_changes() -> None:
    numbers = SampleNumbers()
    assert numbers.begin(b"p", 0, 0)
    assert not numbers.begin(b"p", 0, 0)  # still running
    numbers.end(b"p", 0)
    assert not numbers.begin(b"p", 0, 0)  # asked for already
    assert numbers.begin(b"p", 1, 0)
    assert numbers.begin(b"q", 0, 0)
    assert numbers.begin(b"p", 0, 1)
    assert not numbers.begin(b"p", 1, 1)  # runs since before the change


def test_the_kth_request_since_the_weights_changed_is_sample_k() -> None:
    numbers = SampleNumbers()
    assert [numbers.begin_next(b"p", 0) for _ in range(3)] == [0, 1, 2]
    assert numbers.begin_next(b"q", 0) == 0
    numbers.end(b"p", 0)
    # 1 and 2 run on, and keep their numbers.
    assert [numbers.begin_next(b"p", 1) for _ in range(3)] == [0, 3, 4]
    # Nor is a number given twice where others are asked for by name.
    assert not numbers.begin(b"p", 3, 1)
    assert numbers.begin(b"p", 5, 1)
    assert numbers.begin_next(b"p", 1) == 6


def test_prompts_used_longest_ago_are_forgotten_but_not_while_they_run() -> None:
    numbers = SampleNumbers(max_bytes=2000)
    for i in range(5):
        numbers.begin(bytes([i]), 0, 0)
        if i:
            numbers.end(bytes([i]), 0)
    assert len(numbers) <= 4
    assert numbers.num_bytes <= 2000
    assert not numbers.begin(bytes([0]), 0, 0)
    assert not numbers.begin(bytes([4]), 0, 0)
    assert numbers.begin(bytes([1]), 0, 0)


def test_what_is_known_of_one_prompt_is_bounded_too() -> None:
    """A server whose weights stay, which is sent the same prompt for ever."""
    numbers = SampleNumbers(max_bytes=400_000)
    numbers.begin(b"p", 0, 0)  # runs on
    for sample in range(1, 10_000):
        assert numbers.begin(b"p", sample, 0)
        numbers.end(b"p", sample)
        assert numbers.num_bytes <= 400_000
    assert not numbers.begin(b"p", 0, 0)
    assert not numbers.begin(b"p", 9_999, 0)  # of the latest, which are most of the room
    assert not numbers.begin(b"p", 7_500, 0)
    assert numbers.begin(b"p", 1, 0)
    # Of requests that are counted only their number is known.
    for k in range(1000):
        assert numbers.begin_next(b"q", 0) == k
        numbers.end(b"q", k)
    assert numbers._prompts[b"q"].named == {}
    assert numbers._prompts[b"q"].running is None


def test_of_older_weights_only_what_runs_is_remembered() -> None:
    numbers = SampleNumbers()
    for prompt in (b"a", b"b", b"c"):
        assert numbers.begin(prompt, 0, 0)
        assert numbers.begin(prompt, 1, 0)
    for sample in (0, 1):
        numbers.end(b"a", sample)
    numbers.end(b"b", 0)
    numbers.end(b"b", 1)
    assert len(numbers) == 3
    assert numbers.begin(b"d", 0, 1)
    assert len(numbers) == 2
    assert not numbers.begin(b"c", 0, 1)  # runs on
    assert numbers.begin(b"a", 0, 1)
    numbers.end(b"c", 0)
    assert numbers.begin(b"c", 0, 1)
    assert not numbers.begin(b"c", 1, 1)
    assert numbers.begin_next(b"c", 1) == 2


def _params(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"temperature": 1.0, "seed": None, "logprobs": None, **values})


def _arrival(prompt: list[int] | None = None, name: SampleName | None = None, **values: Any):
    namespace = values.pop("namespace", "")
    return Arrival([1, 2] if prompt is None else prompt, _params(**values), namespace, name)


def _side(mode: str, recall: Any = None, **options: Any) -> EngineSide:
    return EngineSide(EngineOptions(mode=mode, **options), engine_seed=0, replica=0, recall=recall)


def test_unnamed_requests_draw_fresh_noise_and_share_their_prompts_history() -> None:
    side = _side("drafting")
    a, b, other = (side.admit(_arrival(p)) for p in ([1, 2], [1, 2], [1, 3]))
    assert a.group == b.group != other.group
    assert len({x.request.key for x in (a, b, other)}) == 3
    assert a.sample == -1
    assert a.request.rule == Coupled()
    # Every worker of a replica decides alike; another replica draws other noise.
    assert _side("drafting").admit(_arrival()).request.key == a.request.key
    replica = EngineSide(EngineOptions(mode="drafting"), engine_seed=0, replica=1)
    assert replica.admit(_arrival()).request.key != a.request.key


def test_engines_without_a_seed_draw_the_samples_of_a_group_with_noise_of_their_own() -> None:
    """Two servers with vLLM's default seed, which are sent the samples of a prompt in turn."""
    options = EngineOptions(mode="drafting")
    sides = [EngineSide(options, engine_seed=0, replica=0, salt=salt) for salt in (3, 4)]
    assert len({sides[i % 2].admit(_arrival()).request.key for i in range(8)}) == 8
    # What says its noise itself draws it anywhere.
    for values in ({"seed": 5}, {"seed": 6}):
        assert len({side.admit(_arrival(**values)).request.key for side in sides}) == 1


def test_greedy_requests_follow_the_last_greedy_rollout() -> None:
    past = np.array([4, 5], np.int32), np.array([0.0, np.nan], np.float32)
    asked: list[int] = []
    side = _side("drafting", lambda group, tag: asked.append(tag) or past)
    greedy = side.admit(_arrival(temperature=0.0))
    assert greedy.request.draft_ids.tolist() == [4, 5]
    assert greedy.request.draft_logprobs is None
    assert asked == [greedy.tag]
    assert side.admit(_arrival()).tag is None


def test_a_seed_decides_the_noise() -> None:
    side = _side("drafting")
    a, b, c = (side.admit(_arrival(seed=seed)).request.key for seed in (5, 5, 6))
    assert a == b != c


def test_adapters_salts_and_images_keep_histories_apart() -> None:
    side = _side("drafting")
    groups = {side.admit(_arrival(namespace=n)).group for n in ("", "lora 1", "salt")}
    assert len(groups) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"structured_outputs": object()},
        {"bad_words": ["x"]},
        {"logits_processors": [1]},
        {"thinking_token_budget": 0},
    ],
)
def test_what_the_sampler_cannot_draw_is_passed_by_and_counted(values: dict[str, Any]) -> None:
    side = _side("drafting")
    assert side.admit(_arrival(**values)) is None
    assert side.admit(Arrival(None, _params(), "", None)) is None  # embeddings
    assert (side.counters.num_passed_by, side.counters.num_served) == (2, 0)


def test_logits_in_place_of_log_probs_are_vllms_to_return() -> None:
    options = EngineOptions(mode="drafting")
    side = EngineSide(options, engine_seed=0, replica=0, logprobs_mode="raw_logits")
    assert side.admit(_arrival(logprobs=1)) is None
    assert side.admit(_arrival()) is not None


def test_coupled_samples_keep_their_noise_and_follow_their_last_rollout() -> None:
    past = np.array([4, 5], np.int32), np.array([-0.5, -1.0], np.float32)
    key = _side("coupled").admit(_arrival(name=SampleName(3))).request.key
    side = _side("coupled", lambda group, tag: past if tag == key else None)
    first = side.admit(_arrival(name=SampleName(3)))
    assert first.tag == first.request.key == key
    assert first.sample == 3
    assert first.request.draft_ids.tolist() == [4, 5]
    again = side.admit(_arrival(name=SampleName(3)))
    assert again.sample == -1
    assert again.request.key != first.request.key
    assert again.request.draft_ids.size == 0
    assert side.counters.num_repeated == 1
    assert side.admit(_arrival(name=SampleName(4))).request.draft_ids.size == 0
    side.samples.end(first.group, 3)
    side.weights_changed()
    side.weights_changed()  # one change that comes in pieces
    assert side.weights_version == 1
    assert side.admit(_arrival(name=SampleName(3))).request.key == first.request.key
    assert side.admit(_arrival(name=SampleName(3, epoch=1))).request.key != first.request.key


def test_lenient_samples_draw_new_noise_each_time() -> None:
    past = np.array([4, 5], np.int32), np.array([-0.5, -1.0], np.float32)
    side = _side("lenient", lambda group, tag: past, log_lenience=0.5)
    first = side.admit(_arrival(name=SampleName(0)))
    assert first.request.rule == Lenient(0.5)
    assert first.request.draft_logprobs.tolist() == [-0.5, -1.0]
    side.samples.end(first.group, 0)
    side.weights_changed()
    assert side.admit(_arrival(name=SampleName(0))).request.key != first.request.key


class _History:
    """As much of `EngineHistory` as is asked for what others drew."""

    def __init__(self, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.imported: list[str] = []

    def import_from(self, path: str) -> None:
        self.imported.append(path)


def _live(mode: str, **history: Any) -> LiveRequests:
    given: Any = _History(**history)
    nothing: Any = None
    return LiveRequests(
        _side(mode), given, first_chunk=1, metrics=nothing, write_log=lambda _: None
    )


def _key_of(live: LiveRequests) -> int:
    served = live.side.admit(_arrival(name=SampleName(0)))
    assert served is not None
    return served.request.key


def test_lenient_tests_what_others_drew_with_noise_of_its_own(tmp_path: Path) -> None:
    """An engine of the same seed that counts requests alike: one that exported its history, or
    shares it."""
    for mode, num_noises in (("lenient", 4), ("coupled", 1), ("drafting", 1)):
        lives = [_live(mode) for _ in range(4)]
        for live, name in zip(lives[1:], ("a", "a", "b"), strict=True):
            (tmp_path / name).write_text(name)
            live.import_from(str(tmp_path / name))
        lives[2].import_from(str(tmp_path / "a"))  # once more: these may be its own
        assert len({_key_of(live) for live in lives}) == num_noises
        shared = {_key_of(_live(mode, is_shared=True)) for _ in range(3)}
        assert len(shared) == (3 if mode == "lenient" else 1)


def test_log_probs_that_are_not_known_make_no_draft() -> None:
    past = np.array([4, 5], np.int32), np.array([-0.5, np.nan], np.float32)
    side = _side("lenient", lambda group, tag: past)
    assert side.admit(_arrival(name=SampleName(0))).request.draft_ids.size == 0


def test_arrivals_are_counted_where_that_was_asked_for() -> None:
    side = _side("coupled", identity="arrival")
    assert [side.admit(_arrival()).sample for _ in range(3)] == [0, 1, 2]
    assert [_side("coupled").admit(_arrival()).sample for _ in range(2)] == [-1, -1]
    named = _side("drafting").admit(_arrival(name=SampleName(2)))
    assert named.sample == -1  # the mode knows no samples


def test_replicas_that_count_the_requests_of_a_group_share_no_noise() -> None:
    options = EngineOptions(mode="coupled", identity="arrival")

    def drawn(replica: int) -> list[int]:
        side = EngineSide(options, engine_seed=0, replica=replica)
        return [side.admit(_arrival()).request.key for _ in range(3)]

    assert len({*drawn(0), *drawn(1)}) == 6
    assert drawn(1) == drawn(1)
    # A name says the same to every replica.
    sides = [EngineSide(options, engine_seed=0, replica=replica) for replica in range(2)]
    assert len({side.admit(_arrival(name=SampleName(1))).request.key for side in sides}) == 1


def test_seeded_and_greedy_arrivals_are_nobodys_sample() -> None:
    side = _side("coupled", identity="arrival")
    first, second = (side.admit(_arrival(seed=5)) for _ in range(2))
    assert first.request.key == second.request.key
    assert (first.sample, first.tag) == (-1, None)
    assert side.admit(_arrival(temperature=0.0)).sample == -1
    assert side.admit(_arrival(temperature=0.0, name=SampleName(1))).sample == -1
    assert side.admit(_arrival()).sample == 0  # the first that is counted
