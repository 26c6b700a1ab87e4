"""The code blocks of the pages, and what the pages say about them.

A block of Python runs, one of shell commands or TOML is checked. A comment on the line before the
block says what is special about it:

    <!-- needs: vllm; given: model, prompt -->

`needs` names what is not there everywhere (`NEEDS`), `given` the names that the block takes as
defined (`GIVEN`), and `continues` says that it goes on with the names of the block before.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
NEEDS = frozenset({"vllm", "gpu", "network"})

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)\s*$")
_MARK = re.compile(r"^ *<!-- (?P<mark>(?:needs|given|continues)\b[^>]*?) -->$")
_LIST_ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        page: File name, relative to the root.
        line: Of its first line of code, 1-based.
        language: As the fence says; "" where it says nothing, "indented" without a fence.
        text: The code.
        needs: What must be there to run it, of `NEEDS`.
        given: Names that it takes as defined.
        continues: It goes on with the names of the Python block before.
    """

    page: str
    line: int
    language: str
    text: str
    needs: frozenset[str] = frozenset()
    given: tuple[str, ...] = ()
    continues: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """All blocks of a page, in order.

    Raises:
        ValueError: if a fence has no end, or a mark says something unknown or stands before no
            block.
    """
    lines = text.split("\n")
    blocks: list[Block] = []
    mark = Mark()
    index = 0
    while index < len(lines):
        fence = _FENCE.match(lines[index])
        if fence is not None:
            closing = fence["indent"] + "```"
            try:
                end = lines.index(closing, index + 1)
            except ValueError:
                raise ValueError(f"{page}:{index + 1}: expected {closing!r} after it") from None
            code, language = lines[index + 1 : end], fence["language"]
            first, index = index + 2, end + 1
        elif _starts_indented(lines, index):
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            code, language = lines[index:end], "indented"
            first, index = index + 1, end
        else:
            if mark.found:
                raise ValueError(f"{page}:{index}: expected a block of code after the mark")
            mark = Mark.of(lines[index], f"{page}:{index + 1}")
            index += 1
            continue
        code_text = textwrap.dedent("\n".join(code)) + "\n"
        blocks.append(
            Block(page, first, language, code_text, mark.needs, mark.given, mark.continues)
        )
        mark = Mark()
    return blocks


@dataclass(frozen=True)
class Mark:
    """What the line before a block says of it; `found` is False where it says nothing."""

    found: bool = False
    needs: frozenset[str] = frozenset()
    given: tuple[str, ...] = ()
    continues: bool = False

    @classmethod
    def of(cls, line: str, where: str) -> Mark:
        match = _MARK.match(line)
        if match is None:
            return cls()
        values: dict[str, Any] = {}
        for part in match["mark"].split(";"):
            key, _, value = part.strip().partition(":")
            names = tuple(name.strip() for name in value.split(",")) if value else ()
            if key == "continues" and not names:
                values[key] = True
            elif key == "given" and names:
                values[key] = names
            elif key == "needs" and names and NEEDS.issuperset(names):
                values[key] = frozenset(names)
            else:
                raise ValueError(
                    f"{where}: expected needs: ({', '.join(sorted(NEEDS))}), given: NAMES or "
                    f"continues, got {part.strip()!r}"
                )
        return cls(found=True, **values)


def _starts_indented(lines: Sequence[str], index: int) -> bool:
    """Four spaces after a blank line are code, except inside a list."""
    if not lines[index].startswith("    ") or not lines[index].strip():
        return False
    before = index - 1
    if before < 0 or lines[before].strip():
        return False
    while before >= 0 and not lines[before].strip():
        before -= 1
    return not (_LIST_ITEM.match(lines[before]) or lines[before].startswith(" "))


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [
        block
        for page in PAGES
        for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))
    ]


def python_groups(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of Python that share their names: a block and those that continue it."""
    groups: list[list[Block]] = []
    for block in (block for block in blocks if block.language == "python"):
        if not block.continues:
            groups.append([block])
        elif groups and groups[-1][0].page == block.page:
            groups[-1].append(block)
        else:
            raise ValueError(f"{block}: expected a block of Python before it on its page")
    return groups


def needs_of(group: Sequence[Block]) -> frozenset[str]:
    """What a group of blocks needs together."""
    return frozenset().union(*(block.needs for block in group))


# Values of names that blocks take as defined; made when they are asked for.
GIVEN: Mapping[str, Callable[[], Any]] = {
    "model": lambda: _demo_model(),
    "policy": lambda: _policy(),
    "prompt": lambda: _prompts(1)[0],
    "prompts": lambda: _prompts(2),
    "tokenizer": lambda: _tokenizer(),
}


def _demo_model() -> str:
    from spec_rollout.demo import model_dir

    return str(model_dir())


def _policy() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_demo_model())


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_demo_model())


def _prompts(count: int) -> list[list[int]]:
    from spec_rollout.demo.task import training_problems

    texts = [problem.prompt for problem in training_problems(count)]
    return _tokenizer()(texts)["input_ids"]


def run(group: Sequence[Block]) -> tuple[dict[str, Any], str]:
    """Executes blocks one after the other; returns their names and what they printed."""
    names: dict[str, Any] = {"__name__": "example"}
    printed = io.StringIO()
    for block in group:
        names.update({name: GIVEN[name]() for name in block.given})
        with contextlib.redirect_stdout(printed):
            # Blank lines before the code: a traceback then names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)
    return names, printed.getvalue()


def commands_of(block: Block) -> Iterator[str]:
    """Commands of a shell block: continued lines joined, comments and blank lines left out, the
    parts of `a && b` one by one."""
    for line in re.sub(r"\\\n\s*", " ", block.text).split("\n"):
        command = re.sub(r"(^|\s)#.*$", "", line).strip()
        if command:
            yield from (part.strip() for part in command.split("&&"))
