"""docs/api.md lists the public names, all of them and no other."""

from __future__ import annotations

import re

from code_blocks import ROOT

import spec_rollout
from spec_rollout import ops

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_lists_the_public_names() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(spec_rollout.__all__)
    assert all(what.strip() for _, what in rows)


def test_the_page_names_the_ops() -> None:
    others = {"build_info", "check_status", "status_word"}
    functions = {name for name in ops.__all__ if name[0].islower()} - others
    (row,) = re.findall(r"^\| `ops` \| (.+) \|$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == functions
