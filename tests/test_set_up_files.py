"""environment.yml and the Dockerfile name what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_conda_file_has_the_extras_as_they_are() -> None:
    text = (ROOT / "environment.yml").read_text()
    listed = set(re.findall(r"^      - (.+)$", text, re.MULTILINE))
    wanted = {*EXTRAS["train"], *EXTRAS["parquet"], *EXTRAS["vllm"]}
    assert wanted <= listed
    assert next(x for x in EXTRAS["test"] if x.startswith("peft")) in listed


def test_the_dockerfile_copies_what_is_there_and_takes_a_vllm_that_will_do() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for extra in re.search(r"'\.\[([\w,]+)\]'", text)[1].split(","):
        assert extra in EXTRAS
    version = tuple(map(int, re.search(r"VLLM=v(\d+)\.(\d+)", text).groups()))
    assert (0, 26) <= version < (0, 33)
    peft = next(x for x in EXTRAS["test"] if x.startswith("peft"))
    assert f"'{peft}'" in text
