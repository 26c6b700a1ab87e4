"""docs/install.md names every environment variable of ours, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# How a file of each kind reads a variable.
_READ = {
    ".py": r"environ(?:\.get|\.pop|\.setdefault)?\s*[(\[]\s*[\"'](SPEC_ROLLOUT\w*)",
    ".cpp": r"getenv\(\s*\"(SPEC_ROLLOUT\w*)",
    ".h": r"getenv\(\s*\"(SPEC_ROLLOUT\w*)",
    ".cu": r"getenv\(\s*\"(SPEC_ROLLOUT\w*)",
    ".txt": r"\$ENV\{(SPEC_ROLLOUT\w*)",
    "": r"\$[({]?(SPEC_ROLLOUT\w*)",  # Makefile and shell scripts
}


def _sources() -> Iterator[Path]:
    for folder in (
        "spec_rollout",
        "csrc",
        "python_bindings",
        "build_tools",
        "benchmarks",
        "tools",
        ".ci",
    ):
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file())
    yield from (ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile"))


def _read() -> set[str]:
    found: set[str] = set()
    for path in _sources():
        if path.suffix in _READ:
            found.update(re.findall(_READ[path.suffix], path.read_text(encoding="utf-8")))
    return found


def test_every_variable_is_documented() -> None:
    rows = re.findall(
        r"^\| `(SPEC_ROLLOUT\w*)` \|", (ROOT / "docs" / "install.md").read_text(), re.M
    )
    assert len(rows) == len(set(rows))
    assert set(rows) == _read()
    assert {"SPEC_ROLLOUT_CUDA", "SPEC_ROLLOUT_ISA", "SPEC_ROLLOUT_DEBUG"} <= _read()


def test_no_page_names_a_variable_that_nobody_reads() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"\bSPEC_ROLLOUT(?:_[A-Z]+)*\b", page.read_text()))
        assert named <= _read(), page
