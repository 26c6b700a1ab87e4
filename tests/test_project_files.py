"""What the project says about itself is true: pins, links, commands, names."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from spec_rollout.adapters.settings import ReuseSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


def test_pre_commit_uses_the_versions_of_make_lint() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lint = set(project["optional-dependencies"]["lint"])
    pins = re.findall(
        r'additional_dependencies: \["([^"]+)"\]', (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert len(pins) == 3
    assert set(pins) <= lint


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_links_into_a_page_name_one_of_its_headings(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {_anchor(heading) for heading in headings}, f"{link}#{anchor}"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_are_targets_of_the_makefile(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(?=[`\s,;:.)])", _code(page)))
    assert named <= targets


_MOVED = "CHANGELOG.md"  # its table names old modules, too, in the first column
_FOLDERS = (
    "spec_rollout",
    "csrc",
    "python_bindings",
    "benchmarks",
    "tools",
    "tests",
    "docs",
    "examples",
    r"\.ci",
)


@pytest.mark.parametrize("page", [*PAGES, _MOVED])
def test_modules_and_names_in_the_text_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == _MOVED:
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    # What stands below a table was run at the commit that it names.
    text = re.sub(r"<sub>.*?</sub>", "", text)
    names = set(re.findall(r"(?<!\+)\bspec_rollout(?:\.[A-Za-z_]\w*)+", text))
    assert [name for name in sorted(names) if not _exists(name)] == []
    keys = set(re.findall(r"\+spec_rollout\.([a-z_]+)", text))  # of verl's configuration
    assert keys <= {field.name for field in fields(ReuseSettings)}


def _exists(name: str) -> bool:
    """A module, or a name in the source of one: what imports vLLM is not imported here."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).read_text(encoding="utf-8")
            return all(re.search(rf"\b{part}\b", source) for part in parts[end:])
    return False


@pytest.mark.parametrize("page", PAGES)
def test_files_in_the_text_exist(page: str) -> None:
    pattern = re.compile(rf"`((?:{'|'.join(_FOLDERS)})/[\w./-]+)`")
    paths = [path for path in pattern.findall(_code(page)) if "NAME" not in path]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def _code(page: str) -> str:
    """Spans in backticks; tests/docs looks at the blocks."""
    return "\n".join(re.findall(r"`[^`\n]+`", (ROOT / page).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "script",
    [
        *(".ci/run", ".ci/cuda-toolkit", ".ci/cuda-check", ".ci/sanitize", ".ci/sanitize-cpu"),
        ".ci/vllm-venv",
    ],
)
def test_scripts_are_valid_shell_and_executable(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_make_clean_removes_every_environment() -> None:
    text = (ROOT / "Makefile").read_text()
    environments = set(re.findall(r"^(VENV\w*) :=", text, re.MULTILINE))
    recipe = re.search(r"^clean:.*\n(?:\t.*\n)+", text + "\n", re.MULTILINE)[0]
    assert {"VENV", "VENV_VLLM", "VENV_NEXT"} <= environments
    assert environments <= set(re.findall(r"\$\((\w+)\)", recipe))


def test_the_demo_refuses_another_engine_with_one_line() -> None:
    result = subprocess.run(
        ["make", "--no-print-directory", "demo", "ENGINE=sglang"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ENGINE: expected transformers or vllm, got sglang")
