"""Where the vLLM plugin meets vLLM: in one package, and with a clear word where vLLM is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import spec_rollout

ROOT = Path(spec_rollout.__file__).parent
PLUGIN = "spec_rollout.engines.vllm"
COMPAT = f"{PLUGIN}.compat"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, wherever in it; of `from a import b`, a.b if that is ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def reaches(text: str) -> list[str]:
    """How a file reaches into vLLM."""
    tree = ast.parse(text)
    found = [name for name in imports_of(tree) if name.split(".")[0] == "vllm"]
    for node in ast.walk(tree):
        # An attribute, or its name as a string (getattr).
        named = getattr(node, "attr", None) or getattr(node, "value", None)
        found += ["llm_engine"] * (named == "llm_engine")
    return found


def test_only_compat_reaches_into_vllm() -> None:
    found = {
        name: what
        for name, path in MODULES.items()
        if not f"{name}.".startswith(f"{COMPAT}.") and (what := reaches(path.read_text()))
    }
    assert found == {}
    assert any(reaches(path.read_text()) for name, path in MODULES.items() if COMPAT in name)


@pytest.mark.parametrize(
    "text",
    [
        "import vllm",
        "def f():\n    from vllm.v1 import engine",
        "if TYPE_CHECKING:\n    from vllm.config import VllmConfig",
        "engine.llm.llm_engine.step()",
        "getattr(llm, 'llm_engine')",
    ],
)
def test_a_reach_would_be_seen(text: str) -> None:
    assert len(reaches(text)) == 1


def test_imports_go_in_no_circle() -> None:
    """Those for types included. A module of the plugin can be read without what reads it."""
    ours = {name: path for name, path in MODULES.items() if f"{name}.".startswith(f"{PLUGIN}.")}
    graph = {
        name: {other for other in imports_of(ast.parse(path.read_text())) if other in ours}
        for name, path in ours.items()
    }
    assert len(graph) > 20
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")
    for side, other in (("client", "worker"), ("worker", "client")):
        for name in graph:
            if name.startswith(f"{PLUGIN}.{side}."):
                assert not any(n.startswith(f"{PLUGIN}.{other}") for n in graph[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "purpose"),
    [
        ("engine_args()", "spec_rollout.engines.vllm.engine_args()"),
        ("VLLMEngine('model')", "VLLMEngine"),
    ],
)
def test_a_missing_vllm_is_named(code: str, purpose: str) -> None:
    script = (
        "import sys; sys.modules['vllm'] = None\n"
        "from spec_rollout.engines.vllm import VLLMEngine, engine_args\n"
        f"try:\n    {code}\nexcept ImportError as error:\n    print(error.name, error, sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"vllm|vllm: expected to be installed for {purpose}, found no module of that name; "
        "pip install 'vllm<0.34,>=0.26' (without a GPU see docs/vllm.md)"
    ], done.stderr
