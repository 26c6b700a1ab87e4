"""EleutherAI's lm-eval over an engine of this package: its tasks and metrics, our sampling.

Needs the extra `lm-eval`; nothing else of the package imports this module.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager

from spec_rollout.acceptance import Lenient
from spec_rollout.evals.sampling import decode_responses
from spec_rollout.packed import cu_lens_from
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import Drafts, RolloutRequests, Rollouts, SamplingParams

_MAX_GEN_TOKENS = 256  # where a task does not say, as in lm-eval's own models

TokenRequest = tuple[Any, list[int], list[int]]


class EngineLM(TemplateLM):
    """lm-eval's model class over a rollout session.

    Log-likelihoods come from the pass that verifies drafts: the continuation is a draft of which
    everything is accepted. Responses are generated to their end, and cut at a task's stop strings
    afterwards.

    Args:
        session: With the weights to be judged.
        tokenizer: A transformers tokenizer.
        stop_token_ids: What ends a response.
        max_length: Most tokens of prompt and response; longer prompts lose their beginning, as in
            lm-eval's own models.
        drafting: As `RolloutSession.evaluate_rows`, for responses.
    """

    def __init__(
        self,
        session: RolloutSession,
        tokenizer: Any,
        *,
        stop_token_ids: tuple[int, ...],
        max_length: int,
        drafting: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._session = session
        self._stop_token_ids = stop_token_ids
        self._drafting = drafting

    @property
    def eot_token_id(self) -> int:
        """See lm-eval."""
        found: int = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """See lm-eval."""
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """See lm-eval."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """See lm-eval."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """See lm-eval."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:  # a chat template may have put it there already
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return list(ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _cache_key, context, continuation in requests:
            if not continuation or len(continuation) >= self.max_length:
                raise ValueError(
                    f"lm-eval: expected a continuation of 1 to {self.max_length - 1} tokens, got "
                    f"{len(continuation)}"
                )
            rows.append((context[-(self.max_length - len(continuation)) :], continuation))
        greedy = self._greedy(rows)
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
        for length, indices in _grouped(len(continuation) for _, continuation in rows):
            chosen = [rows[index] for index in indices]
            given = self._scored(chosen, length)
            for index, logprobs in zip(indices, given.tolist(), strict=True):
                context, continuation = rows[index]
                is_greedy = greedy[tuple(context)][:length] == continuation
                answers[index] = (math.fsum(logprobs), is_greedy)
        for (cache_key, _context, _continuation), answer in zip(requests, answers, strict=True):
            if cache_key is not None:
                self.cache_hook.add_partial("loglikelihood", cache_key, answer)
        return answers

    def _scored(self, rows: Sequence[tuple[list[int], list[int]]], length: int) -> torch.Tensor:
        """Log-probs of continuations of one length. [rows, length], float32."""
        continuations = torch.tensor([continuation for _, continuation in rows])
        size = continuations.numel()
        drafts = Drafts(
            token_ids=continuations.flatten().int(),
            cu_lens=torch.arange(len(rows) + 1) * length,
            logprobs=torch.zeros(size, dtype=torch.float32),
            finished=torch.zeros(len(rows), dtype=torch.bool),
        )
        contexts = [context for context, _ in rows]
        requests = RolloutRequests(
            prompt_ids=torch.tensor([t for context in contexts for t in context]).int(),
            cu_prompt_lens=cu_lens_from(torch.tensor([len(context) for context in contexts])),
            keys=torch.zeros(len(rows), dtype=torch.int64),  # nothing is drawn
            drafts=drafts,
        )
        rollouts = self._session.engine.rollout(
            requests, SamplingParams(max_tokens=length), Lenient(math.inf)
        )
        if not torch.equal(rollouts.response_ids, drafts.token_ids):
            raise RuntimeError("lm-eval: expected the engine to keep a draft whole, got another")
        return rollouts.logprobs.view(len(rows), length)

    def _greedy(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[tuple[int, ...], Any]:
        """What greedy decoding gives after each context, as long as its longest continuation."""
        longest: dict[tuple[int, ...], int] = {}
        for context, continuation in rows:
            key = tuple(context)
            longest[key] = max(longest.get(key, 0), len(continuation))
        contexts = list(longest)
        found: dict[tuple[int, ...], Any] = {}
        for length, indices in _grouped(longest[context] for context in contexts):
            chosen = [contexts[index] for index in indices]
            rollouts = self._generated(chosen, SamplingParams(temperature=0.0, max_tokens=length))
            ids = rollouts.response_ids.view(len(chosen), length).tolist()
            found.update(zip(chosen, ids, strict=True))
        return found

    def _generated(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, drafting: bool = False
    ) -> Rollouts:
        seen: Counter[tuple[int, ...]] = Counter()
        sample_ids = []
        for prompt in map(tuple, prompts):
            sample_ids.append(seen[prompt])
            seen[prompt] += 1
        return self._session.evaluate_rows(
            [list(prompt) for prompt in prompts], sample_ids, sampling, step=0, drafting=drafting
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See lm-eval."""
        sums = []
        for (string,) in [request.args for request in requests]:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            sums.append(math.fsum(value for value, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), sums[-1])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval."""
        texts = [""] * len(requests)
        groups: dict[SamplingParams, list[tuple[int, list[int], list[str]]]] = defaultdict(list)
        for index, request in enumerate(requests):
            context, given = request.args
            sampling, until = self._sampling(given)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise ValueError(
                    f"lm-eval: expected a task with responses of less than {self.max_length} "
                    f"tokens (of prompt and response), got {sampling.max_tokens}"
                )
            groups[sampling].append((index, self.tok_encode(context)[-room:], until))
        for sampling, rows in groups.items():
            rollouts = self._generated([ids for _, ids, _ in rows], sampling, self._drafting)
            for (index, _ids, until), text in zip(
                rows, decode_responses(self.tokenizer, rollouts), strict=True
            ):
                texts[index] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _sampling(self, given: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """Sampling and stop strings of a task.

        Raises:
            ValueError: for what a task wants and the engines do not have.
        """
        options: dict[str, Any] = dict(
            normalize_gen_kwargs(dict(given), default_max_gen_toks=_MAX_GEN_TOKENS)
        )
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        options.pop("do_sample", None)
        sampling = SamplingParams(
            temperature=float(options.pop("temperature", 0.0)),
            top_k=max(0, int(options.pop("top_k", 0))),
            top_p=float(options.pop("top_p", 1.0)),
            max_tokens=int(options.pop("max_gen_toks")),
            stop_token_ids=self._stop_token_ids,
        )
        if options:
            raise ValueError(
                "lm-eval: expected generation with temperature, top_p, top_k and max_gen_toks "
                f"alone, got {', '.join(sorted(options))}"
            )
        return sampling, until


def _grouped(lengths: Iterable[int]) -> list[tuple[int, list[int]]]:
    """Indices by length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        groups[length].append(index)
    return sorted(groups.items())


def task_manager(tasks: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """What knows the tasks of lm-eval; nothing of a model is needed.

    Args:
        tasks: Names of tasks or groups (`lm-eval ls tasks` prints them).
        include_path: Folder with further task files.

    Raises:
        ValueError: naming tasks that lm-eval does not have.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"--lm-eval: expected tasks of lm-eval, got {', '.join(unknown)}")
    return manager


def run_harness(
    model: EngineLM,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    system_prompt: str | None = None,
) -> dict[str, dict[str, float]]:
    """Runs tasks of lm-eval.

    Args:
        tasks: As for `task_manager`.
        manager: From `task_manager`.
        limit: Take only the first documents of each task.
        chat_template: Put prompts through the tokenizer's chat template.
        system_prompt: First message of each chat, or the beginning of each text.

    Returns:
        Figures by metric ("acc,none") of each task and group.
    """
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat_template,
        system_instruction=system_prompt,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None  # one process has the results
    return {
        task: {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, numbers.Real) and not isinstance(value, bool)
        }
        for task, figures in results["results"].items()
    }
