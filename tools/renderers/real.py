"""Tables of bench_real.py: a model that speaks, rule by rule, in both engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from renderers.text import markdown_table, origin, speedup

Row = Mapping[str, Any]
_ENGINES = {"vllm": "vLLM", "embedded": "embedded"}
_ORDERS = ("as they come", "longest first")
_SUMMARY = {
    ("later", "none"): "plugin, nothing reused / stock",
    ("first", "drafting"): "first epoch, drafting",
    ("later", "drafting"): "later epochs, drafting",
    ("later", "coupled"): "`Coupled()`",
    ("later", "both"): "`Coupled()`, drafting",
    ("later", "lenient 0.5"): "`Lenient(0.5)`",
}


def _find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), None)


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    """Different values, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def real_table(content: Mapping[str, Any]) -> str:
    """Every size, what reuse gave at the largest, orders, crossovers, and guesses by entropy."""
    rows = content["rows"]
    training = content["training"]
    about = (
        f"Questions: {content['data']}. Temperature {content['temperature']}, responses of at most "
        f"{content['max_tokens']} tokens; an epoch of {training['updates']} updates between the "
        "policies. In each cell: speed-up of rollouts, everything counted, and of a training step, "
        f"per token. {_what_over_what(rows)}"
    )
    if _has_cold_stock(content):
        about += (
            " Stock vLLM was not warmed up, the plugin was: what is over stock flatters the plugin,"
            f" most at {max(_values(rows, 'requests'))} requests, the first call of stock's engine."
        )
    parts = [about]
    if content.get("entropy"):
        one = content["entropy"]
        parts[0] += (
            f" The new policy has {one['entropy']:.2f} nats a token and lies "
            f"{one['divergence']:.1e} nats from the old one."
        )
    parts.append(_speeds(rows, "cold stock" if _has_cold_stock(content) else "stock"))
    parts.append(_reuse(rows))
    if orders := _orders(rows):
        parts.append(orders)
    lines = [
        f"- {_ENGINES[c['engine']]}, {c['dtype']}, {c['phase']} epoch, {c['contender']}: "
        + c["text"]
        for c in content.get("crossovers", [])
        if c["at"] is not None or "no size" in c["text"]
    ]
    parts.append(
        "Where it stops paying (what is not named pays at all sizes tried):\n\n" + "\n".join(lines)
        if lines
        else "It pays at all sizes tried."
    )
    if content.get("entropy"):
        parts.append(_guesses(content["entropy"]))
    return "\n\n".join(parts)


# What a speed-up is over, by the contender that was the base.
_OVER = {
    "none": "`none`, the same engine, which reuses nothing",
    "same noise": "`same noise`, the same engine, which reuses nothing and draws the same noise",
    "stock": "stock vLLM",
}


def _what_over_what(rows: Sequence[Row]) -> str:
    """A sentence, from the bases that the rows themselves name."""
    over: dict[str, list[str]] = {}
    for row in rows:
        if "over_base" in row and row["contender"] != row["base"]:
            names = over.setdefault(row["base"], [])
            names += [row["contender"]] if row["contender"] not in names else []
    said = [
        f"{', '.join(f'`{name}`' for name in over[base])} over {what}"
        for base, what in _OVER.items()
        if base in over
    ]
    sentence = f"Divided are {'; '.join(said)}."
    if others := [f"`{name}`" for name in ("coupled", "both") if name in over.get("none", [])]:
        sentence += f" {' and '.join(others)} did not draw the noise of `none`: other texts."
    return sentence


def _has_cold_stock(content: Mapping[str, Any]) -> bool:
    """Files made before stock vLLM was warmed up as the other engine do not say that it was."""
    has_stock = any(row["contender"] == "stock" for row in content["rows"])
    return has_stock and not content.get("stock_is_warm")


def _speeds(rows: Sequence[Row], stock: str) -> str:
    """Every size; `stock` is what stock vLLM is called, in columns of what is over it."""
    columns = [
        (phase, name)
        for phase in ("first", "later")
        for name in _values([r for r in rows if r["phase"] == phase], "contender")
        if name not in ("stock", *_ORDERS) and (phase, name) != ("first", "none")
    ]
    lines = []
    for engine in _ENGINES:
        for dtype in _values(rows, "dtype"):
            for count in sorted(_values(rows, "requests")):
                here = [
                    _find(rows, engine=engine, dtype=dtype, requests=count, phase=p, contender=name)
                    for p, name in columns
                ]
                cells = [
                    f"{speedup(row['over_base'])}, {row['step_over_base']:.3g}x"
                    if row is not None and "over_base" in row
                    else ""
                    for row in here
                ]
                if any(cells):
                    lines.append([_ENGINES[engine], dtype, str(count), *cells])
    over_stock = {row["contender"] for row in rows if row.get("base") == "stock"}
    head = [
        f"{'first epoch: ' if phase == 'first' else ''}{name}"
        f"{f' (over {stock})' if name in over_stock else ''}"
        for phase, name in columns
    ]
    return markdown_table(["engine", "dtype", "requests", *head], lines)


def _reuse(rows: Sequence[Row]) -> str:
    """What is reused and how many steps are left, at the largest size of each engine and dtype."""
    lines = []
    for engine in _ENGINES:
        for dtype in _values(rows, "dtype"):
            here = [
                r
                for r in rows
                if (r["engine"], r["dtype"]) == (engine, dtype) and r["contender"] not in _ORDERS
            ]
            most = max((r["requests"] for r in here), default=0)
            lines += [
                [
                    _ENGINES[engine],
                    dtype,
                    str(most),
                    f"{r['phase']} epoch: {r['contender']}",
                    f"{r['reused']:.0%}",
                    f"{r['tokens_per_step']:.2f}",
                    f"{r['max_row_steps']:.0f}",
                    f"{r['num_engine_steps']:.0f}",
                    f"{r['computed_per_token']:.2f}" if r["computed_per_token"] else "",
                    f"{r['seconds']['p50']:.2f} s",
                ]
                for r in here
                if r["requests"] == most
            ]
    head = ["engine", "dtype", "requests", "", "reused", "tokens per step", "steps of the longest"]
    return markdown_table([*head, "engine steps", "computed per token", "median"], lines)


def _orders(rows: Sequence[Row]) -> str:
    lines = [
        [
            _ENGINES[r["engine"]],
            r["dtype"],
            f"{r['requests']} in {max(1, r['requests'] // 4)} slots",
            r["contender"],
            f"{r['num_engine_steps']:.0f}",
            f"{r['num_tail_steps']:.0f}",
            f"{r['tail_seconds']:.2f} s",
            f"{r['seconds']['p50']:.2f} s",
        ]
        for r in rows
        if r["contender"] in _ORDERS
    ]
    if not lines:
        return ""
    head = ["engine", "dtype", "requests", "order", "engine steps", "tail steps", "tail", "median"]
    return (
        "Requests that were long the last time begin first (drafting; the tail: fewer than a tenth "
        f"of the requests running):\n\n{markdown_table(head, lines)}"
    )


def _guesses(found: Mapping[str, Any]) -> str:
    names = list(found["right"])
    lines = []
    for one, after in zip(found["bins"], [*found["bins"][1:], None], strict=True):
        if one["tokens"]:
            up_to = "more" if after is None else f"{after['from']:g}"
            shares = ["" if one[name] is None else f"{one[name]:.0%}" for name in names]
            lines.append([f"{one['from']:g} to {up_to}", f"{one['tokens']:,}", *shares])
    return (
        "Guesses of the next token that pass, by the entropy of the policy there (nats):\n\n"
        f"{markdown_table(['entropy', 'tokens', *names], lines)}\n\n"
        "![Guesses that pass over entropy](../benchmarks/results/real.png)"
    )


def _speeds_at(rows: Iterable[Row | None], key: str = "over_base") -> str:
    return ", ".join("-" if row is None or key not in row else f"{row[key]:.2f}" for row in rows)


def real_summary_table(content: Mapping[str, Any]) -> str:
    """The README's few lines: of vLLM where it was measured, speed-ups by rule, dtype and size.

    What is over stock is left out where stock was not warmed up.
    """
    rows = content["rows"]
    dtypes, sizes = _values(rows, "dtype"), sorted(_values(rows, "requests"))
    engine = next(name for name in _ENGINES if name in _values(rows, "engine"))
    lines = []
    for (phase, contender), label in _SUMMARY.items():
        found = [row for row in rows if (row["phase"], row["contender"]) == (phase, contender)]
        if _has_cold_stock(content) and any(row.get("base") == "stock" for row in found):
            continue
        at = {
            (dtype, size): _find(
                rows, engine=engine, dtype=dtype, requests=size, phase=phase, contender=contender
            )
            for dtype in dtypes
            for size in sizes
        }
        largest = [at[dtype, sizes[-1]] for dtype in dtypes]
        lines.append(
            [
                label,
                ", ".join("-" if row is None else f"{row['reused']:.0%}" for row in largest),
                *(_speeds_at(at[dtype, size] for size in sizes) for dtype in dtypes),
                _speeds_at((at[dtypes[-1], size] for size in sizes), "step_over_base"),
            ]
        )
    tried = " / ".join(map(str, sizes))
    head = ["", f"reused, {sizes[-1]}", *dtypes, f"step, {dtypes[-1]}"]
    head[2] += f", {tried} requests"
    return f"{markdown_table(head, lines)}\n\n<sub>{_ENGINES[engine]}, {origin([content])}</sub>"
