"""Reference of `token_logprobs`, `sample_tokens` and `verify_prefix`: sorts, softmaxes and Python
loops in float64."""

from __future__ import annotations

import math

import torch

from spec_rollout.acceptance import AcceptanceRule, Coupled, OneHot
from spec_rollout.ops.reference.accept_prefix import accept_mask
from spec_rollout.ops.reference.noise import accept_uniforms, gumbel_noise


def scaled_logits(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """float32(logits) * (1 / T), both roundings in float32 as the kernels define them, as float64;
    T = 0 counts as 1."""
    temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(logits.shape[0])
    factor = torch.where(temperature > 0, 1.0 / temperature, 1.0)
    return (logits.float() * factor[:, None]).double()


def keep_mask(x: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Tokens that pass top-k, then top-p; ties with the last kept value pass. [vocab] -> [vocab]
    bool."""
    keep = x > -math.inf
    if 0 < top_k < x.numel():
        keep &= x >= x.sort(descending=True).values[top_k - 1]
    if top_p < 1.0:
        probs = torch.where(keep, x, -math.inf).softmax(0)
        order = probs.argsort(descending=True)
        reached = probs[order].cumsum(0) >= top_p
        last = int(reached.long().argmax()) if bool(reached.any()) else len(order) - 1
        keep &= x >= x[order[last]]
    return keep


def target_logprobs(
    logits: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Log-probabilities of the sampling distribution. [rows, vocab] -> [rows, vocab], float64;
    greedy rows: T = 1."""
    rows = logits.shape[0]
    temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(rows)
    top_k = torch.as_tensor(top_k).expand(rows)
    top_p = torch.as_tensor(top_p, dtype=torch.float32).expand(rows)
    x = scaled_logits(logits, temperature)
    for r in range(rows):
        if temperature[r] > 0:
            keep = keep_mask(x[r], int(top_k[r]), float(top_p[r]))
            x[r] = torch.where(keep, x[r], -math.inf)
    return x.log_softmax(dim=1)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """[num_tokens], float64."""
    return target_logprobs(logits, temperature).gather(1, token_ids.long()[:, None])[:, 0]


def sample_tokens(
    logits: torch.Tensor,
    *,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids [batch] int32 and logprobs [batch] float64."""
    logp = target_logprobs(logits, temperature, top_k, top_p)
    x = torch.where(logp.isneginf(), logp, scaled_logits(logits, temperature))
    noise = gumbel_noise(keys, positions.long(), logits.shape[1])
    greedy = torch.as_tensor(temperature, dtype=torch.float32).expand(len(keys)) == 0
    tokens = (x + torch.where(greedy[:, None], 0.0, noise)).argmax(dim=1)
    return tokens.int(), logp.gather(1, tokens[:, None])[:, 0]


def _decide(
    rule: AcceptanceRule,
    logp: torch.Tensor,
    x: torch.Tensor,
    token: int,
    draft_logprob: float,
    key: torch.Tensor,
    position: int,
    greedy: bool,
) -> tuple[bool, int]:
    """Whether a draft token is accepted, and the token that replaces it if not. logp, x:
    [vocab]."""
    where = torch.tensor([position])
    noise = gumbel_noise(key[None], where, x.numel())[0]
    uniform = accept_uniforms(key[None], where)[0]
    lenience = 0.0 if isinstance(rule, OneHot) else rule.kernel_params[1]
    if greedy:
        top = int(x.argmax())
        return (lenience > 0 if math.isinf(lenience) else top == token), top
    scores = torch.where(logp.isneginf(), logp, x) + noise
    if isinstance(rule, Coupled):
        if lenience == math.inf:
            return True, -1
        scores[token] += lenience
        if lenience == -math.inf and bool(scores.isneginf().all()):
            return True, token  # the only token there is
        best = int(scores.argmax())
        return best == token, best
    old = torch.tensor(draft_logprob, dtype=torch.float64)
    accepted = bool(accept_mask(old, logp[token], uniform, rule))
    if isinstance(rule, OneHot):
        scores[token] = -math.inf
    return accepted, int(scores.argmax())


def verify_prefix(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    cu_draft_lens: torch.Tensor,
    *,
    rule: AcceptanceRule,
    keys: torch.Tensor,
    positions: torch.Tensor | None = None,
    draft_logprobs: torch.Tensor | None = None,
    cu_logits_lens: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """accepted_lens [batch] int32, next_token_ids [batch] int32, logprobs [num_logits_rows]
    float64."""
    batch = len(keys)
    if cu_logits_lens is None:
        cu_logits_lens = cu_draft_lens.long() + torch.arange(batch + 1)
    per_row = (
        torch.as_tensor(temperature, dtype=torch.float32).expand(batch),
        torch.as_tensor(top_k).expand(batch),
        torch.as_tensor(top_p, dtype=torch.float32).expand(batch),
    )
    accepted_lens = torch.zeros(batch, dtype=torch.int32)
    next_token_ids = torch.full((batch,), -1, dtype=torch.int32)
    logprobs = torch.full((logits.shape[0],), math.nan, dtype=torch.float64)
    for r in range(batch):
        draft = slice(int(cu_draft_lens[r]), int(cu_draft_lens[r + 1]))
        tokens = draft_ids[draft].tolist()
        old = [math.nan] * len(tokens) if draft_logprobs is None else draft_logprobs[draft].tolist()
        start = 0 if positions is None else int(positions[r])
        temp, k, p = (v[r] for v in per_row)
        for i, row in enumerate(range(int(cu_logits_lens[r]), int(cu_logits_lens[r + 1]))):
            logp = target_logprobs(logits[row : row + 1], temp, k, p)[0]
            x = scaled_logits(logits[row : row + 1], temp)[0]
            if i < len(tokens):
                accepted, token = _decide(
                    rule, logp, x, tokens[i], old[i], keys[r], start + i, bool(temp == 0)
                )
                if accepted:
                    accepted_lens[r] = i + 1
                    logprobs[row] = logp[tokens[i]]
                    continue
            else:
                token = int(
                    sample_tokens(
                        logits[row : row + 1],
                        keys=keys[r : r + 1],
                        positions=torch.tensor([start + i]),
                        temperature=temp,
                        top_k=k,
                        top_p=p,
                    )[0]
                )
            next_token_ids[r] = token
            logprobs[row] = logp[token]
            break
    return accepted_lens, next_token_ids, logprobs
