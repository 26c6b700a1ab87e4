"""What to install for a part of the package whose packages are missing."""

from __future__ import annotations

import re
import shlex
from importlib import metadata

# The packages of the extra `train`, by the names that they are imported by.
TRAIN = ("matplotlib", "safetensors", "tomli_w", "tqdm", "transformers")


def install_command(*modules: str) -> str:
    """The command that installs packages, in the versions that this package wants.

    They are named themselves, and not the extra that they are in: pip finds an extra only where it
    finds this package, in a checkout under another name than from an index.

    Args:
        modules: As they are imported.
    """
    wanted = _requirements()
    names = [module.replace("_", "-") for module in modules]
    return "pip install " + " ".join(shlex.quote(wanted.get(name, name)) for name in names)


def _requirements() -> dict[str, str]:
    """Requirements of this package as pip takes them ("tqdm>=4.66"), by distribution."""
    try:
        lines = metadata.requires("spec-rollout") or []
    except metadata.PackageNotFoundError:
        return {}  # a source tree that was never installed
    found = {}
    for line in lines:
        requirement = line.partition(";")[0].strip()
        name = re.match(r"[\w.-]+", requirement)
        if name is not None:
            found[name.group().lower().replace("_", "-")] = requirement
    return found
