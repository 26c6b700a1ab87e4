"""New weights for a model in use, by vLLM's layerwise reload.

vLLM repacks tensors after it has loaded them (experts, quantised layers, CPU kernels). What a
checkpoint holds can therefore not be copied into them. The reload gives a layer its tensors of
before, loads into those, repacks, and copies the result to where the engine reads it. Layers that
are stored as they were loaded are written in place, which is faster.

A layer of which a part is given would get uninitialised memory for the rest. So the names are
tried first, without a write (`rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WRAPPER = "online_process_loader"  # of weight loaders in a reload


class WeightUpdate:
    """One update of a worker's model: `load` any number of times, then `finish` or `abort`."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._model = worker.model_runner.get_model()
        repacked = [layer for layer in self._model.modules() if not stored_as_loaded(layer)]
        self._repacked = Part(self._model, repacked)
        self._before = _tensors_of(self._model)
        with config_of(worker):
            self._repacked.start()

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads some weights, named as in the checkpoint; whole layers are in use at once."""
        with config_of(self._worker), torch.no_grad(), _constants_kept():
            self._model.load_weights(named_tensors)

    def finish(self) -> None:
        """Puts the last layers into use, and what was made from weights of before."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with config_of(self._worker), torch.no_grad(), _constants_kept(), _quiet():
            finalize_layerwise_reload(self._repacked, self._worker.vllm_config.model_config)
            self.abort()
            self._keep_places()
            refresh_derived(self._model)
        reset = getattr(self._worker.model_runner, "reset_lora_state", None)
        if reset is not None:
            reset()

    def abort(self) -> None:
        """Leaves layers that are not loaded whole with their weights of before."""
        self._repacked.restore()

    def _keep_places(self) -> None:
        """Tensors that a load has replaced are where CUDA graphs have their address again."""
        for held, before in self._before:
            for name, old in before.items():
                new = held.get(name)
                if new is not None and new is not old and old is not None and _alike(new, old):
                    old.data.copy_(new)
                    held[name] = old


def refresh_derived(model: torch.nn.Module) -> None:
    """Makes anew what vLLM makes from weights on the first forward and keeps."""
    module: Any
    for module in model.modules():
        combined = getattr(module, "_combined_gate_weight", None)
        if combined is not None:  # in place: CUDA graphs have its address
            combined.copy_(torch.cat([module.gate.weight, module.shared_expert_gate.weight]))


_Held = list[tuple[dict[str, Any], dict[str, Any]]]


def _tensors_of(model: torch.nn.Module) -> _Held:
    """What holds the tensors of each layer, and what is in it now."""
    held = [h for x in model.modules() for h in (x._parameters, x._buffers)]
    return [(each, dict(each)) for each in held]


class Part:
    """Some layers of a model, as vLLM's reload sees a model."""

    def __init__(self, model: Any, layers: list[torch.nn.Module]) -> None:
        self._model = model
        self._layers = layers
        # vLLM's reload would drop the names of tensors that were given up after packing.
        self._given_up = [
            (layer, name) for layer in layers for name, p in layer._parameters.items() if p is None
        ]
        self._torchao = getattr(model, "_do_torchao_reload", None)

    def modules(self) -> list[torch.nn.Module]:
        return self._layers

    def start(self) -> None:
        """Makes the layers ready to be loaded."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        try:
            if self._torchao is not None:
                self._model._do_torchao_reload = False  # it would start a reload for each piece
            initialize_layerwise_reload(self)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Gives layers in mid-reload the tensors that the engine reads; all get their loaders."""
        from vllm.model_executor.model_loader.reload import layerwise

        if self._torchao is not None:
            self._model._do_torchao_reload = self._torchao
        for layer in self._layers:
            info = info_of(layer)
            if info.can_load() and info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
                info.reset()
            tensor: Any
            for tensor in (*layer._parameters.values(), *layer._buffers.values()):
                # vLLM leaves its wrapper on tensors that it never moves, as biases: loads past
                # the reload would be dropped.
                loader = getattr(tensor, "weight_loader", None)
                if tensor is not None and getattr(loader, "__name__", "") == _WRAPPER:
                    tensor.weight_loader = layerwise._get_original_loader(tensor)
        for layer, name in self._given_up:
            if not hasattr(layer, name):
                layer.register_parameter(name, None)


def stored_as_loaded(layer: torch.nn.Module) -> bool:
    """Whether a layer's tensors are what its weight loaders were made for."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(layer, "quant_method", None)
    if type(method) not in (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        return False
    if hasattr(layer, "process_weights_after_loading"):
        return False
    loaded = {name: t for kept in info_of(layer).restore_metadata for name, t in kept.items()}
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        was = loaded.pop(name, None)
        if tensor is None or was is None:  # vLLM remembers none of what stays in place
            continue
        if (was.shape, was.dtype, was.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            return False
    return not loaded


@contextmanager
def _constants_kept() -> Iterator[None]:
    """What a layer has beside its weights, and padding, is not left uninitialised."""
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.materialize_layer

    def materialize_layer(layer: torch.nn.Module, info: Any) -> None:
        original(layer, info)
        loaded = {name for name, _ in info.loaded_weights}
        padded = info.load_numel < info.load_numel_total
        for kept in info.kernel_tensors or ():
            for name, old in kept.items():
                new = getattr(layer, name, None)
                if new is None or new is old:
                    continue
                if name in loaded:
                    if padded:
                        new.data.zero_()
                elif _alike(new, old):
                    new.data.copy_(old)

    layerwise.materialize_layer = materialize_layer
    try:
        yield
    finally:
        layerwise.materialize_layer = original


def config_of(worker: Any) -> Any:
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(worker.vllm_config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warning of every layer that has no weights, or gets none."""
    from vllm.model_executor.model_loader.reload import layerwise

    disabled = layerwise.logger.disabled
    layerwise.logger.disabled = True
    try:
        yield
    finally:
        layerwise.logger.disabled = disabled


def info_of(layer: torch.nn.Module) -> Any:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
