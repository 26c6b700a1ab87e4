"""The embedded engine: any Hugging Face causal LM, on CPU or one GPU, in the process of the
trainer."""

from __future__ import annotations

from spec_rollout.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
