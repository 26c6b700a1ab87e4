"""Prints the requirements of pyproject.toml for some purposes, one per line: `requirements.py
build|EXTRA ...`."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
wanted = []
for purpose in sys.argv[1:]:
    if purpose == "build":
        wanted += project["build-system"]["requires"]
    else:
        wanted += project["project"]["optional-dependencies"][purpose]
print("\n".join(wanted))
