"""Configs: every mistake gets one message that names key, expectation and value."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot, RandomCut, RandomReuse
from spec_rollout.config.sections import (
    ConfigError,
    DataConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
)
from spec_rollout.config.toml import dump_config, from_dict, load_config, to_dict

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINIMAL = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}}


def config_with(**sections) -> RunConfig:
    merged = {name: dict(values) for name, values in MINIMAL.items()}
    for name, values in sections.items():
        merged.setdefault(name, {}).update(values)
    return from_dict(merged)


def test_file_then_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[model]\npath = "m"\n[data]\npath = "d"\n[train]\nlr = 1\nbetas = [0.8, 0.9]\n'
    )
    config = load_config(
        path,
        [
            "train.lr=2e-5",
            "data.path=other rows.jsonl",
            'rollout.rule="lenient"',
            "rollout.log_lenience=inf",
            "train.grad_clip=none",
            "reward.functions=['a.b:c', 'exact_match']",
        ],
    )
    assert config.train.lr == 2e-5
    assert config.train.betas == (0.8, 0.9)
    assert config.data.path == "other rows.jsonl"
    assert config.rollout.acceptance() == Lenient(math.inf)
    assert config.train.grad_clip is None
    assert config.reward.functions == ("a.b:c", "exact_match")


def test_none_unsets_or_is_the_choice_of_that_name():
    required = ["model.path=m", "data.path=d"]
    config = load_config(
        None, [*required, "rollout.rule=none", "train.grad_clip=none", "data.answer_column=none"]
    )
    assert config.rollout.acceptance() == NoReuse()
    assert config.train.grad_clip is None
    assert config.data.answer_column is None


def test_overrides_alone_are_enough():
    config = load_config(None, ["model.path=m", "data.path=d"])
    assert config == RunConfig(ModelConfig("m"), DataConfig("d"))


def test_resolved_config_reads_back_equal(tmp_path):
    config = config_with(
        rollout={"rule": "lenient", "log_lenience": 0.25, "stop_tokens": ["a", 'quo"te']},
        train={"epochs": None, "max_steps": 3, "grad_clip": None},
    )
    # TOML has no None: a key left out must not come back as a default that is not None.
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_every_default_survives_the_round_trip(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config_with()))
    assert load_config(path) == config_with()
    assert to_dict(config_with())["train"]["weight_decay"] == 0.0


_BUDGET = {"lenience_budget": "kl_reused", "lenience_target": 0.01}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"learning_rate": 1}}, r"train\.learning_rate: unknown key"),
        (
            {"train": {"clip_hi": 1}},
            r"train\.clip_hi: unknown key; did you mean train\.clip_high\?",
        ),
        ({"train": {"temperature": 1.0}}, r"did you mean rollout\.temperature\?"),
        ({"rolout": {}}, r"rolout: unknown section; did you mean rollout\?"),
        ({"train": {"lr": "fast"}}, r"train\.lr: expected a number, got str 'fast'"),
        ({"train": {"epochs": 1.5}}, r"train\.epochs: expected an integer, got float 1\.5"),
        ({"train": {"epochs": True}}, r"train\.epochs: expected an integer, got bool True"),
        ({"train": {"minibatches": True}}, r"train\.minibatches: expected an integer, got bool"),
        (
            {"train": {"recompute_logprobs": 1}},
            r"recompute_logprobs: expected true or false, got int",
        ),
        ({"train": {"betas": [0.9]}}, r"train\.betas: expected a list of 2 \(a number each\)"),
        ({"train": {"betas": [0.9, "x"]}}, r"train\.betas\[1\]: expected a number, got str 'x'"),
        ({"train": {"betas": [0.9, 1.0]}}, r"train\.betas: expected 0 <= value < 1"),
        ({"train": {"lr": math.nan}}, r"train\.lr: expected a number, got NaN"),
        ({"train": {"minibatches": 0}}, r"train\.minibatches: expected at least 1, got 0"),
        ({"train": {"epochs": 0}}, r"train\.epochs: expected at least 1"),
        ({"train": {"algorithm": 1}}, r"train\.algorithm: expected a string, got int 1"),
        ({"rollout": {"rule": "coupld"}}, r"got 'coupld'; did you mean 'coupled'\?"),
        (
            {"rollout": {"rule": "one_hot", "log_lenience": 1}},
            r"rollout\.log_lenience: .*'one_hot'",
        ),
        (
            {"rollout": {"tolerance": "much"}},
            r"rollout\.tolerance: expected one of auto, got 'much'",
        ),
        (
            {"rollout": {"rule": "lenient", "log_lenience": math.inf, "min_target_prob": 0.1}},
            r"rollout\.min_target_prob: expected 0 with log_lenience=inf",
        ),
        ({"rollout": {"tolerance": -1}}, r"rollout\.tolerance: expected a finite number >= 0"),
        ({"rollout": {"tolerance": True}}, r"rollout\.tolerance: expected a number, got bool True"),
        (
            {"rollout": {"tolerance": 0.1, "rule": "one_hot"}},
            r"rollout\.tolerance: expected 0 with rule 'one_hot' .*got 0\.1",
        ),
        *(
            (
                {"rollout": {"rule": rule, key: value}},
                rf"rollout\.{key}: expected {default} with rule '{rule}' \(only {owner} has one\), got",
            )
            for key, value, default, owner in (
                ("scale", 2.0, "1", "lenient"),
                ("min_target_prob", 0.1, "0", "lenient"),
                ("reuse_prob", 1.5, "0.5", "random_reuse"),
            )
            for rule in ("coupled", "one_hot", "none")
        ),
        (
            {"rollout": {"rule": "random_reuse", "reuse_prob": 1.5}},
            r"rollout\.reuse_prob: expected 0 <= value <= 1, got 1\.5",
        ),
        (
            {"rollout": {"cache_ray": "jobs/one"}},
            r"rollout\.cache_ray: expected to be left out with cache_store = 'memory', got 'jobs/one'",
        ),
        (
            {"rollout": {"cache_store": "disk", "cache_actors": 2}},
            r"rollout\.cache_actors: expected to be left out with cache_store = 'disk', got 2",
        ),
        (
            {"rollout": {"cache_store": "ray"}},
            r"rollout\.cache_ray: expected namespace/name with cache_store = 'ray' .*got None",
        ),
        (
            {"rollout": {"cache_store": "ray", "cache_ray": "one"}},
            r"rollout\.cache_ray: expected namespace/name .*got 'one'",
        ),
        (
            {"rollout": {"cache_store": "ray", "cache_ray": "a/b", "cache_actors": 0}},
            r"rollout\.cache_actors: expected at least 1, got 0",
        ),
        (
            {"rollout": {"cache_store": "ray", "cache_ray": "a/b", "cache_folder": "rollouts"}},
            r"rollout\.cache_folder: expected an absolute path .*got 'rollouts'",
        ),
        ({"rollout": {"temperature": 0}}, r"rollout\.temperature: expected a positive number"),
        ({"rollout": {"max_tokens": 0}}, r"rollout\.max_tokens: expected >= 1, got 0"),
        (
            {"rollout": {"rule": "lenient", "scale": 0}},
            r"rollout\.scale: expected a positive finite",
        ),
        ({"rollout": {"top_p": 0.9}}, r"rollout\.top_p: expected train\.recompute_logprobs = true"),
        (
            {
                "rollout": {"top_p": 0.9, "rule": "lenient"},
                "train": {"recompute_logprobs": True, "correction": "truncated"},
            },
            r"train\.correction: expected 'none' with rollout\.top_k or .*got 'truncated'",
        ),
        ({"rollout": {"top_k": 5}}, r"rollout\.top_k: expected train\.recompute_logprobs = true"),
        ({"rollout": {"start_log_lenience": 1.0}}, r"rollout\.schedule_steps: expected at l"),
        ({"rollout": {"engine": "sglang"}}, r"expected one of transformers, vllm, got 'sglang'"),
        (
            {"rollout": {"engine": "vllm", "batch_invariant": True}},
            r"rollout\.batch_invariant: expected to be left out with the engine vllm, got True",
        ),
        ({"vllm": {"num_speculative_tokens": 0}}, r"vllm\.num_speculative_tokens: expected at l"),
        ({"vllm": {"kv_cache_gib": 0}}, r"vllm\.kv_cache_gib: expected a positive number, got 0"),
        (
            {
                "rollout": {"engine": "vllm", "drafting": True},
                "vllm": {"strategy": "two_pass"},
            },
            r"rollout\.drafting: expected false with vllm\.strategy = 'two_pass', .*, got True",
        ),
        ({"vllm": {"strategy": "two"}}, r"vllm\.strategy: expected one of inflight, two_pass"),
        ({"reward": {"weights": [1.0, 2.0]}}, r"reward\.weights: expected one per function \(1\)"),
        ({"reward": {"functions": "f"}}, r"reward\.functions: expected a list \(a string each\)"),
        (
            {"checkpoint": {"every_minutes": 0.0}},
            r"checkpoint\.every_minutes: expected a positive number, got 0\.0",
        ),
        (
            {"checkpoint": {"every_minutes": math.inf}},
            r"checkpoint\.every_minutes: expected a positive number, got inf",
        ),
        ({"eval": {"num_samples": 0}}, r"eval\.num_samples: expected at least 1, got 0"),
        ({"checkpoint": {"keep_last": 0}}, r"checkpoint\.keep_last: expected at least 1, got 0"),
        (
            {"train": {"kl_coef": 0.1, "skip_zero_advantage": True}},
            r"train\.skip_zero_advantage: expected false when train\.kl_coef > 0",
        ),
        (
            {"train": {"skip_zero_advantage": True}},
            r"expected false when train\.kl_coef > 0 \(published for grpo: 0\.0001; set it to 0\)",
        ),
        ({"train": {"gamma": 1.5}}, r"train\.gamma: expected 0 <= value <= 1, got 1\.5"),
        ({"train": {"gae_lambda": -1}}, r"train\.gae_lambda: expected 0 <= value <= 1"),
        ({"train": {"clip_value": 0}}, r"train\.clip_value: expected a positive finite number"),
        ({"train": {"value_coef": 0}}, r"train\.value_coef: expected a positive finite number"),
        ({"train": {"critic_lr": -1}}, r"train\.critic_lr: expected a finite number >= 0"),
        ({"train": {"refill_rounds": -1}}, r"train\.refill_rounds: expected at least 0, got -1"),
        ({"train": {"overlong_penalty": -1}}, r"train\.overlong_penalty: expected at least 0"),
        ({"train": {"correction": "clip"}}, r"train\.correction: expected one of none, clipped_be"),
        ({"train": {"correction_cap": 0}}, r"train\.correction_cap: expected a positive finite"),
        ({"rollout": {"max_age": 0}}, r"rollout\.max_age: expected at least 1, got 0"),
        (
            {"rollout": {"rule": "lenient", "fresh_share": 1.5}},
            r"rollout\.fresh_share: expected 0 <= value <= 1, got 1\.5",
        ),
        (
            {"rollout": {"rule": "coupled", "fresh_share": 0.5}},
            r"rollout\.fresh_share: expected 0 with the rule coupled .*, got 0\.5",
        ),
        *(
            ({"rollout": {"rule": "lenient", **given}}, message)
            for given, message in (
                ({"lenience_target": 0.1}, r"rollout\.lenience_target: expected to be left out"),
                ({"lenience_budget": "kl_reused"}, r"rollout\.lenience_target: expected 0 < value"),
                (
                    {"lenience_budget": "reused_fraction", "lenience_target": 1.0},
                    r"rollout\.lenience_target: expected 0 < value < 1 with .*, got 1\.0",
                ),
                (
                    {"lenience_budget": "new_per_prompt", "lenience_target": 8.0},
                    r"rollout\.lenience_target: expected 0 < value < 8 with .*, got 8\.0",
                ),
                (
                    {**_BUDGET, "rule": "coupled"},
                    r"rollout\.lenience_budget: expected the rule lenient and no schedule",
                ),
                (
                    {**_BUDGET, "start_log_lenience": 0.0, "schedule_steps": 5},
                    r"rollout\.lenience_budget: expected the rule lenient and no schedule",
                ),
                ({**_BUDGET, "lenience_gain": 0}, r"rollout\.lenience_gain: expected a positive"),
                (
                    {**_BUDGET, "lenience_range": [1, 1]},
                    r"rollout\.lenience_range: expected two finite numbers",
                ),
                (
                    {**_BUDGET, "log_lenience": 3.0},
                    r"rollout\.log_lenience: expected -1 to 2 \(rollout\.lenience_range\), got 3",
                ),
            )
        ),
        (
            {"train": {"overlong_buffer": 257}},
            r"train\.overlong_buffer: expected at most rollout\.max_tokens \(256\), got 257",
        ),
    ],
)
def test_mistakes_are_named(sections, message):
    with pytest.raises(ConfigError, match=message):
        config_with(**sections)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "expected section.key=value"),
        ("lr=1", "expected section.key=value"),
        ("train.lrr=none", r"train\.lrr: unknown key; did you mean train\.lr\?"),
        ("train.lr=[1]", r"train\.lr: expected a number, got list"),
        ("train.weight_decay=none", r"train\.weight_decay: expected a number, got str 'none'"),
    ],
)
def test_override_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.path=m", "data.path=d", override])


def test_required_key_missing():
    with pytest.raises(ConfigError, match=r"model\.path: expected a string, it is required"):
        from_dict({"data": {"path": "d"}})


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"found nothing at .*absent\.toml"):
        load_config(tmp_path / "absent.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[train\nlr = 1\n")
    with pytest.raises(ConfigError, match=r"bad\.toml' is not valid TOML: .*line 1"):
        load_config(bad)
    bad.write_text("train = 3\n")
    with pytest.raises(ConfigError, match="train: expected a section, got 3"):
        load_config(bad, ["model.path=m", "data.path=d"])


def test_rules_of_the_config():
    assert RolloutConfig(rule="lenient").acceptance() == Lenient(0.5)
    assert RolloutConfig(rule="lenient", log_lenience=0.0, scale=2.0).acceptance() == Lenient(
        0.0, 2.0
    )
    assert RolloutConfig(rule="coupled").acceptance() == Coupled(0.0)
    assert RolloutConfig(rule="one_hot").acceptance() == OneHot()
    assert RolloutConfig(rule="random_reuse", reuse_prob=0.25).acceptance() == RandomReuse(0.25)
    assert RolloutConfig(rule="random_cut").acceptance() == RandomCut()
    assert RolloutConfig(rule="none").acceptance() == NoReuse()
    moving = RolloutConfig(rule="lenient", start_log_lenience=0.0, schedule_steps=10).schedule()
    assert moving.at(5) == Lenient(0.25)
    assert moving.at(99) == Lenient(0.5)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda p: p.stem)
def test_examples_are_valid(path):
    load_config(path).rollout.schedule()


def test_the_examples_of_gsm8k_differ_in_their_rule_alone():
    lenient, coupled = (
        to_dict(load_config(EXAMPLES / f"gsm8k_{r}.toml")) for r in ("lenient", "coupled")
    )
    for config in (lenient, coupled):
        del config["log"]["run_dir"]
        for key in ("rule", "log_lenience", "refresh_epochs"):
            config["rollout"].pop(key, None)
    assert lenient == coupled


def test_there_are_examples():
    assert len(list(EXAMPLES.glob("*.toml"))) >= 3


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        config_with().train.lr = 1.0


@pytest.mark.parametrize(
    ("algorithm", "values"),
    [
        # arXiv 2509.23232, appendix A.1: lenience, learning rates, KL, clip range.
        ("grpo", (0.5, 5e-7, 1e-5, 1e-4, 0.2, 0.2)),
        ("ppo", (0.3, 5e-7, 1e-5, 0.0, 0.2, 0.2)),
        ("dapo", (0.15, 5e-7, 1e-5, 0.0, 0.2, 0.28)),
    ],
)
def test_what_is_left_out_is_published(algorithm, values):
    config = config_with(train={"algorithm": algorithm}, rollout={"rule": "lenient"})
    assert config.rollout.log_lenience is None
    settled = config.settled()
    train = settled.train
    assert values == (
        *(settled.rollout.log_lenience, train.lr, train.critic_lr),
        *(train.kl_coef, train.clip_low, train.clip_high),
    )
    assert settled.rollout.acceptance() == Lenient(values[0])
    assert settled.settled() == settled
    # Another algorithm has its own values, as long as they are not written out.
    changed = replace(config, train=replace(config.train, algorithm="dapo")).settled()
    assert changed.train.clip_high == 0.28


@pytest.mark.parametrize(
    ("limits", "start"), [([-1.0, 0.3], 0.3), ([1.0, 2.0], 1.0), ([-1.0, 2.0], 0.5)]
)
def test_a_budget_starts_within_its_range(limits, start):
    config = config_with(rollout={**_BUDGET, "rule": "lenient", "lenience_range": limits})
    assert config.settled().rollout.log_lenience == start


def test_what_is_given_is_kept():
    given = {"lr": 0.0, "kl_coef": 0.0, "clip_high": 0.5, "critic_lr": 1.0}
    config = config_with(train=given, rollout={"rule": "lenient", "log_lenience": 0.0})
    settled = config.settled()
    assert {key: getattr(settled.train, key) for key in given} == given
    assert settled.rollout.log_lenience == 0.0
    assert config_with(rollout={"rule": "coupled"}).settled().rollout.log_lenience is None
