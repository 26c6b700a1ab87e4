"""Weights as a trainer has them, made those of a checkpoint, and checked before any is written.

transformers keeps some weights otherwise than their files have them (all experts of a layer as one
tensor). vLLM reads files. So what comes under the names of the trainer's model is turned into what
`save_pretrained` would write; names of the file are taken as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from spec_rollout.engines.vllm.compat import Described
from spec_rollout.engines.weight_names import is_adapter, merged_name, plain_name

Named = list[tuple[str, torch.Tensor]]
# Weights of a checkpoint: {"layers": {layer: names}, "partial": layers}, or {"error": why}.
Destinations = Callable[[list[Described]], Mapping[str, Any]]


class Weights:
    """What an update of one engine has to be.

    Args:
        config: The model's configuration, of transformers.
        trust_remote_code: Whether the model's own code may be run.
        destinations: Asks vLLM which of its layers take which weights.
    """

    def __init__(self, config: Any, *, trust_remote_code: bool, destinations: Destinations) -> None:
        self._destinations = destinations
        self._model = _empty_model(config, trust_remote_code)
        self._dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
        self._aliases: dict[str, str] = {}  # weights tied to another: that other
        self._shapes: dict[str, torch.Size] = {}  # in transformers
        self._in_file: dict[str, torch.Size] = {}
        self._layers: Mapping[str, Sequence[str]] = {}
        self._taken: set[str] = set()
        self._trained: set[str] = set()  # in the file; vLLM need not take constants
        if self._model is not None:
            self._learn(self._model)

    def ready(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Named:
        """The update under names and in the layout of the checkpoint, in its order.

        All tensors are held until it returns.

        Raises:
            ValueError: naming the first weight that is unknown, given twice, of another shape, tied
                to one with other values, or not taken by vLLM; or a layer of vLLM's of which a
                part only is given.
        """
        given: dict[str, torch.Tensor] = {}
        for name, tensor in named_tensors:
            known = self._known(name)
            if known in given:
                raise ValueError(f"named_tensors: expected each name once, got {name!r} again")
            own = self._aliases.get(known, known)
            shape = self._shapes.get(own, self._in_file.get(own))
            if shape is not None and tensor.shape != shape:
                raise ValueError(
                    f"named_tensors: expected {name!r} of shape {list(shape)}, got "
                    f"{list(tensor.shape)}"
                )
            given[known] = tensor.detach()
        if self._model is None:
            return self._as_given(given)
        self._untie(given)
        update = self._to_file(given)
        names = {name for name, _ in update}
        if len(names) < len(update):
            twice = sorted(name for name, _ in update)
            name = next(a for a, b in pairwise(twice) if a == b)
            raise ValueError(
                f"named_tensors: expected each weight once, got {name!r} both as in the model's "
                "state dict and as in its checkpoint"
            )
        self._check_whole(names)
        order = {name: i for i, name in enumerate(self._in_file)}
        return sorted(update, key=lambda item: order[item[0]])

    def _learn(self, model: torch.nn.Module) -> None:
        weights = model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        for name, tensor in weights.items():
            other = first.setdefault(id(tensor), name)
            if other != name:
                self._aliases[name] = other
        own = {name: t.detach() for name, t in weights.items() if name not in self._aliases}
        self._shapes = {name: tensor.shape for name, tensor in own.items()}
        in_file = self._to_file(own)
        self._in_file = {name: tensor.shape for name, tensor in in_file}
        asked = [(name, list(shape), self._dtype) for name, shape in self._in_file.items()]
        self._layers = self._ask(asked)["layers"]
        self._taken = {name for names in self._layers.values() for name in names}
        parameters = {name: t.detach() for name, t in model.named_parameters()}
        self._trained = {name for name, _ in self._to_file(parameters)}

    def _ask(self, weights: list[Described]) -> Mapping[str, Any]:
        found = self._destinations(weights)
        if "error" in found:
            raise ValueError(
                "named_tensors: this engine's weights cannot be updated with those of a "
                f"checkpoint: {found['error']}"
            )
        return found

    def _known(self, given: str) -> str:
        """The name, in transformers or in the file, of a weight under a trainer's name."""
        name = plain_name(given)
        if self._model is not None:
            for candidate in (given, name, merged_name(name)):
                if candidate in self._shapes or candidate in self._in_file:
                    return candidate
                if candidate in self._aliases:
                    return candidate
        if is_adapter(name):
            raise ValueError(
                "named_tensors: expected merged weights, as the engine has no adapter, got "
                f"{given!r} (with peft: merge_adapter(), then all names without lora_)"
            )
        if self._model is None:
            return merged_name(name)
        raise ValueError(
            "named_tensors: expected names of the model's state dict or of its checkpoint, got "
            f"{given!r}"
        )

    def _untie(self, given: dict[str, torch.Tensor]) -> None:
        """Leaves one name of each weight that has several."""
        for name in [n for n in given if n in self._aliases]:
            tensor, other = given.pop(name), self._aliases[name]
            same = given.setdefault(other, tensor)
            if same is not tensor and not _equal(same, tensor):
                raise ValueError(
                    f"named_tensors: expected {name!r} equal to {other!r}, to which the engine's "
                    "model ties it, got other values"
                )

    def _check_whole(self, names: set[str]) -> None:
        for name in names:
            if name not in self._in_file:
                raise ValueError(
                    "named_tensors: expected all weights that the checkpoint keeps together, got "
                    f"a part, which makes {name!r}"
                )
        for layer, sources in self._layers.items():
            trained = [name for name in sources if name in self._trained]
            missing = [name for name in trained if name not in names]
            if missing and len(missing) < len(trained):
                there = next(name for name in trained if name in names)
                raise ValueError(
                    f"named_tensors: expected all weights of vLLM's layer {layer!r} or none, got "
                    f"{there!r} without {missing[0]!r}"
                )
        for name in sorted(names - self._taken):
            if name in self._trained:
                raise ValueError(
                    f"named_tensors: vLLM's model has no place for {name!r}, which it left out "
                    "when it was loaded, too"
                )

    def _to_file(self, named: Mapping[str, torch.Tensor]) -> Named:
        own = {name: tensor for name, tensor in named.items() if name in self._shapes}
        rest = [(name, tensor) for name, tensor in named.items() if name not in self._shapes]
        return [*_reverted(self._model, own), *rest]

    def _as_given(self, given: Mapping[str, torch.Tensor]) -> Named:
        """For models that transformers does not know: names of the file only."""
        found = self._ask([(n, list(t.shape), _dtype_name(t)) for n, t in given.items()])
        taken = {name for names in found["layers"].values() for name in names}
        for name in given:
            if name not in taken:
                raise ValueError(f"named_tensors: vLLM's model has no place for {name!r}")
        if found["partial"]:
            layer = found["partial"][0]
            raise ValueError(
                f"named_tensors: expected all weights of vLLM's layer {layer!r} or none, got only "
                f"{found['layers'][layer]}"
            )
        return list(given.items())


def _empty_model(config: Any, trust_remote_code: bool) -> Any:
    """transformers' model without memory for its weights; None if it has none of this kind."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    made = [getattr(transformers, name, None) for name in names]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for kind in made:
                if kind is not None:
                    return kind._from_config(config)
            return transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
        except (ValueError, ImportError, AttributeError, RuntimeError, TypeError):
            return None  # names are those of the file then; vLLM judges them


def _reverted(model: Any, named: dict[str, torch.Tensor]) -> Named:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers before 5 keeps what its files have
        return list(named.items())
    return list(revert_weight_conversion(model, named).items())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b.to(a.device))


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
