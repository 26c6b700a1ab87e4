"""An engine of a resumed run is the engine that it was."""

from __future__ import annotations

import logging

import pytest
import torch
from markov_engine import MarkovEngine

from spec_rollout.acceptance import Coupled
from spec_rollout.rollout import RolloutSession
from spec_rollout.train.continued import ContinuedEngine


@pytest.mark.parametrize(
    ("batch_invariant", "warns"), [(False, True), (True, False), (None, False)]
)
def test_a_session_warns_of_rounding_as_it_does_in_a_new_run(
    caplog: pytest.LogCaptureFixture, batch_invariant: bool | None, warns: bool
) -> None:
    engine = MarkovEngine(torch.zeros(4, 4))
    if batch_invariant is not None:  # vLLM's does not say
        engine.batch_invariant = batch_invariant  # type: ignore[attr-defined]
    continued = ContinuedEngine(engine, 3)
    assert continued.batch_invariant is batch_invariant
    with caplog.at_level(logging.WARNING):
        RolloutSession(continued, Coupled())
    assert ("near-ties turn" in caplog.text) is warns


def test_it_names_the_models_end_of_text_as_its_engine_does() -> None:
    engine = MarkovEngine(torch.zeros(4, 4))
    assert ContinuedEngine(engine, 3).eos_token_ids == ()
    engine.eos_token_ids = (3,)  # type: ignore[attr-defined]
    assert ContinuedEngine(engine, 3).eos_token_ids == (3,)
