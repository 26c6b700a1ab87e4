"""The token viewer: responses laid over their drafts, each through the epochs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any, TypeVar

from spec_rollout.report.texts import cut, plain
from spec_rollout.runs.load import Run, number

MAX_SAMPLES = 12
MAX_TOKENS = 20_000  # shown one by one, of a sample
MAX_FOLLOWED = 3  # responses of a run
MAX_EPOCHS = 8  # of a response

Sample = dict[str, Any]
T = TypeVar("T")


def pick_samples(samples: Sequence[T], limit: int = MAX_SAMPLES) -> list[T]:
    """At most `limit` samples spread evenly over the run, first and last included."""
    if len(samples) <= limit:
        return list(samples)
    if limit == 1:
        return [samples[-1]]
    return [samples[round(i * (len(samples) - 1) / (limit - 1))] for i in range(limit)]


def followed(samples: Sequence[Sample], limit: int = MAX_FOLLOWED) -> list[list[Sample]]:
    """The epochs of at most `limit` responses, in order; those that met most drafts come first.

    Samples that do not say which row of the data they are of are left out.
    """
    # Places of the samples, which may be more than memory holds.
    rows: dict[float, list[int]] = {}
    num_cut: Counter[float] = Counter()  # epochs in which a part of the draft was kept
    for place, sample in enumerate(samples):
        row = number(sample.get("row"))
        if row is not None:
            rows.setdefault(row, []).append(place)
            num_cut[row] += 0 < _kept(sample) < len(_draft_tokens(sample))
    chosen = sorted(rows, key=lambda row: (-num_cut[row], -len(rows[row])))[:limit]
    return [[samples[place] for place in pick_samples(rows[row], MAX_EPOCHS)] for row in chosen]


def _count(value: object) -> int:
    found = number(value)
    return max(0, int(found)) if found is not None else 0


def _kept(sample: Sample) -> int:
    return _count(sample.get("accepted_tokens"))


def _draft(sample: Sample) -> dict[str, Any]:
    draft = sample.get("draft")
    return draft if isinstance(draft, dict) else {}


def _draft_tokens(sample: Sample) -> list[Any]:
    tokens = _draft(sample).get("tokens")
    return tokens if isinstance(tokens, list) else []


def _values(holder: dict[str, Any], key: str, index: int) -> str | None:
    values = holder.get(key)
    if not isinstance(values, list) or index >= len(values):
        return None
    value = number(values[index])
    return None if value is None else f"{value:.3f}"


# What is shown when the pointer is on a token (style.py writes the words): old and new log-prob,
# threshold, draw; of a new token its log-prob.
_DRAFT_FACTS = {"q": "old_logprobs", "p": "new_logprobs", "h": "thresholds", "u": "draws"}


def _token(token: object, index: int, facts: dict[str, str | None], kind: str = "") -> str:
    known = "".join(f' data-{name}="{value}"' for name, value in facts.items() if value is not None)
    shown = f' class="{kind}"' if kind else ""
    return f'<b{shown} data-i="{index}"{known}>{escape(cut(plain(token)))}</b>'


def _span(sample: Sample, start: int, end: int, *, of_draft: bool) -> str:
    """Tokens `start` to `end` of the draft, or of the response."""
    draft = _draft(sample)
    source = draft if of_draft else sample
    tokens = source.get("tokens")
    tokens = tokens[:MAX_TOKENS] if isinstance(tokens, list) else []
    kept = _kept(sample)
    names = _DRAFT_FACTS if of_draft else {"l": "logprobs"}
    parts = [
        _token(
            tokens[i],
            i,
            {name: _values(source, key, i) for name, key in names.items()},
            "cut" if of_draft and i == kept else "",
        )
        for i in range(start, min(end, len(tokens)))
    ]
    total = len(source["tokens"]) if tokens else 0
    if start <= MAX_TOKENS < end and total > MAX_TOKENS:
        parts.append(f"\N{HORIZONTAL ELLIPSIS} ({total - MAX_TOKENS:,} more tokens)")
    return "".join(parts)


def laid_over_draft(sample: Sample) -> str:
    """The accepted prefix, and behind it side by side how the draft went on and what was
    generated instead."""
    kept, num_draft = _kept(sample), len(_draft_tokens(sample))
    tokens = sample.get("tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    prefix = _span(sample, 0, kept, of_draft=num_draft > 0)
    rest = _span(sample, kept, num_draft, of_draft=True)
    new = _span(sample, kept, num_tokens, of_draft=False)
    html = f'<pre class="kept">{prefix}</pre>' if prefix else ""
    if rest:
        html += (
            '<div class="fork"><div><h4>the draft went on</h4>'
            f'<pre class="gone">{rest}</pre></div>'
            f'<div><h4>generated instead</h4><pre class="new">{new}</pre></div></div>'
        )
    elif new:
        html += f'<pre class="new">{new}</pre>'
    return html


def response_html(sample: Sample) -> str:
    """The response with its reused part in <mark class="reused">: of a sample that knows nothing of
    its draft.

    It holds either `tokens` (list of strings, with `accepted_tokens` and optionally `logprobs`),
    shown token by token, or `response` (one string, with `accepted_chars`).
    """
    tokens = sample.get("tokens")
    if isinstance(tokens, list):
        accepted = _kept(sample)
        reused = _span(sample, 0, min(accepted, len(tokens)), of_draft=False)
        fresh = _span(sample, accepted, len(tokens), of_draft=False)
    else:
        text = cut(plain(sample.get("response", "")))
        accepted = _count(sample.get("accepted_chars"))
        reused, fresh = escape(text[:accepted]), escape(text[accepted:])
    return (f'<mark class="reused">{reused}</mark>' if reused else "") + fresh


def _facts(sample: Sample) -> str:
    facts = [f"step {_count(sample.get('step'))}"]
    epoch = number(sample.get("epoch"))
    if epoch is not None:
        facts.insert(0, f"epoch {epoch + 1:.0f}")
    reward = number(sample.get("reward"))
    if reward is not None:
        facts.append(f"reward {reward:g}")
    tokens = sample.get("tokens")
    total = len(tokens) if isinstance(tokens, list) else _count(sample.get("response_tokens"))
    reused = number(sample.get("accepted_tokens"))
    if total and reused is not None:
        num_draft = len(_draft_tokens(sample))
        if num_draft:
            facts.append(f"{reused:.0f} of {num_draft} draft tokens kept, {total - reused:.0f} new")
        elif "draft" in sample:
            facts.append(f"{total} tokens, no draft")
        else:
            facts.append(f"{reused:.0f} of {total} tokens reused")
    lenience = number(sample.get("log_lenience"))
    if lenience is not None:
        facts.append(f"log_lenience {lenience:g}")
    return " · ".join(facts)


def _prompt(sample: Sample) -> str:
    return f'<pre class="prompt">{escape(cut(plain(sample.get("prompt", ""))))}</pre>'


def _followed_html(epochs: Sequence[Sample]) -> str:
    parts = [
        f'<p class="facts">{escape(_facts(sample))}</p>{laid_over_draft(sample)}'
        for sample in epochs
    ]
    return f'<article class="sample wide">{_prompt(epochs[-1])}{"".join(parts)}</article>'


def samples_html(run: Run, limit: int = MAX_FOLLOWED) -> str:
    """The chosen responses of a run, each through its epochs; single samples of a run that does not
    say which belong together. Empty if it recorded none.

    Args:
        limit: Responses that are followed.
    """
    if responses := followed(run.samples, limit):
        return "".join(_followed_html(epochs) for epochs in responses)
    return "".join(
        f'<article class="sample"><p class="facts">{escape(_facts(sample))}</p>{_prompt(sample)}'
        f'<pre class="response">{response_html(sample)}</pre></article>'
        for sample in pick_samples(run.samples)
    )


LEGEND = (
    '<mark class="reused">Kept</mark> from the draft; <b class="cut">rejected</b>, and '
    '<s>what the draft had behind it</s>; <b class="fresh">generated</b>. Point at a token for its '
    "log-probs, and for the draw that kept or rejected it. A response is shown in each epoch; the "
    "draft is the one above."
)
