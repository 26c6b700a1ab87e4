"""Which sample of its prompt a request is, and whether it is the first to ask for it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Prompt:
    """What is known of one prompt's samples."""

    served: dict[int, int] = field(default_factory=dict)  # sample -> policy version it was asked in
    running: set[int] | None = None  # mostly none do, and an empty set takes 200 bytes
    version: int = -1  # policy version of `arrived`
    arrived: int = 0


class SampleNumbers:
    """The samples asked for, by prompt, since the weights changed, and those that still run.

    Of engines whose weights never change, prompts used longest ago are forgotten. A forgotten
    prompt's samples count as never asked for: they may draw the noise of the same policy version
    once more. So the bound is far above what a policy version asks for.

    Args:
        max_prompts: Remembered at most, apart from those whose samples run. One takes about 1 KB
            with 16 samples.
    """

    def __init__(self, max_prompts: int = 1 << 17) -> None:
        self._max_prompts = max_prompts
        self._version = -1
        self._prompts: OrderedDict[bytes, _Prompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prompts)

    def begin(self, prompt: bytes, sample: int, version: int) -> bool:
        """A request for a sample has come.

        Args:
            prompt: Key of its prompt.
            sample: Index within the prompt's group.
            version: Number of weight changes so far.

        Returns:
            Whether it is the first for this sample since the weights changed. A further one must
            not draw with the same noise.
        """
        entry = self._entry(prompt, version)
        running = entry.running or set()
        if sample in running or entry.served.get(sample, -1) == version:
            return False
        entry.served[sample] = version
        running.add(sample)
        entry.running = running
        self._forget()
        return True

    def next_sample(self, prompt: bytes, version: int) -> int:
        """The number of a request that names none: it is the k-th since the weights changed.

        Numbers of samples that still run are left out.
        """
        entry = self._entry(prompt, version)
        if entry.version != version:
            entry.version, entry.arrived = version, 0
        while entry.running is not None and entry.arrived in entry.running:
            entry.arrived += 1
        entry.arrived += 1
        return entry.arrived - 1

    def end(self, prompt: bytes, sample: int) -> None:
        """The request that `begin` was told of is over."""
        entry = self._prompts.get(prompt)
        if entry is not None and entry.running is not None:
            entry.running.discard(sample)
            entry.running = entry.running or None

    def _entry(self, prompt: bytes, version: int) -> _Prompt:
        if version != self._version:  # what was asked for before matters only where it runs on
            self._version = version
            self._prompts = OrderedDict(
                (key, entry) for key, entry in self._prompts.items() if entry.running
            )
        entry = self._prompts.get(prompt)
        if entry is None:
            entry = self._prompts[prompt] = _Prompt()
        else:
            self._prompts.move_to_end(prompt)
        return entry

    def _forget(self) -> None:
        in_use = 0
        while len(self._prompts) - in_use > self._max_prompts:
            key, entry = next(iter(self._prompts.items()))
            if entry.running:
                self._prompts.move_to_end(key)
                in_use += 1
            else:
                del self._prompts[key]
