"""The time that a chat template sees as now.

Templates with today's date call `strftime_now(format)`. A run renders its prompts again when it is
resumed, and they must not change with the day.
"""

from __future__ import annotations

import string
from datetime import datetime

_CALL = "strftime_now"
_TIMES = "spec_rollout_times"

# Defines `strftime_now` anew, from a table of what each directive stands for. "%%" is hidden from
# the other directives first.
_MACRO = (
    "{%- macro strftime_now(format) -%}"
    "{%- set text = namespace(value=format.replace('%%', '\0')) -%}"
    f"{{%- for directive, value in {_TIMES}.items() -%}}"
    "{%- set text.value = text.value.replace(directive, value) -%}"
    "{%- endfor -%}"
    "{{- text.value.replace('\0', '%') -}}"
    "{%- endmacro -%}"
)


def asks_for_time(template: str) -> bool:
    """Whether what a template renders depends on when."""
    return _CALL in template


def with_time(template: str, now: datetime) -> tuple[str, dict[str, dict[str, str]]]:
    """The template and the variables with which it renders as at that time."""
    letters = string.ascii_letters
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in letters]
    return _MACRO + template, {_TIMES: {d: now.strftime(d) for d in directives}}
