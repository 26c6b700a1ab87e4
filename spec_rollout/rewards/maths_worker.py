"""Judges mathematical answers by math-verify; the process that `maths` starts runs this file.

It reads a JSON list [response, answers, seconds] a line, and writes what came of it. Nothing of the
package is imported: a process costs what sympy costs.

A process, because nothing less stops an answer like 9^{9^{9}}: it is computed in one call, which no
signal and no thread interrupts, and it takes all memory there is. Limits are of processor time, so
that a busy machine judges as an idle one does.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

READY = "ready"
# What is written of each answer.
RIGHT, WRONG, OUT_OF_TIME = "right", "wrong", "out of time"

_MEMORY = 2 << 30
# Of a response without a boxed answer, math-verify sees so much of the end.
_MOST_CHARACTERS = 2000
# A text may have opened very many boxes and closed none.
_MOST_BOXES = 20
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LAST_LINE = re.compile(r"####([^\n]*)")
# "Step 2", "**Solution**", "2. Add up": how a heading begins, and no answer but one in words.
_HEADING = re.compile(r"[^\w\\]*(?:\d+[.):]\s+[^\w\\]*)?[^\W\d_]{2,}")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
# A dollar's sign is a unit; one without a backslash begins mathematics.
_DOLLAR = re.compile(r"\\\$")
# "3 1/2" is not 31/2, while "10 000" and "10\,000" are 10000.
_APART = re.compile(r"(?<=\d)(?:\s|\\[;: ])+(?=\d)(?!\d{3}(?!\d))")
# The end of a row stays: the second backslash of "\\ " is no space.
_SPACING = re.compile(r"(\\\\)|\\(?:left|right)(?![a-zA-Z])|\\[,!;: ]|[\s$]+")
# "Answer" where no answer is stated: math-verify takes the first number that follows the word, be
# it that of "to answer this, take her 9 eggs" or of "the answer is not 9 but 18".
_NO_ANSWER = re.compile(
    r"""(?ix)
    (?<=\bto\ )answer
    | answer (?! s?\b (?:
        [\s*_#(]{0,9} [-\d$\\]  # a number or formula at once
        | (?: (?! \b(?:can)?not\b ) [^.,;\n\d$] ){0,50}?
          (?: [:=] | \b(?:is|are|be|equals)\b ) (?! \s+not\b )
    ))"""
)
# Words, and a number after them: prose rather than a formula and its unit.
_PROSE = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}.*\d")
_INLINE = re.compile(r"\\\(.*?\\\)|\\\[.*?\\\]")
# A matrix, say: one formula, over however many lines.
_ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)


class OutOfTime(BaseException):
    """The processor time of an answer is used up; no library catches it by accident."""


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a text holds; None if there is none that is closed."""
    for match in list(_BOX.finditer(text))[: -_MOST_BOXES - 1 : -1]:
        depth = 1
        for index in range(match.end(), len(text)):
            if text[index - 1] == "\\" and text[index - 2] != "\\":
                continue
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[match.end() : index]
    return None


def stated(text: str) -> tuple[str, bool]:
    """The part of a response or worked solution that states its answer.

    Returns:
        The last boxed expression, else what follows the last "####" (unless that begins with a
        word and has text below it, as a heading of markdown), else the end of the text; and whether
        it is an answer by itself, rather than a text to look for one in.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip(), True
    lines = list(_LAST_LINE.finditer(text))
    line = lines[-1][1].strip() if lines else ""
    if line and not (_HEADING.match(line) and text[lines[-1].end() :].strip()):
        return line, True
    return text[-_MOST_CHARACTERS:], False


def plain(answer: str) -> str:
    """An answer without what makes no difference to it: equal ones need no mathematics."""
    answer = _TEXT.sub(r"\1", _DOLLAR.sub("", answer))
    answer = _SPACING.sub(r"\1", _APART.sub("~", answer))
    return answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").rstrip(".")


def is_worked(answer: str) -> bool:
    """Whether an answer column holds a solution that is to be looked through, in words, rather than
    an answer by itself."""
    if "\n" in _ENVIRONMENT.sub("", answer.strip()):
        return True
    words = _INLINE.sub("0", _DOLLAR.sub("", answer))
    return "\\" not in words and _PROSE.search(words) is not None


def make_judge() -> Callable[[str, list[str]], bool]:
    """A function of a response and the answers of which any will do."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def parsed(text: str, is_answer: bool) -> Any:
        text = _DOLLAR.sub("", text)
        if not is_answer:
            text = _NO_ANSWER.sub(" ", text)
        else:
            # What math-verify takes for inline mathematics has no line breaks.
            text = " ".join(text.split())
            if "$" not in text:
                text = f"${text}$"
        return parse(text, targets, extraction_mode="first_match", parsing_timeout=None)

    @lru_cache(maxsize=4096)
    def expected(answer: str) -> tuple[str, Any]:
        part, is_answer = stated(answer)
        return plain(part), parsed(part, is_answer or not is_worked(part))

    def judge(response: str, answers: list[str]) -> bool:
        part, is_answer = stated(response)
        same = plain(part)
        given = None
        for answer in answers:
            text, gold = expected(answer)
            if same and same == text:
                return True
            if given is None:
                given = parsed(part, is_answer)
            if gold and given and verify(gold, given, timeout_seconds=None):
                return True
        return False

    return judge


def limited(judge: Callable[[str, list[str]], bool], request: list[Any]) -> str:
    """What came of a request."""
    response, answers, seconds = request
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = used.ru_utime + used.ru_stime
    # What no exception gets out of, the kernel ends.
    _limit(resource.RLIMIT_CPU, math.ceil(total + seconds) + 1)
    try:
        try:
            # Again and again, for code that catches everything.
            signal.setitimer(signal.ITIMER_PROF, seconds, 0.25)
            return RIGHT if judge(response, answers) else WRONG
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return OUT_OF_TIME
    except (Exception, SystemExit):  # a parser may do anything with what a model says
        return WRONG


def _limit(kind: int, most: int) -> None:
    """Sets a limit, below the one that whoever started this process has set: nobody but root may
    raise that."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _alarm(signum: int, frame: object) -> None:
    raise OutOfTime


def _requests() -> Iterator[list[Any]]:
    for line in sys.stdin.buffer:
        yield json.loads(line)


def main() -> None:
    """Judges until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    signal.signal(signal.SIGPROF, _alarm)
    # Answers go to a file of their own; whatever libraries print goes nowhere.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    logging.disable(logging.CRITICAL)
    judge = make_judge()
    judge("$1$", ["1/1"])  # imports what is imported late
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, _MEMORY)
    os.dup2(null, 2)  # from here on; until now it said why the process did not start
    out.write(READY.encode() + b"\n")
    for request in _requests():
        out.write(limited(judge, request).encode() + b"\n")


if __name__ == "__main__":
    main()
