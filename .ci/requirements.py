"""Prints the requirements of pyproject.toml for some purposes, one per line:
`requirements.py build|core|EXTRA ...` (core: what the package itself depends on)."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
wanted = []
for purpose in sys.argv[1:]:
    if purpose == "build":
        wanted += project["build-system"]["requires"]
    elif purpose == "core":
        wanted += project["project"]["dependencies"]
    else:
        wanted += project["project"]["optional-dependencies"][purpose]
print("\n".join(wanted))
