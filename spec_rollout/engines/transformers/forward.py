"""One model forward over a slot cache: masks, positions, and logits only where they are wanted."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.engines.transformers.attention import (
    BATCH_INVARIANT_ATTENTION,
    batch_invariant_attention,
    span_mask,
)
from spec_rollout.engines.transformers.layer_parts import LayerParts
from spec_rollout.engines.transformers.lengths import declared
from spec_rollout.engines.transformers.row_counts import MIN_ROWS, row_counts
from spec_rollout.engines.transformers.slot_cache import WIDTH_MULTIPLE, SlotCache, round_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGGER = logging.getLogger(__name__)
MASKED_ATTENTION = ("sdpa", "eager")  # these add a 4-D mask as it is given
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class ModelForward:
    """Runs a Hugging Face causal LM on the first rows of a `SlotCache`.

    Args:
        model: A causal LM that takes `position_ids` and a 4-D `attention_mask`.
        batch_invariant: Whether a token's logits may not depend, in any bit, on what else is in the
            batch; None: yes on CPU in float32, and in bfloat16 where the machine's matrix products
            allow it.
        max_model_len: Most tokens of a row; None is no limit.

    Attributes:
        vocab_size: Rows of the embedding: ids that a prompt may have.
        head_size: Rows of the output head: ids that can be drawn. At most `vocab_size`.
        computes_16_bit: Whether logits have the rounding of a 16-bit type, whatever theirs is.

    Raises:
        ValueError: naming what the model has that this engine cannot work with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_invariant: bool | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.config = model.config.get_text_config(decoder=True)
        self.device, self.dtype = _device_and_dtype(model)
        is_autocast = _is_autocast(model)
        self.computes_16_bit = is_autocast or self.dtype in (torch.float16, torch.bfloat16)
        self._masks = _mask_kinds(model, self.config)
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise ValueError(
                f"model: expected a causal LM, {type(model).__name__} has no output layer"
            )
        self.vocab_size, self.head_size = _vocabulary(model, self._head)
        self.num_layers = self.config.num_hidden_layers
        self.batch_invariant = self._resolve_batch_invariant(batch_invariant, is_autocast)
        self._row_counts: tuple[int, ...] = (1,)
        self._counted_for = 0  # threads
        self._count_rows()
        self._parts = LayerParts(model) if self.batch_invariant else None
        # Renamed in transformers 5.24.
        takes_cache = "cache" in inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if takes_cache else "past_key_values"
        # Masks of its own that a model (GPT-Neo) measures from the width of the batch. Ours say all
        # that they say, but for a local layer's window, within which rows then have to stay.
        self._own_masks = [
            module for module in model.modules() if _is_own_mask(module._buffers.get("bias"))
        ]
        self._select: torch.Tensor | None = None
        self.num_steps = 0
        self.num_padding_tokens = 0
        self._kept: dict[str, SlotCache] = {}
        self._numbers = torch.arange(0, device=self.device)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Evaluation and inference mode, our hook, attention and layer parts; all as it was
        afterwards."""
        self._count_rows()
        training = [module for module in self.model.modules() if module.training]
        configs = _with_parts(self.model.config, self.config)
        attentions = [(config, config._attn_implementation) for config in configs]
        hook = self._head.register_forward_pre_hook(self._keep_selected)
        self.model.eval()
        if self.batch_invariant:
            for config in configs:
                config._attn_implementation = BATCH_INVARIANT_ATTENTION
        parts = contextlib.nullcontext() if self._parts is None else self._parts.installed()
        own_masks = [module._buffers["bias"] for module in self._own_masks]
        for module, mask in zip(self._own_masks, own_masks, strict=True):
            assert mask is not None
            module._buffers["bias"] = mask.new_ones(()).expand(mask.shape)
        try:
            with torch.inference_mode(), parts:
                yield
        finally:
            hook.remove()
            for module, mask in zip(self._own_masks, own_masks, strict=True):
                module._buffers["bias"] = mask
            if self.batch_invariant:
                # What a config is given, those inside it get, too: they come after it.
                for config, attention in attentions:
                    config._attn_implementation = attention
            for module in training:
                module.training = True

    def new_cache(self, num_rows: int, capacity: int) -> SlotCache:
        """A cache that this model's forwards can use."""
        return SlotCache(self.num_layers, num_rows, capacity, by_span=self.batch_invariant)

    def kept_cache(self, name: str, num_rows: int, capacity: int) -> SlotCache:
        """The cache of this name if it is large enough, else a new one in its place.

        On a CPU, memory that is handed back after each call costs more to get again than to keep:
        the kernel clears it page by page. On a GPU the allocator keeps it, and a trainer wants it
        between calls. Forwards with masks always have new caches, too: a NaN left from earlier
        would get through the mask.
        """
        if not self.batch_invariant:
            return self.new_cache(num_rows, capacity)
        kept = self._kept.get(name)
        if kept is None or kept.num_rows < num_rows or kept.capacity < capacity:
            self._kept.pop(name, None)
            kept = self._kept[name] = self.new_cache(num_rows, capacity)
        return kept

    def __call__(
        self,
        cache: SlotCache,
        token_ids: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor | None,
        width: int,
        select: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the next tokens of the first rows of the cache and writes their keys and values
        there.

        Batch-invariant forwards take the tokens as they come, each as a row of its own; others pad
        rows to the longest.

        Args:
            token_ids: Tokens of row 0, then of row 1, ... [num_tokens], int64.
            starts: Position of each row's first token. [rows], int64.
            counts: Tokens of each row, at least one; None is one each. [rows], int64.
            width: Positions in use in the longest row.
            select: Which tokens' logits to compute; None is all. [n], int64.

        Returns:
            logits: [n, vocab], the model's dtype.
        """
        rows = self._arange(starts.numel())
        firsts = None  # where each row's tokens begin in token_ids
        if counts is not None:
            firsts = counts.cumsum(0) - counts
            rows = rows.repeat_interleave(counts, output_size=token_ids.numel())
            positions = starts[rows] + self._arange(token_ids.numel()) - firsts[rows]
        else:
            positions = starts
        if select is None:
            select = self._arange(token_ids.numel())
        num_selected = select.numel()
        missing = self._at_least(num_selected) - num_selected
        if missing:
            select = torch.nn.functional.pad(select, (0, missing))
        width = round_up(width, WIDTH_MULTIPLE)
        if self.batch_invariant:
            missing = self._at_least(token_ids.numel()) - token_ids.numel()
            if missing:
                token_ids, positions = (
                    torch.nn.functional.pad(values, (0, missing))
                    for values in (token_ids, positions)
                )
                rows = torch.nn.functional.pad(rows, (0, missing), value=cache.num_rows)
                self.num_padding_tokens += missing
            masks = {
                kind: span_mask(positions, positions, rows, window)
                for kind, window in self._masks.items()
            }
            cache.place(positions, width, next(iter(masks.values())).view(-1, 4))
            input_ids, position_ids = token_ids[:, None], positions[:, None]
        else:
            num_rows, longest = starts.numel(), 1
            if counts is not None and firsts is not None:
                longest = int(counts.max())
                columns = positions - starts[rows]
                padded = token_ids.new_zeros(num_rows, longest)
                padded[rows, columns] = token_ids
                self.num_padding_tokens += padded.numel() - token_ids.numel()
                select = (rows * longest + columns)[select]
                ends = starts + counts - 1
                input_ids = padded
            else:
                input_ids, ends = token_ids[:, None], starts
            positions = starts[:, None] + self._arange(longest)
            masks = {
                kind: self._additive_mask(positions, width, window)
                for kind, window in self._masks.items()
            }
            cache.place(positions, width)
            # Padding would lie past the last position that the model knows.
            position_ids = torch.minimum(positions, ends[:, None])
        self._select = select
        self.num_steps += 1
        output = self.model(
            input_ids=input_ids,
            # A model with one kind of layer takes a bare mask.
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{self._cache_argument: cache},
        )
        return output.logits[0, :num_selected]

    def _count_rows(self) -> None:
        """Finds out how few rows will do, if the number of threads is another than last time."""
        threads = torch.get_num_threads()
        if self.batch_invariant and threads != self._counted_for:
            counts = row_counts(self.model)
            if not counts:
                _LOGGER.warning(
                    "with %d threads, this machine's %s products depend on how many rows are "
                    "computed together: results differ by rounding",
                    *(threads, self.dtype),
                )
            self._row_counts = counts or (MIN_ROWS,)
            self._counted_for = threads

    def _at_least(self, count: int) -> int:
        """Rows to compute where `count` are wanted."""
        return next((rows for rows in self._row_counts if rows >= count), count)

    def _arange(self, count: int) -> torch.Tensor:
        """0..count-1, int64; kept, as every step wants one."""
        if self._numbers.numel() < count:
            self._numbers = torch.arange(2 * count, device=self.device)
        return self._numbers[:count]

    def _additive_mask(
        self, positions: torch.Tensor, width: int, window: int | None
    ) -> torch.Tensor:
        """Each token sees its row up to itself. [rows, 1, tokens, width]."""
        behind = positions[:, None, :, None] - torch.arange(width, device=self.device)
        seen = behind >= 0
        if window is not None:
            seen &= behind < window
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~seen, float("-inf"))

    def _keep_selected(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of the output layer: only the selected tokens' hidden states go on."""
        hidden, *rest = args
        assert self._select is not None
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._select)[None], *rest)

    def _resolve_batch_invariant(self, wanted: bool | None, is_autocast: bool) -> bool:
        if wanted is False:
            return False
        reasons = []
        if self.device.type != "cpu":
            reasons.append(f"runs on {self.device}")
        elif self.dtype == torch.float16:
            reasons.append(f"is {self.dtype}")
        elif is_autocast:  # keys come in another type than values
            reasons.append("computes in another type than that of its weights (autocast)")
        elif not row_counts(self.model):
            reasons.append(f"has {self.dtype} products that depend on the number of rows here")
        attentions = {c._attn_implementation for c in (self.model.config, self.config)}
        reasons += [f"uses {attention} attention" for attention in sorted(attentions - {"sdpa"})]
        if not getattr(self.model, "_supports_attention_backend", False):
            reasons.append("takes no custom attention function")
        value_dim = getattr(self.config, "v_head_dim", None)
        if value_dim is not None and value_dim != getattr(self.config, "qk_head_dim", value_dim):
            reasons.append("has values narrower than its keys")
        if wanted and reasons:
            raise ValueError(
                "batch_invariant: expected a float32 or bfloat16 model with sdpa attention on CPU, "
                f"got one that {' and '.join(reasons)}"
            )
        if reasons:
            return False
        from transformers import AttentionInterface

        AttentionInterface.register(BATCH_INVARIANT_ATTENTION, batch_invariant_attention)
        return True


def _is_autocast(model: PreTrainedModel) -> bool:
    """Whether its forward is what accelerate's mixed precision made of it: computed in 16 bits,
    whatever the weights are, and given back as float32."""
    return hasattr(model, "_original_forward")


def _with_parts(*configs: Any) -> list[Any]:
    """Each config once, those inside it after it: of text, of images."""
    found: dict[int, Any] = {}
    waiting = list(reversed(configs))
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


def _is_own_mask(buffer: torch.Tensor | None) -> bool:
    """Whether it is what a causal mask looks like: [1, 1, tokens, tokens], bool."""
    return (
        buffer is not None
        and buffer.dtype == torch.bool
        and buffer.ndim == 4
        and buffer.shape[-1] == buffer.shape[-2]
    )


def _vocabulary(model: Any, head: Any) -> tuple[int, int]:
    """Rows of the embedding and of the output head."""
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    head_size = getattr(head, "out_features", None) or head.weight.shape[0]
    if head_size > num_embeddings:
        raise ValueError(
            f"model: expected an output head of at most {num_embeddings} rows (its embedding has "
            f"as many), got {head_size}: a token drawn from the rest has no embedding"
        )
    return num_embeddings, head_size


def _device_and_dtype(model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"model: expected all parameters on one device, got {sorted(map(str, devices))}"
        )
    if model.dtype not in _DTYPES:
        raise ValueError(f"model: expected float32, float16 or bfloat16 weights, got {model.dtype}")
    return devices.pop(), model.dtype


def _mask_kinds(model: PreTrainedModel, config: Any) -> dict[str, int | None]:
    """Attention windows by layer type; a model with one kind of layer takes a bare mask."""
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"model: expected a forward with position_ids, {name} has none")
    for attention in (model.config._attn_implementation, config._attn_implementation):
        if attention not in MASKED_ATTENTION:
            raise ValueError(
                f"model: expected attention {' or '.join(MASKED_ATTENTION)} (per-row lengths need "
                f"a mask), got {attention!r}; load it with attn_implementation='sdpa'"
            )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or not layer_types <= _KNOWN_LAYERS:
        raise ValueError(
            f"model: expected only layers with a standard KV cache, {name} has "
            f"{sorted(layer_types - _KNOWN_LAYERS) or 'recurrent layers'}"
        )
    window = declared(config, "sliding_window")
    if "sliding_attention" in layer_types:
        # Such models look their mask up by layer type, so both are given even if one is unused.
        return {"full_attention": None, "sliding_attention": window}
    if layer_types:
        return {"full_attention": None}
    return {"sliding_attention" if window else "full_attention": window or None}
