"""Which sample of its prompt a request is, and whether it is the first to ask for it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

# What a prompt takes, and each of its samples that was named, at most: keys and tables included.
_PROMPT_BYTES = 400
_SAMPLE_BYTES = 100


@dataclass(slots=True)
class _Prompt:
    """What is known of one prompt's samples since the weights changed."""

    named: dict[int, None] = field(default_factory=dict)  # asked for by number, the oldest first
    running: set[int] | None = None  # mostly none do, and an empty set takes 200 bytes
    arrived: int = 0  # numbers below it were given to requests without one

    def oldest_idle(self) -> list[int]:
        """The first of the samples named that do not run, some at a time: a dict that loses its
        first one again and again is slow to find it."""
        running = self.running or ()
        return list(islice((sample for sample in self.named if sample not in running), 1024))


class SampleNumbers:
    """The samples asked for, by prompt, since the weights changed, and those that still run.

    Where weights never change, what was used longest ago is forgotten. A forgotten sample counts as
    never asked for: it may draw the noise of the same policy version once more. So the bound is
    far above what a policy version asks for.

    Args:
        max_bytes: Bound of what is remembered, by estimate, apart from what runs: by default some
            60,000 prompts with 16 named samples, a million samples of one prompt, or 300,000
            prompts whose requests are counted.
    """

    def __init__(self, max_bytes: int = 1 << 27) -> None:
        self._max_bytes = max_bytes
        self._version = -1
        self._num_named = 0  # of all prompts
        self._prompts: OrderedDict[bytes, _Prompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def num_bytes(self) -> int:
        """What is remembered takes, by estimate."""
        return len(self._prompts) * _PROMPT_BYTES + self._num_named * _SAMPLE_BYTES

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
        if sample in running or sample in entry.named or sample < entry.arrived:
            return False
        entry.named[sample] = None
        self._num_named += 1
        self._run(entry, sample)
        return True

    def begin_next(self, prompt: bytes, version: int) -> int:
        """A request has come that names no sample: it is the k-th since the weights changed.

        Numbers of samples that still run are left out.

        Returns:
            Its number.
        """
        entry = self._entry(prompt, version)
        while entry.arrived in (entry.running or ()) or entry.arrived in entry.named:
            entry.arrived += 1
        sample = entry.arrived
        entry.arrived += 1
        self._run(entry, sample)
        return sample

    def end(self, prompt: bytes, sample: int) -> None:
        """The request that `begin` or `begin_next` was told of is over."""
        entry = self._prompts.get(prompt)
        if entry is not None and entry.running is not None:
            entry.running.discard(sample)
            entry.running = entry.running or None

    def _entry(self, prompt: bytes, version: int) -> _Prompt:
        if version != self._version:  # what was asked for before matters only where it runs on
            self._version = version
            self._prompts = OrderedDict(
                (key, _Prompt(running=entry.running))
                for key, entry in self._prompts.items()
                if entry.running
            )
            self._num_named = 0
        entry = self._prompts.get(prompt)
        if entry is None:
            entry = self._prompts[prompt] = _Prompt()
        else:
            self._prompts.move_to_end(prompt)
        return entry

    def _run(self, entry: _Prompt, sample: int) -> None:
        entry.running = entry.running or set()
        entry.running.add(sample)
        in_use = 0
        while self.num_bytes > self._max_bytes and in_use < len(self._prompts):
            key, oldest = next(iter(self._prompts.items()))
            if idle := oldest.oldest_idle():
                for number in idle:
                    del oldest.named[number]
                self._num_named -= len(idle)
            elif oldest.running:
                self._prompts.move_to_end(key)
                in_use += 1
            else:
                del self._prompts[key]
