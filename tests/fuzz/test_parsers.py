"""Parsers on anything: bytes, and what is left of valid input when some of it is changed."""

from __future__ import annotations

from pathlib import Path

import parsers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import parse

CORPUS = Path(__file__).with_name("corpus")
SEEDS = parsers.seeds()


def corpus(name: str) -> list[bytes]:
    """What the fuzzer found worth keeping."""
    folder = CORPUS / name
    return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []


# What parsers of others are known to stumble over: deep nesting, numbers without end, half characters.
NASTY = (
    b'{"a":' * 5000,
    b"x = " + b"[" * 5000,
    b"train.lr=" + b"[" * 5000,
    b"train.lr=1" + b"0" * 400,
    b"train.epochs=1" + b"0" * 5000,
    b'{"sample": 1' + b"0" * 5000 + b"}",
    b'{"sample": 1, "prompt_id": "\\ud800"}',
    b'{"sample": 1, "prompt_id": 1' + b"0" * 5000 + b"}",
    b'{"mode": "drafting", "log_seconds": 1' + b"0" * 400 + b"}",
    b'{"mode": {}, "seed": [1]}',
    b"\xff\xfe{}",
    "é".encode(),
)


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input with some pieces replaced, taken out, repeated or put in."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 9))
        piece = draw(
            st.binary(max_size=9)
            | st.sampled_from(
                [b"\0" * 8, b"\xff" * 8, b"\\ud800", b"[" * 3000, b"1" * 5000, b"e999"]
            )
            | st.just(data[start:end] * 2)
        )
        data = data[:start] + piece + data[end:]
    return data


def test_every_target_has_seeds_that_it_parses() -> None:
    """Nothing is suppressed on the way: a seed that is refused tries nothing."""
    assert set(SEEDS) == set(parsers.TARGETS)
    parse(SEEDS["wire"][0])
    EngineOptions.from_text(SEEDS["engine_options"][1].decode())
    with parsers.as_file(SEEDS["cached"][1]) as path:
        assert parsers.cache_file.read(path).pass_index == 4
    with parsers.as_file(SEEDS["config"][0]) as path:
        parsers.load_config(path)
    parsers.load_config(None, [*parsers._REQUIRED, *SEEDS["config"][1].decode().splitlines()])
    assert parsers.history_file.unpacked(SEEDS["history"][0]).tags.tolist() == [7, -1]


@pytest.mark.parametrize("name", parsers.TARGETS)
def test_parsers_take_apart_or_refuse(name: str) -> None:
    target = parsers.TARGETS[name]
    for data in (*NASTY, *corpus(name)):
        target(data)

    @given(changed(SEEDS[name]) | st.binary(max_size=80))
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def anything(data: bytes) -> None:
        target(data)

    anything()
