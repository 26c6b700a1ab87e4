"""trainer.pt is held to the model's parameters before the optimizer sees it."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoint_parts import Parts

from spec_rollout.cache import RolloutCache
from spec_rollout.config.sections import TrainConfig
from spec_rollout.train.checkpoint import CheckpointError, load_tensors
from spec_rollout.train.update import make_optimizer
from spec_rollout.train.value_head import ValueHead

EMBEDDING = "model.embed_tokens.weight"


def drop_moment(content):
    del content["optimizer"]["state"][0]


def drop_key(content):
    del content["optimizer"]["state"][0]["exp_avg"]


def add_key(content):
    content["optimizer"]["state"][0]["max_exp_avg_sq"] = torch.zeros(())


def other_name(content):
    content["optimizer"]["param_groups"][0]["param_names"][0] = "another"


def unnamed(content):
    del content["optimizer"]["param_groups"][0]["param_names"]


def fewer_groups(content):
    content["optimizer"]["param_groups"].pop()


def smaller_vocabulary(content):
    state = content["optimizer"]["state"][0]
    state["exp_avg_sq"] = state["exp_avg_sq"][:-3].clone()


def transposed(content):
    state = content["optimizer"]["state"][0]
    state["exp_avg"] = state["exp_avg"].T.contiguous()


def other_dtype(content):
    state = content["optimizer"]["state"][0]
    state["exp_avg"] = state["exp_avg"].bfloat16()


def no_tensor(content):
    content["optimizer"]["state"][0]["exp_avg"] = 0.0


def step_is_none(content):
    content["optimizer"]["state"][0]["step"] = torch.zeros(2)


def no_optimizer(content):
    del content["optimizer"]


def no_rng(content):
    del content["rng"]


def short_rng(content):
    content["rng"]["torch"] = content["rng"]["torch"][:-8].clone()


def value_head_too_many(content):
    content["value_head"] = {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_moment, r"expected moments of all \d+ parameters, got \d+ of them"),
        (drop_key, rf"expected step, exp_avg and exp_avg_sq of {EMBEDDING}, got \["),
        (add_key, rf"expected step, exp_avg and exp_avg_sq of {EMBEDDING}, got \["),
        (other_name, r"expected moments of \d+ parameters, got .* differ in another, model\.embed"),
        (unnamed, r"KeyError: 'param_names'"),
        (fewer_groups, r"expected moments of \d+ parameters, got those of \d+ \(they differ in "),
        (
            smaller_vocabulary,
            rf"exp_avg_sq of {EMBEDDING}: expected torch.float32 of shape \[(\d+), 32\], got "
            r"torch.float32 of shape \[\d+, 32\]",
        ),
        (transposed, rf"exp_avg of {EMBEDDING}: expected .* got torch.float32 of shape \[32, \d+"),
        (other_dtype, rf"exp_avg of {EMBEDDING}: expected torch.float32 .* got torch.bfloat16"),
        (no_tensor, rf"exp_avg of {EMBEDDING}: expected torch.float32 .*, got float"),
        (step_is_none, rf"step of {EMBEDDING}: expected a number as a float32 tensor, got"),
        (no_optimizer, r"KeyError: 'optimizer'"),
        (no_rng, r"KeyError: 'rng'"),
        (short_rng, r"RuntimeError: "),
        (value_head_too_many, r"expected none of the value heads .*, got one"),
    ],
)
def test_what_is_of_another_model_is_refused(model_dir, tmp_path, damage, message):
    folder = Parts(model_dir, steps=1).save(tmp_path)
    content = torch.load(folder / "trainer.pt", weights_only=True)
    damage(content)
    torch.save(content, folder / "trainer.pt")
    other = Parts(folder / "model")
    with pytest.raises(
        CheckpointError, match=r"trainer\.pt: expected optimizer and random .*: " + message
    ):
        load_tensors(folder, other.optimizer, other.cache)
    assert len(other.optimizer.state) == 0
    other.train()  # nothing that the fused kernel would stumble over


def test_a_value_head_that_is_missing_is_named(model_dir, tmp_path):
    folder = Parts(model_dir, steps=1).save(tmp_path)
    other = Parts(model_dir)
    head = ValueHead(other.model)
    optimizer = make_optimizer(other.model, TrainConfig(), head)
    with pytest.raises(CheckpointError, match=r"expected one of the value heads .*, got none"):
        load_tensors(folder, optimizer, RolloutCache(), head)


def test_a_model_of_another_dtype_is_refused(model_dir, tmp_path):
    folder = Parts(model_dir, steps=1).save(tmp_path)
    other = Parts(folder / "model")
    other.model.bfloat16()
    optimizer = make_optimizer(other.model, TrainConfig())
    message = re.escape(f"exp_avg of {EMBEDDING}: expected torch.bfloat16 of shape ")
    with pytest.raises(CheckpointError, match=message):
        load_tensors(folder, optimizer, RolloutCache())


def test_before_the_first_step_there_are_no_moments(model_dir, tmp_path):
    folder = Parts(model_dir).save(tmp_path, step=0)
    other = Parts(folder / "model")
    load_tensors(folder, other.optimizer, other.cache)
    assert len(other.optimizer.state) == 0
