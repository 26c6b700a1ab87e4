"""The requests that an engine serves by itself, from their first step until they are gone."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.worker.engine_history import EngineHistory
from spec_rollout.engines.vllm.worker.engine_side import Arrival, EngineSide
from spec_rollout.engines.vllm.worker.log_line import LogLine
from spec_rollout.engines.vllm.worker.masks import LogitMasks
from spec_rollout.engines.vllm.worker.request_state import Row


class LiveRequests:
    """Rows of the requests that no rollout call announced.

    Args:
        side: Decides what each is served with.
        history: What they are proposed from, and leave behind.
        first_chunk: Draft tokens of a first chunk.
        metrics: Gives the worker's counters as they are now.
        write_log: Takes a line for the log.
    """

    def __init__(
        self,
        side: EngineSide,
        history: EngineHistory,
        *,
        first_chunk: int,
        metrics: Callable[[], ReuseMetrics],
        write_log: Callable[[str], None],
    ) -> None:
        self.side = side
        self.history = history
        self._first_chunk = first_chunk
        self._metrics = metrics
        self._log_line = LogLine(side.options.log_seconds, write_log)
        self._rows: dict[str, tuple[Row, bytes, int]] = {}
        if history.is_shared:
            # With engines that may count alike, and with this one's earlier life. A replica that
            # shares has one worker, so there is no other that has to draw the same.
            side.renew_noise(secrets.randbits(62))

    def __len__(self) -> int:
        return len(self._rows)

    def serve(
        self,
        request_id: str,
        arrival: Arrival,
        *,
        prompt_len: int,
        max_response_len: int,
        stop_token_ids: frozenset[int],
        masks: LogitMasks | None,
    ) -> Row | None:
        """Our state of a request that was seen for the first time; None if it is vLLM's to sample.

        Arguments as in `ChunkProposer.new_row`.
        """
        served = self.side.admit(arrival)
        if served is None:
            return None
        if not self._rows:
            self.history.begin()
        slot = self.history.join(served.group, stop_token_ids, served.tag)
        row = Row(
            served.request,
            prompt_len=prompt_len,
            max_response_len=max_response_len,
            stop_token_ids=stop_token_ids,
            first_chunk=self._first_chunk,
            masks=masks,
            collect_id=-1,
            history_id=slot,
            is_drawn=arrival.params.temperature > 0,
        )
        if row.draft_len:
            self._metrics().draft_added(row.draft_len)
        if row.follows:
            self.history.follow(row)
        self._rows[request_id] = (row, served.group, served.sample)
        return row

    def noise_key(self, request_id: str) -> int | None:
        """The key that the noise of a live request's sample has, which its earlier rollouts had as
        well; None where nothing is to be had of it."""
        row, _, sample = self._rows.get(request_id, (None, b"", -1))
        return None if row is None or sample < 0 or row.rule.fresh_noise else row.key

    def shares_samples(self, arrival: Arrival, request_ids: Iterable[str]) -> bool:
        """Whether a request that comes is for the prompt of one of these live ones, where samples
        of a prompt are told apart."""
        if self.side.samples is None or arrival.prompt_ids is None:
            return False
        group = self.side.group_of(arrival)
        return any(i in self._rows and self._rows[i][1] == group for i in request_ids)

    def sweep(self, row_of: Callable[[str], Any]) -> None:
        """Lets go of requests that are finished or aborted; what they generated is remembered.

        Those that come next find what other engines shared.

        Args:
            row_of: Request id -> its row as the model runner has it now, None if it has none.
        """
        gone = [i for i, (row, _, _) in self._rows.items() if row_of(i) is not row]
        for request_id in gone:
            row, group, sample = self._rows.pop(request_id)
            if (followed := self.history.followed_by(row.history_id)) is not None:
                self._metrics().draft_followed(*followed, row.draft_len)
            self.history.leave(row.history_id)
            if sample >= 0 and self.side.samples is not None:
                self.side.samples.end(group, sample)
        self.history.receive()

    def end_step(self, num_rows: int, num_tokens: int) -> None:
        """A step is over; see `LogLine.step`."""
        self.history.receive()
        self._log_line.step(num_rows, num_tokens, self._metrics(), self._summary)

    def clear(self) -> None:
        """Forgets all; what live requests generate is not remembered either."""
        self.history.clear()

    def import_from(self, path: str) -> None:
        """Adds what a file holds; it may be of an engine with the same seed."""
        self.history.import_from(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        self.side.renew_noise(int.from_bytes(digest[:8], "little"))

    def info(self) -> dict[str, Any]:
        """Counters, and what is remembered."""
        return {**self.side.info(), **self.history.info(), "num_live": len(self._rows)}

    def _summary(self) -> str:
        counters, history = self.side.counters, self.history.info()
        return (
            f"requests: {counters.num_served:,} served, {counters.num_passed_by:,} passed by, "
            f"{counters.num_with_draft:,} with a rollout of their own; history: "
            f"{history['num_groups']:,} prompts, {history['num_bytes'] / 2**20:.0f} MiB"
            + (
                f", forgotten for want of room: {history['num_evicted_groups']:,} prompts, "
                f"{history['num_evicted_sequences']:,} rollouts"
                if history["num_evicted_sequences"]
                else ""
            )
            + (
                f"; shared: {history['num_shared']:,} given, {history['num_received']:,} taken"
                if "num_shared" in history
                else ""
            )
        )
