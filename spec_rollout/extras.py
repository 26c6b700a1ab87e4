"""What to install for a part of the package that is missing."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

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


def checkout_advice() -> str | None:
    """What to do where this package is a checkout that has no extension; None if it is not.

    A process that starts in a checkout imports the folder there, and not the installed package.
    """
    package = Path(__file__).resolve().parent
    built = any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    if built or not (package.parent / "CMakeLists.txt").is_file():
        return None
    return (
        f"this is the checkout in {package.parent}, not the installed package: run from another "
        "folder, or `pip install -e .` there"
    )


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
