"""The token viewer: a sample rollout with its reused prefix marked."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from spec_rollout.report.texts import cut, plain
from spec_rollout.runs.load import Run, number

MAX_SAMPLES = 12
MAX_TOKENS = 20_000  # shown one by one, of a sample


def pick_samples(
    samples: Sequence[dict[str, Any]], limit: int = MAX_SAMPLES
) -> list[dict[str, Any]]:
    """At most `limit` samples spread evenly over the run, first and last included."""
    if len(samples) <= limit:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (limit - 1))] for i in range(limit)]


def _count(value: object) -> int:
    found = number(value)
    return max(0, int(found)) if found is not None else 0


def response_html(sample: dict[str, Any]) -> str:
    """The response with its reused part in <mark class="reused">.

    A sample holds either `tokens` (list of strings, with `accepted_tokens` and optionally
    `logprobs`), shown token by token, or `response` (one string, with `accepted_chars`).
    """
    tokens = sample.get("tokens")
    if isinstance(tokens, list):
        logprobs = sample.get("logprobs")
        logprobs = logprobs if isinstance(logprobs, list) else []
        accepted = _count(sample.get("accepted_tokens"))
        pieces = []
        for index, token in enumerate(tokens[:MAX_TOKENS]):
            logprob = number(logprobs[index]) if index < len(logprobs) else None
            title = f"token {index}" + ("" if logprob is None else f", log-prob {logprob:.3f}")
            pieces.append(f'<span title="{title}">{escape(cut(plain(token)))}</span>')
        if len(tokens) > MAX_TOKENS:
            more = len(tokens) - MAX_TOKENS
            pieces.append(f"<span>\N{HORIZONTAL ELLIPSIS} ({more:,} more tokens)</span>")
        reused, fresh = "".join(pieces[:accepted]), "".join(pieces[accepted:])
    else:
        text = cut(plain(sample.get("response", "")))
        accepted = _count(sample.get("accepted_chars"))
        reused, fresh = escape(text[:accepted]), escape(text[accepted:])
    return (f'<mark class="reused">{reused}</mark>' if reused else "") + fresh


def _facts(sample: dict[str, Any]) -> str:
    facts = [f"step {_count(sample.get('step'))}"]
    reward = number(sample.get("reward"))
    if reward is not None:
        facts.append(f"reward {reward:g}")
    tokens = sample.get("tokens")
    total = len(tokens) if isinstance(tokens, list) else _count(sample.get("response_tokens"))
    reused = number(sample.get("accepted_tokens"))
    if total and reused is not None:
        facts.append(f"{reused:.0f} of {total} tokens reused")
    return " · ".join(facts)


def samples_html(run: Run) -> str:
    """All chosen samples of a run; empty if it recorded none."""
    return "".join(
        f'<article class="sample"><p class="facts">{escape(_facts(sample))}</p>'
        f'<pre class="prompt">{escape(cut(plain(sample.get("prompt", ""))))}</pre>'
        f'<pre class="response">{response_html(sample)}</pre></article>'
        for sample in pick_samples(run.samples)
    )
