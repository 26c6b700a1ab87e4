"""No tensor of the package has the dtype that happens to be torch's default: programs change it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spec_rollout

PACKAGE = Path(spec_rollout.__file__).parent
FLOATS_BY_DEFAULT = {f"torch.{name}" for name in ("zeros", "ones", "empty", "eye", "rand", "randn")}


def findings(source: str) -> Iterator[str]:
    """Calls that make a tensor of floats without saying of which."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(k.arg in ("dtype", None) for k in node.keywords):
            continue
        called, given = ast.unparse(node.func), ast.unparse(node)
        literal = any(
            isinstance(part, ast.Constant) and isinstance(part.value, float)
            for argument in node.args
            for part in ast.walk(argument)
        )
        endless = any(text in given for text in ("torch.nan", "torch.inf", "math.nan", "math.inf"))
        if called in FLOATS_BY_DEFAULT or (
            called in ("torch.tensor", "torch.full") and (literal or endless)
        ):
            yield f"line {node.lineno}: {given}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, device=device)", True),
        ("torch.full((3,), torch.nan)", True),
        ("torch.tensor([0.0, 1.0])", True),
        ("torch.zeros(3, dtype=torch.float32)", False),
        ("torch.zeros(3, **like)", False),
        ("torch.full((3,), -1)", False),
        ("torch.tensor([len(row) for row in rows])", False),
        ("torch.zeros_like(x)", False),
    ],
)
def test_what_is_looked_for_is_found(source: str, found: bool) -> None:
    assert bool(list(findings(source))) is found


def test_every_tensor_of_floats_says_of_which() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    assert [f"{path}: {found}" for path in files for found in findings(path.read_text())] == []
