"""Which layers of vLLM's model take which weights, found by a load in which nothing is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spec_rollout.engines.vllm.compat.reload import (
    Part,
    config_of,
    info_of,
    stored_as_loaded,
)

# Name as in the checkpoint, shape, dtype without "torch.".
Described = tuple[str, list[int], str]


def destinations(worker: Any, weights: Sequence[Described]) -> dict[str, Any]:
    """Which layers of the worker's model take which weights; writes nothing.

    Args:
        weights: All weights of a checkpoint.

    Returns:
        {"layers": {layer: names of weights}, "partial": layers that want more}; a weight that is in
        no layer is not taken. Instead {"error": why} where vLLM's model does not take such weights
        at all.
    """
    model = worker.model_runner.get_model()
    error = _cannot_reload(model)
    if error is not None:
        return {"error": error}
    sources = _Sources(model)
    in_place = {name for name, x in model.named_modules() if stored_as_loaded(x)}

    def empty() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape, dtype in weights:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            sources.add(name, tensor)
            yield name, tensor

    with _rehearsing(worker, model):
        layers = dict(model.named_modules())
        sources.find_owners()
        try:
            with sources:
                model.load_weights(empty())
        except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as found:
            text = " ".join(f"{type(found).__name__}: {found}".split())
            return {"error": f"{type(model).__name__} of vLLM does not take them: {text[:300]}"}
        partial = [name for name, layer in layers.items() if _is_partial(layer)]
        taken: dict[str, set[str]] = defaultdict(set)
        for name, layer in layers.items():
            for _, call in info_of(layer).loaded_weights:
                for value in call.arguments.values():
                    if isinstance(value, torch.Tensor):
                        taken[name] |= sources.of(value)
    for name, sources_of_layer in sources.written.items():
        past = sources_of_layer - taken[name]
        if past and name not in in_place:
            return {"error": f"vLLM's reload leaves {min(past)} out, which goes to {name}"}
        taken[name] |= sources_of_layer
    for name, sources_of_layer in sources.in_use.items():
        taken[name] |= sources_of_layer
    for name, dtype in sources.quantised.items():
        return {"error": f"the engine's checkpoint is quantised, and {name} takes {dtype} only"}
    filled = {name: sorted(names) for name, names in taken.items() if names}
    return {"layers": filled, "partial": [name for name in partial if name in filled]}


def _cannot_reload(model: torch.nn.Module) -> str | None:
    if hasattr(model, "process_weights_after_loading"):
        # vLLM runs it after the first load and leaves it out of a reload.
        return f"{type(model).__name__} has a step after loading that vLLM's reload leaves out"
    return None


def _is_partial(layer: torch.nn.Module) -> bool:
    """Whether a layer wants more weights; of a vocabulary the rest may be padding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    wanted = sum(p.numel() for p in layer._parameters.values() if p is not None)
    return info_of(layer).load_numel < wanted and not isinstance(layer, VocabParallelEmbedding)


class _Sources(TorchDispatchMode):
    """Follows weights on the meta device through what loaders do with them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = model
        self.owners: dict[int, str] = {}  # storage of a model's tensor: layer
        # Layer: weights copied into it; those that the reload leaves where they are.
        self.written: dict[str, set[str]] = defaultdict(set)
        self.in_use: dict[str, set[str]] = defaultdict(set)
        self.quantised: dict[str, str] = {}  # layer that wants its weights quantised: dtype
        self._names: dict[int, frozenset[str]] = {}
        self._alive: list[Any] = []  # so that no storage takes the place of another

    def find_owners(self) -> None:
        """Notes which layer has which tensor now."""
        for name, layer in self._model.named_modules():
            for tensor in (*layer._parameters.values(), *layer._buffers.values()):
                if tensor is not None:
                    self.owners[_storage(tensor)] = name

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._names[_storage(tensor)] = frozenset((name,))
        self._alive.append(tensor.untyped_storage())

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._names.get(_storage(tensor), frozenset())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = [a for a in args if isinstance(a, torch.Tensor)]
        for group in args:
            if isinstance(group, list | tuple):
                values += [a for a in group if isinstance(a, torch.Tensor)]
        names = frozenset[str]().union(*(self.of(value) for value in values))
        target = args[0] if args else None
        if func._schema.is_mutable and isinstance(target, torch.Tensor):
            owner = self.owners.get(_storage(target))
            if owner is None and names and not target.is_meta:
                self.find_owners()  # registered since
                owner = self.owners.get(_storage(target))
            if owner is not None:
                (self.written if target.is_meta else self.in_use)[owner].update(names)
                if any(_is_narrower(target, value) for value in values[1:]):
                    self.quantised.setdefault(owner, str(target.dtype).removeprefix("torch."))
                if not target.is_meta:
                    return target  # a rehearsal writes nothing
        out = func(*args, **(kwargs or {}))
        if names:
            for value in out if isinstance(out, list | tuple) else (out,):
                if isinstance(value, torch.Tensor) and _storage(value) not in self.owners:
                    self._names[_storage(value)] = names | self.of(value)
                    self._alive.append(value.untyped_storage())
        return out


@contextmanager
def _rehearsing(worker: Any, model: torch.nn.Module) -> Iterator[None]:
    """A reload in which no layer is ever complete; the model is as before after the block."""
    from vllm.model_executor.model_loader.reload import layerwise

    process = layerwise._layerwise_process
    layerwise._layerwise_process = lambda layer, info: None
    try:
        with config_of(worker):
            everything = Part(model, list(model.modules()))
            everything.start()
            try:
                yield
            finally:
                everything.restore()
    finally:
        layerwise._layerwise_process = process


def _is_narrower(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether what is written to `target` would have to be quantised first."""
    narrow = not target.is_floating_point() or target.dtype.itemsize < 2
    return narrow and source.is_floating_point() and source.dtype.itemsize >= 2


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
