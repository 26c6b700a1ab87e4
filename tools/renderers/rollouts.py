"""Tables of rollouts in vLLM and of history drafting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renderers.text import markdown_table, seconds, speedup


def rollout_table(content: Mapping[str, Any]) -> str:
    """A file of bench_rollout.py: one line per share of accepted tokens."""
    rows = {(row["strategy"], row["share"]): row for row in content["rows"]}

    def cell(strategy: str, share: float | None) -> str:
        row = rows.get((strategy, share))
        if row is None:
            return ""
        return f"{seconds(row['seconds']['p50'])}, {row['engine_steps']} steps"

    def quotient(share: float, peer: str) -> str:
        wall = rows["inflight", share]["paired"].get(peer)
        return "" if wall is None else f"{wall['wall']:.2f}x"

    shares = [share for strategy, share in rows if strategy == "inflight"]
    strategies = ("two_pass", "inflight", "floor")
    lines = [
        [f"{share:.0%}", cell("vanilla", None), *(cell(name, share) for name in strategies)]
        + [quotient(share, name) for name in ("vanilla", "two_pass", "floor")]
        for share in shares
    ]
    header = [
        "accepted",
        "vanilla",
        *strategies,
        *(f"{n} / inflight" for n in ("vanilla", "two_pass", "floor")),
    ]
    no_key = rows["no key", None]["paired"]["stock"]["wall"]
    return (
        f"{markdown_table(header, lines)}\n\nStock vLLM: {cell('stock', None)}; its time over that "
        "of the same "
        f"requests in vLLM with the plugin: {no_key:.2f}x."
    )


def drafting_table(content: Mapping[str, Any]) -> str:
    """bench_drafting.py: what proposals give, and what finding them costs."""
    replays = [row for row in content["rows"] if row["op"] == "history drafting"]

    def proposed(row: Mapping[str, Any]) -> str | None:
        """What is said of how much was proposed; None for a row that is not shown."""
        most = row["max_tokens"]
        if "min_probability" in row:
            least = row["min_probability"]
            return f"{most}, if likelier than {least}" if least in (0.2, 0.5) else None
        if row["min_match"] == 1 and row["adaptive"] and most == 16:
            return f"{most}, at most twice the match"
        return str(most) if row["min_match"] == 1 and not row["adaptive"] and most == 8 else None

    shown = [
        [
            row["index"],
            row["history"],
            proposed(row),
            f"{row['tokens_per_step']:.2f}",
            f"{row['computed_per_output']:.2f}",
            f"{row['longest_rollout_steps_ratio']:.2f}x",
        ]
        for row in replays
        if proposed(row)
    ]
    header = ["index", "history", "tokens proposed", "tokens per step", "computed per token"]
    table = markdown_table([*header, "fewer steps of the longest rollout"], shown)
    speed = [row for row in content["rows"] if row["op"] != "history drafting"]
    lines = [
        [
            row["op"],
            f"{row['nanoseconds_per_token']:,.0f} ns",
            f"{row['bytes_per_token']:.1f}" if "bytes_per_token" in row else "",
        ]
        for row in speed
    ]
    return f"{table}\n\n{markdown_table(['index', 'per token', 'bytes per token'], lines)}"


def rollout_drafting_table(content: Mapping[str, Any]) -> str:
    """bench_rollout.py --table drafting: seconds and engine steps by mode."""
    lines = []
    for row in content["rows"]:
        vanilla = row.get("peers", {}).get("vanilla")
        computed = row["computed_tokens"] / row["shape"]["response_tokens"]
        lines.append(
            [
                str(row["shape"]["batch"]),
                row["rule"],
                row["mode"],
                f"{row['reused_share']:.0%}",
                seconds(row["seconds"]["p50"]),
                "" if vanilla is None else speedup(vanilla["speedup"]),
                str(row["engine_steps"]),
                f"{computed:.2f}",
            ]
        )
    header = ["requests", "rule", "mode", "tokens reused", "median", "vanilla / mode"]
    return markdown_table([*header, "engine steps", "computed per token"], lines)


_PASSES = {
    "first": "first pass",
    "second": "second pass",
    "updated": "after an update",
    "nothing": "nothing comes twice",
}


def serving_table(content: Mapping[str, Any]) -> str:
    """bench_serving.py: speed and engine steps beside those of stock vLLM, by what is asked."""
    rows = {(r["shape"]["batch"], r["which"], r["contender"]): r for r in content["rows"]}
    contenders = [name for name in dict.fromkeys(name for _, _, name in rows) if name != "stock"]
    lines = []
    for batch, which in dict.fromkeys((batch, which) for batch, which, _ in rows):
        stock = rows[batch, which, "stock"]
        line = [str(batch), _PASSES[which], f"{stock['engine_steps']:.0f}"]
        for name in contenders:
            row = rows.get((batch, which, name))
            line.append(
                ""
                if row is None
                else f"{speedup(row['tokens_per_second_over_stock'])}, "
                f"{row['engine_steps_over_stock']:.0%} of the steps, "
                f"{row['computed_per_token']:.2f}"
            )
        lines.append(line)
    table = markdown_table(["requests", "asked", "stock's steps", *contenders], lines)
    replays = [
        name
        for name in contenders
        if any(r["contender"] == name and r.get("same_as_first") == 1 for r in content["rows"])
    ]
    notes = [
        f"`{name}`, second pass: the texts of the first, token for token. It replays them, which "
        "no training does; what an epoch gains is `after an update`."
        for name in replays
    ]
    return "\n\n".join([table, *notes])


def soak_table(content: Mapping[str, Any]) -> str:
    """soak_serving.py: the first, a middle and the last part of the requests."""
    rows = content["rows"]
    lines = [
        [
            row["op"].removeprefix("requests "),
            f"{row['microseconds_per_token']:.1f} us",
            f"{row['resident_mib']:,.0f} MiB",
            f"{row['history_bytes'] / 2**20:.1f} MiB",
            f"{row['num_groups']:,}",
            f"{row['num_evicted_groups']:,}",
        ]
        for row in (rows[0], rows[len(rows) // 2], rows[-1])
    ]
    header = ["requests", "a token", "process", "history", "prompts remembered", "forgotten so far"]
    return markdown_table(header, lines)
