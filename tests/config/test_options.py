"""Options made from config fields."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from spec_rollout.config import options, sections
from spec_rollout.config.sections import ConfigError, RolloutConfig, RunConfig


@dataclass
class Section:
    """A section.

    Attributes:
        num_things: How many,
            at 100 %.
        low, high: Of the `range`.
        kind: Which.
    """

    num_things: int = 3
    low: float | None = None
    high: float = 1.5
    kind: Literal["a", "b"] = "a"


def parse(*argv: str, **settings) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_options(parser, Section, "num_things", "low", "high", "kind", **settings)
    return parser.parse_args(argv)


def test_types_defaults_and_choices_are_the_fields() -> None:
    args = parse()
    assert (args.num_things, args.low, args.high, args.kind) == (3, None, 1.5, "a")
    args = parse("--num-things", "4", "--low", "2", "--kind", "b")
    assert (args.num_things, args.low, args.kind) == (4, 2.0, "b")
    assert isinstance(args.low, float)
    with pytest.raises(argparse.ArgumentError, match="kind"):
        parse("--kind", "c")
    assert parse(defaults={"num_things": 9}).num_things == 9
    assert options.values(args, "num_things", "kind") == {"num_things": 4, "kind": "b"}


def test_help_is_what_the_docstring_says() -> None:
    assert options.attribute_texts(Section) == {
        "num_things": "How many, at 100 %",
        "low": "Of the range",
        "high": "Of the range",
        "kind": "Which",
    }
    parser = argparse.ArgumentParser()
    options.add_options(parser, Section, "num_things")
    assert "How many, at 100 % (default: 3)" in parser.format_help()


@pytest.mark.parametrize("section", [f.name for f in fields(RunConfig)])
def test_every_field_of_every_section_is_described(section: str) -> None:
    named = {"model": "Model", "data": "Data", "vllm": "VLLM", "eval": "Eval", "log": "Log"}
    config_class = getattr(sections, f"{named.get(section, section.capitalize())}Config")
    texts = options.attribute_texts(config_class)
    assert set(texts) == {f.name for f in fields(config_class)}


def test_an_error_names_the_option() -> None:
    with pytest.raises(ConfigError) as caught:
        RolloutConfig(num_samples=0)
    assert str(options.named(caught.value)) == "--num-samples: expected at least 1, got 0"
