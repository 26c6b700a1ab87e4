"""The Python code of a newer vLLM over the libraries of a CPU build that is installed.

    python tools/vllm_overlay.py .venv-vllm .venv-vllm-next 0.33.0 orjson

A release of vLLM is on PyPI weeks before anybody's build of it for CPUs. What this package hooks
into is Python, so that its tests can be run on the new Python code at once: in a copy of the
environment (of hard links) vLLM's files are replaced by those of the release's wheel, but for the
compiled ones. Packages that the release needs and the old one did not are named behind it. A test
that needs an operator which only the new release brings fails; one that passes has seen the hooks
as they will be. `make test-vllm-next` runs the plugin's tests so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def overlay(old: Path, new: Path, version: str, packages: Sequence[str] = ()) -> None:
    """Makes the environment `new`.

    Args:
        old: An environment with a CPU build of vLLM.
        new: Replaced if it was made by this before; nothing else may be there.
        version: Of the release to take the Python code of.
        packages: What else to install there, without what they need in turn.

    Raises:
        ValueError: if `old` has no vLLM, or `new` is something else.
        RuntimeError: if pip does not find the release or a package; with its words.
    """
    if not list(old.glob("lib/python*/site-packages/vllm/__init__.py")):
        raise ValueError(f"old: expected an environment with vLLM, got {old}")
    mark = new / ".overlay"
    if new.exists() and not mark.exists():
        raise ValueError(f"new: expected nothing there, or what this made before, got {new}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(version, Path(folder))
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new, symlinks=True, copy_function=os.link)
        mark.touch()
        (site,) = new.glob("lib/python*/site-packages")
        _replace(site, wheel)
    _point_scripts(new / "bin", old / "bin")
    if packages:
        _pip(str(new / "bin" / "python"), "install", "--no-deps", "--no-compile", *packages)


def _download(version: str, folder: Path) -> Path:
    options = ("--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    _pip(sys.executable, "download", *options, f"vllm=={version}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)}: {done.stderr.strip()}")


def _replace(site: Path, wheel: Path) -> None:
    """Files are unlinked before others take their place: the old environment has them, too."""
    for path in (site / "vllm").rglob("*"):
        if path.is_file() and path.suffix != ".so":
            path.unlink()
    for known in site.glob("vllm*.dist-info"):
        shutil.rmtree(known)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
    (metadata,) = site.glob("vllm*.dist-info/METADATA")
    # By this vLLM knows that it is for CPUs.
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(re.sub(r"(?m)^(Version: \S+)$", r"\1+cpu", text, count=1), encoding="utf-8")


def _point_scripts(new: Path, old: Path) -> None:
    """Scripts name their interpreter."""
    before, after = (f"#!{folder.absolute()}/".encode() for folder in (old, new))
    for path in new.iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        if (content := path.read_bytes()).startswith(before):
            mode = path.stat().st_mode
            path.unlink()
            path.write_bytes(content.replace(before, after, 1))
            path.chmod(mode)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path)
    options.add_argument("version")
    options.add_argument("packages", nargs="*")
    args = options.parse_args()
    overlay(args.old, args.new, args.version, args.packages)


if __name__ == "__main__":
    main()
