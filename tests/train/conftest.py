"""Fixtures of whole runs."""

from __future__ import annotations

from whole_runs import one_thread, uninterrupted

__all__ = ["one_thread", "uninterrupted"]
