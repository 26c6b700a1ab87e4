"""What `spec-rollout ablate` is told to compare."""

from __future__ import annotations

import math

import pytest

from spec_rollout.ablate.grid import changed
from spec_rollout.ablate.published import LENIENCE, PLAIN, RANDOM_CUT, published_run
from spec_rollout.ablate.variants import variants


def test_each_option_adds_its_runs(make_config) -> None:
    found = variants(
        "0, 0.5,inf",
        "random-reuse,random-cut",
        [
            "fresh_share=0.5",
            "both: rule=coupled, drafting=true",
            "slow: train.lr=1e-4, max_age = 1",
            "rounded: rule=coupled, tolerance=0.1",
        ],
    )
    # Whatever the config says of reuse, each variant is what its name says.
    base = make_config(
        rollout={
            "rule": "lenient",
            "log_lenience": 2.0,
            "scale": 2.0,
            "min_target_prob": 0.1,
            "max_age": 3,
            "drafting": True,
            "tolerance": "auto",
        },
        train={"correction": "truncated"},
    )
    rollouts = {name: changed(base, changes).rollout for name, changes in found.items()}
    assert {
        name: (r.rule, r.log_lenience, r.reuse, r.drafting) for name, r in rollouts.items()
    } == {
        "plain": ("none", None, False, False),
        "lenient_0": ("lenient", 0.0, True, False),
        "lenient_0.5": ("lenient", 0.5, True, False),
        "lenient_inf": ("lenient", math.inf, True, False),
        "random_reuse": ("random_reuse", None, True, False),
        "random_cut": ("random_cut", None, True, False),
        "fresh_share_0.5": ("lenient", None, True, False),
        "both": ("coupled", None, True, True),
        "slow": ("lenient", None, True, False),
        "rounded": ("coupled", None, True, False),
    }
    assert {name: r.max_age for name, r in rollouts.items() if r.max_age} == {"slow": 1}
    assert rollouts["fresh_share_0.5"].fresh_share == 0.5
    assert {name for name, r in rollouts.items() if r.tolerance} == {"rounded"}
    assert {(r.scale, r.min_target_prob) for r in rollouts.values()} == {(1.0, 0.0)}
    assert changed(base, found["slow"]).train.lr == 1e-4
    assert changed(base, found["both"]).train.correction == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lenience": "0,a"}, "--lenience: expected numbers with commas, got 'a'"),
        ({"lenience": "0.5,0.50"}, "--lenience: expected runs of different names, got lenient_0.5"),
        ({"baselines": "random"}, "--baselines: expected random-reuse or random-cut, got 'random'"),
        ({"also": ["fresh_share"]}, "--also: expected"),
        ({"also": ["a/b: max_age=1"]}, "--also: expected a name"),
        ({"also": ["plain: max_age=1"]}, "--also: expected runs of different names, got plain"),
    ],
)
def test_a_wrong_option_is_named(options, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        variants(**options)


def test_lists_and_ranges_are_one_value() -> None:
    (_, changes) = variants(
        also=["b: lenience_budget=kl_reused, lenience_range=[0.0, 1.0]"]
    ).items()
    assert changes[1]["rollout.lenience_range"] == [0.0, 1.0]


def test_published_figures_stand_beside_their_own_setting_only() -> None:
    found = variants(
        "0.5,0.3,inf",
        "random-cut,random-reuse",
        ["x: log_lenience=0.5,fresh_share=0.5", "y: log_lenience=0.5, tolerance=0.1"],
    )
    known = {name: published_run(changes) for name, changes in found.items()}
    assert known == {
        "plain": PLAIN,
        "lenient_0.5": LENIENCE[0.5],
        "lenient_0.3": None,
        "lenient_inf": LENIENCE[math.inf],
        "random_cut": RANDOM_CUT,
        "random_reuse": None,
        "x": None,
        "y": None,
    }
