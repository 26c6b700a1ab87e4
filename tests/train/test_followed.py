"""What samples.jsonl says of a draft is how it was tested."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from spec_rollout.loading.order import PromptOrder
from spec_rollout.train.followed import followed_places, followed_rows
from spec_rollout.train.trainer import run


def samples_of(config) -> list[dict]:
    run(config)
    text = (Path(config.log.run_dir) / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_same_prompts_are_followed_in_every_epoch() -> None:
    order = PromptOrder(7, 3, seed=1)  # steps of 3, 3 and 1
    chosen = followed_rows(order, 2)
    rows = [
        [
            row
            for step in range(3 * epoch, 3 * epoch + 3)
            for row in followed_places(order, step, chosen).values()
        ]
        for epoch in range(4)
    ]
    assert set(rows[0]) == chosen
    assert len(set(rows[0])) == 5
    assert all(sorted(epoch) == sorted(rows[0]) for epoch in rows)
    for step in range(12):
        places = followed_places(order, step, chosen)
        assert [order.rows_of(step)[place] for place in places] == list(places.values())
    assert followed_places(order, 0, followed_rows(order, 0)) == {}


def test_so_many_rollouts_of_a_step_are_written_as_the_config_says(make_config) -> None:
    config = make_config(
        train={"epochs": 1}, eval={"num_train_prompts": 0}, log={"samples_per_step": 1}
    )
    assert [sample["step"] for sample in samples_of(config)] == [1, 2]


@pytest.mark.parametrize("rule", [{"rule": "lenient", "log_lenience": -0.3}, {"rule": "one_hot"}])
def test_a_token_is_kept_while_its_draw_is_within_its_threshold(make_config, rule) -> None:
    samples = samples_of(make_config(rollout=rule, train={"epochs": 4, "lr": 1e-2}))
    by_row: dict[int, list[dict]] = {}
    cut = 0
    for sample in samples:
        before = by_row.setdefault(sample["row"], [])
        draft = sample["draft"]
        assert (draft is None) == (not before)
        if draft is not None:
            kept = sample["accepted_tokens"]
            assert draft["tokens"] == before[-1]["tokens"]
            assert draft["tokens"][:kept] == sample["tokens"][:kept]
            # one_hot needs none, so the cache keeps none.
            expected = before[-1]["logprobs"] if rule["rule"] == "lenient" else None
            assert draft["old_logprobs"] == expected
            assert draft["new_logprobs"][:kept] == sample["logprobs"][:kept]
            within = [u <= h for u, h in zip(draft["draws"], draft["thresholds"], strict=True)]
            assert all(within[:kept])
            if kept < len(within):
                assert not within[kept]
                cut += 1
            olds = expected or [0.3] * len(within)
            for old, new, threshold in zip(
                olds, draft["new_logprobs"], draft["thresholds"], strict=True
            ):
                log = new - old + (0.3 if expected is None else -0.3)
                assert threshold == pytest.approx(min(1.0, math.exp(log)), abs=2e-3)
        before.append(sample)
    assert cut >= 4


def test_a_rule_without_draws_has_none(make_config) -> None:
    coupled = make_config(rollout={"rule": "coupled"}, train={"lr": 1e-2})
    drafts = [sample["draft"] for sample in samples_of(coupled) if sample["draft"]]
    assert drafts
    assert all(draft["draws"] is None and draft["thresholds"] is None for draft in drafts)
    assert all(None not in draft["new_logprobs"] for draft in drafts)


def test_behind_the_first_rejection_filtered_log_probs_are_not_known(make_config) -> None:
    config = make_config(
        rollout={"rule": "lenient", "log_lenience": 0.0, "top_k": 5},
        train={"lr": 1e-2, "recompute_logprobs": True},
    )
    for sample in samples_of(config):
        if sample["draft"] is not None:
            new, kept = sample["draft"]["new_logprobs"], sample["accepted_tokens"]
            assert new[:kept] == sample["logprobs"][:kept]
            assert set(new[kept:]) <= {None}
