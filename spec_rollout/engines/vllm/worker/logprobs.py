"""Log-probs of keyed requests in the form vLLM returns them (`SamplingParams(logprobs=n)`).

`VLLMEngine` does not go this way (see `collect`); other users of the plugin may. `logprobs=0` costs
one more read of the logits rows that gave a token (vLLM wants the token's rank), `logprobs=n > 0` a
float32 copy of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.engines.vllm.worker.transfer import to_device


class SampledLogprobs:
    """Builds vLLM's LogprobsTensors of one step.

    Args:
        num_top: Most likely tokens wanted besides the drawn one.
        num_columns: Tokens besides the drawn one that a row has room for, at least `num_top`:
            requests that are vLLM's to sample may want more. None: `num_top`.
        raw: Of the logits as the model gave them, temperature 1 (vLLM's `raw_logprobs`); else of
            the sampling distribution (`processed_logprobs`).
        temperature, top_k, top_p: A number, or [batch] on the logits' device.
        make: (token ids [n, columns] int32, log-probs float32, ranks [n]) -> vLLM's record of them.
    """

    def __init__(
        self,
        num_top: int,
        *,
        raw: bool,
        temperature: float | torch.Tensor,
        top_k: int | torch.Tensor,
        top_p: float | torch.Tensor,
        make: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any],
        num_columns: int | None = None,
    ) -> None:
        self.num_top = num_top
        self.num_columns = num_top if num_columns is None else num_columns
        self.raw = raw
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.make = make
        self._raw_logits: torch.Tensor | None = None

    def keep_raw(self, logits: torch.Tensor, will_change: bool) -> None:
        """Before masks are applied in place."""
        self._raw_logits = logits.clone() if self.raw and will_change else None

    def gather(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        requests: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> Any:
        """One drawn token per entry, of requests that are all ours.

        Args:
            logits: [num_rows, vocab].
            rows: Its logits row. [n], int64.
            requests: Its request. [n], int64.
            tokens: [n].
            logprobs: Of the sampling distribution. [n], float32.
        """
        return self.make(*self._gather(logits, rows, requests, tokens, logprobs))

    def _gather(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        requests: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        source = logits if self._raw_logits is None else self._raw_logits
        picked = source[rows]
        ids = tokens.to(torch.int64)[:, None]
        ranks = (picked >= picked.gather(1, ids)).sum(-1)
        if self.raw:
            logprobs = ops.token_logprobs(picked, tokens)
        if not self.num_top:
            return ids.to(torch.int32), logprobs[:, None], ranks
        x = picked.float()
        if not self.raw:
            x = self._processed(x, requests)
        top = torch.log_softmax(x, -1).topk(self.num_top, -1)
        return (
            torch.cat([ids, top.indices], 1).to(torch.int32),
            torch.cat([logprobs[:, None], top.values], 1),
            ranks,
        )

    def _processed(self, x: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
        def per_row(value: float | torch.Tensor) -> torch.Tensor:
            if isinstance(value, torch.Tensor):
                return value[requests][:, None]
            return torch.full_like(x[:, :1], value)

        temperature, top_k, top_p = map(per_row, (self.temperature, self.top_k, self.top_p))
        greedy = temperature <= 0
        x = x / torch.where(greedy, 1.0, temperature)
        ordered = x.sort(-1, descending=True).values
        last = torch.where((top_k > 0) & ~greedy, top_k, x.shape[1]).clamp(max=x.shape[1]) - 1
        floor = ordered.gather(1, last.long())
        ordered = ordered.masked_fill(ordered < floor, -torch.inf)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs
        kept = (before < top_p) | greedy
        floor = torch.maximum(floor, ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True))
        return x.masked_fill(x < floor, -torch.inf)

    def scatter(
        self,
        logits: torch.Tensor,
        shape: tuple[int, ...],
        runs: list[tuple[int, int, np.ndarray, np.ndarray]],
        stock: list[int],
        stock_output: Any,
    ) -> Any:
        """Rows of a whole step, at [request * width + i] for the request's token i.

        Args:
            shape: (batch, width) of the step's token ids.
            runs: (request, first logits row, tokens, log-probs) per keyed request.
            stock: Requests that vLLM's sampler drew for; their one token.
            stock_output: Its output for all requests.
        """
        device = logits.device
        batch, width = shape
        columns = 1 + self.num_columns
        ids = torch.zeros(batch * width, columns, dtype=torch.int32, device=device)
        # Where a request wants fewer than there is room for, vLLM has -inf, too.
        values = torch.full_like(ids, -torch.inf, dtype=torch.float32)
        ranks = torch.zeros(batch * width, dtype=torch.int64, device=device)
        if runs:

            def join(parts: list[np.ndarray]) -> torch.Tensor:
                return to_device(np.concatenate(parts), device)

            where = join([r * width + np.arange(t.size) for r, _, t, _ in runs])
            requests = join([np.full(t.size, r) for r, _, t, _ in runs])
            rows = join([first + np.arange(t.size) for _, first, t, _ in runs])
            tokens = join([t for _, _, t, _ in runs])
            logprobs = join([lp for _, _, _, lp in runs])
            ours = slice(1 + self.num_top)
            ids[where, ours], values[where, ours], ranks[where] = self._gather(
                logits, rows, requests, tokens, logprobs
            )
        if stock and stock_output.logprobs_tensors is not None:
            from_ = to_device(np.array(stock, np.int64), device)
            theirs = stock_output.logprobs_tensors
            at = from_ * width
            n = theirs.logprob_token_ids.shape[1]
            ids[at, :n] = theirs.logprob_token_ids[from_]
            values[at, :n] = theirs.logprobs[from_]
            ranks[at] = theirs.selected_token_ranks[from_].to(torch.int64)
        return self.make(ids, values, ranks)
