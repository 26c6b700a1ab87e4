"""Of which model an engine's rollouts are: engines share them with their like."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from spec_rollout.drafting import HistoryIdentity


def history_identity(vllm_config: Any) -> HistoryIdentity:
    """Model and vocabulary of an engine.

    Weights are no part of it: a rollout is a draft under any weights that come later.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    return HistoryIdentity(
        model=str(model.model),
        architecture=(
            f"{text.model_type}, {getattr(text, 'num_hidden_layers', '?')} layers of "
            f"{getattr(text, 'hidden_size', '?')}"
        ),
        vocab_size=model.get_vocab_size(),
        tokenizer=_digest(model),
    )


def _digest(model_config: Any) -> str:
    """Of what the token ids stand for, however the tokenizer's files are written."""
    if model_config.skip_tokenizer_init:
        return ""
    try:
        from vllm.tokenizers import cached_tokenizer_from_config
    except ImportError:  # older ones
        from vllm.transformers_utils.tokenizer import cached_tokenizer_from_config
    vocabulary = cached_tokenizer_from_config(model_config).get_vocab()
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
