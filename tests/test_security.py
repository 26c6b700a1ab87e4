"""What the package never does with data that it reads: no file of a run, of a cache or of a
checkpoint runs code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import spec_rollout
from spec_rollout.train.state import CheckpointError
from spec_rollout.train.tensors import TENSORS, restore_tensors

PACKAGE = Path(spec_rollout.__file__).parent
# Their `load` runs what a file tells it to.
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Called with something else than a name of ours, they would be a way in.
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}


def findings(source: str) -> Iterator[str]:
    """What of a file is not allowed, with its line."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in UNSAFE_MODULES:
                yield f"line {node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in UNSAFE_CALLS:
            yield f"line {node.lineno}: calls {called}"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: calls torch.load without weights_only=True"
        if given.get("allow_pickle") == "True":
            yield f"line {node.lineno}: calls {called} with allow_pickle=True"
        if given.get("shell") == "True":
            yield f"line {node.lineno}: calls {called} with shell=True"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "imports pickle"),
        ("from dill import loads", "imports dill"),
        ("torch.load(path)", "without weights_only=True"),
        ("torch.load(path, weights_only=False)", "without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "with allow_pickle=True"),
        ("eval(text)", "calls eval"),
        ("subprocess.run(text, shell=True)", "shell=True"),
    ],
)
def test_what_is_looked_for_is_found(source: str, found: str) -> None:
    (line,) = findings(source)
    assert found in line


def test_the_package_unpickles_and_evaluates_nothing() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    assert [f"{path}: {found}" for path in files for found in findings(path.read_text())] == []


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "made-by-loading"
    torch.save({"optimizer": _Attack(made)}, tmp_path / TENSORS)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(CheckpointError, match=r"weights_only|Weights only"):
        restore_tensors(tmp_path / TENSORS, optimizer, None)
    assert not made.exists()
    torch.load(tmp_path / TENSORS, weights_only=False)
    assert made.exists()  # it would have
