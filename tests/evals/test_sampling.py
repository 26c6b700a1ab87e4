"""From rollouts to rewards: the text that is judged, and figures of each function."""

from __future__ import annotations

import math

import pytest
import torch
from byte_tokenizer import END_THINK, EOS, IM_END, THINK, byte_tokenizer

from spec_rollout.config.sections import RewardConfig
from spec_rollout.evals.sampling import decode_responses, score
from spec_rollout.loading.data import load_prompts
from spec_rollout.packed import cu_lens_from
from spec_rollout.rewards import Rewards
from spec_rollout.types import FinishReason, Rollouts

HERE = __name__
FOUR, SPACE = ord("4"), ord(" ")
# Responses, and whether their last token is a stop token.
THOUGHT = [THINK, FOUR, END_THINK, SPACE, FOUR, EOS], True
CUT_OFF = [THINK, FOUR, END_THINK], False
STOPPED_IN_CHAT = [FOUR, IM_END], True
STOPPED_BY_TEXT = [FOUR, ord("\n")], True
EMPTY = [EOS], True


def rollouts_of(*responses: tuple[list[int], bool]) -> Rollouts:
    lens = torch.tensor([len(ids) for ids, _ in responses])
    total = int(lens.sum())
    finish = [FinishReason.STOP if stopped else FinishReason.LENGTH for _, stopped in responses]
    return Rollouts(
        prompt_ids=torch.zeros(len(responses), dtype=torch.int32),
        cu_prompt_lens=torch.arange(len(responses) + 1),
        response_ids=torch.tensor([i for ids, _ in responses for i in ids], dtype=torch.int32),
        cu_response_lens=cu_lens_from(lens),
        logprobs=torch.zeros(total),
        accepted_lens=torch.zeros(len(responses), dtype=torch.int32),
        finish_reasons=torch.tensor(finish, dtype=torch.uint8),
    )


def test_special_tokens_are_left_out_or_kept_but_for_the_stop_token() -> None:
    rollouts = rollouts_of(THOUGHT, CUT_OFF, STOPPED_IN_CHAT, STOPPED_BY_TEXT, EMPTY)
    tokenizer = byte_tokenizer()
    assert decode_responses(tokenizer, rollouts) == ["4 4", "4", "4", "4\n", ""]
    kept = decode_responses(tokenizer, rollouts, keep_special_tokens=True)
    assert kept == ["<think>4</think> 4", "<think>4</think>", "4", "4", ""]


def after_thinking(prompt, response, answer):
    _, mark, said = response.partition("</think>")
    return float(said.strip() == answer) if mark else None


def num_ids(response_ids):
    return len(response_ids)


@pytest.fixture
def rows(write_rows):
    path = write_rows([{"prompt": "2+2?", "answer": "4"}, {"prompt": "1+3?", "answer": "4"}])
    return load_prompts(path, byte_tokenizer(), vocab_size=300).rows


def test_scores_of_each_response_and_function(rows) -> None:
    functions = (f"{HERE}:after_thinking", "last_number", f"{HERE}:num_ids")
    rewards = Rewards(RewardConfig(functions, (1.0, 10.0, 100.0)))
    rollouts = rollouts_of(THOUGHT, CUT_OFF, STOPPED_IN_CHAT, EMPTY)
    scores = score(rewards, byte_tokenizer(), rollouts, rows, 2, keep_special_tokens=True)
    assert scores.total.tolist() == [[611.0, 310.0], [210.0, 100.0]]
    assert scores.total.dtype == torch.float64
    by_function = {name: values.flatten().tolist() for name, values in scores.by_function.items()}
    assert by_function["last_number"] == [1.0, 1.0, 1.0, 0.0]
    assert by_function["num_ids"] == [6.0, 3.0, 2.0, 1.0]
    assert by_function["after_thinking"][:2] == [1.0, 0.0]
    assert all(math.isnan(value) for value in by_function["after_thinking"][2:])
    # Unweighted, and over the responses that the function judged.
    assert scores.means() == {
        "reward_after_thinking": 0.5,
        "reward_last_number": 0.75,
        "reward_num_ids": 3.0,
    }
    # Without special tokens there is no mark, and nobody says so but the figure.
    scores = score(rewards, byte_tokenizer(), rollouts, rows, 2)
    assert math.isnan(scores.means()["reward_after_thinking"])


def test_a_response_that_no_function_judges_has_no_total(rows) -> None:
    rewards = Rewards(RewardConfig((f"{HERE}:after_thinking",)))
    rollouts = rollouts_of(STOPPED_IN_CHAT, EMPTY)
    assert score(rewards, byte_tokenizer(), rollouts, rows, 1).total.isnan().all()
