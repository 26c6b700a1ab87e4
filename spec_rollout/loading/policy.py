"""The policy: loading a model folder, and log-probs of responses with gradients."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.config.sections import ConfigError, ModelConfig
from spec_rollout.engines.transformers.lengths import row_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model with its tokenizer.

    Attributes:
        model: In eval mode (dropout would make the engine's log-probs differ from the trainer's).
        tokenizer: transformers tokenizer.
        eos_token_ids: End-of-sequence tokens of model and tokenizer, ascending; may be empty.
        vocab_size: Rows of the model's output.
        max_length: Longest sequence the model takes; None if it does not say.
    """

    model: PreTrainedModel
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_length: int | None


def resolve_device(device: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: if there is no such device.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"model.device: expected auto, cpu or cuda[:n], got {device!r}") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f"model.device: expected a device of this machine ({count} GPUs), got {device!r}"
        )
    return resolved


def load_policy(config: ModelConfig) -> Policy:
    """Loads model and tokenizer from the folder `config.path`.

    Raises:
        ConfigError: saying what was expected and what was found, for a folder that does not hold a
            whole causal language model and its tokenizer.
    """
    device = resolve_device(config.device)
    model = load_model(config.path, config, device, "model.path")
    tokenizer = load_tokenizer(Path(config.path))
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"model.path: expected a model with an output head, got {type(model).__name__}"
        )
    vocab_size = head.weight.shape[0]
    return Policy(
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(model, tokenizer, vocab_size),
        vocab_size=vocab_size,
        max_length=row_limit(model, model.config.get_text_config(decoder=True)).usual,
    )


def _eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence tokens that model and tokenizer name, ascending.

    Raises:
        ConfigError: for what is no id of the model's vocabulary: no response would ever end.
    """
    found: set[int] = set()
    places = {
        "generation config": getattr(model.generation_config, "eos_token_id", None),
        "tokenizer": tokenizer.eos_token_id,
    }
    for place, value in places.items():
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ConfigError(
                    f"model.path: expected an end-of-sequence id from 0 to {vocab_size - 1} in the "
                    f"model's {place}, got {token!r}"
                )
            found.add(token)
    return tuple(sorted(found))


def load_model(path: str, config: ModelConfig, device: torch.device, key: str) -> PreTrainedModel:
    """Loads the weights of a folder; every one of them must be there (transformers alone would make
    some up).

    Args:
        path: The folder.
        config: Gives dtype and attention implementation.
        key: Config key that named the folder, for messages.

    Raises:
        ConfigError: as `load_policy`.
    """
    import transformers

    folder = Path(path)
    expected = f"{key}: expected a folder with config.json, weights (*.safetensors) and tokenizer"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        hint = ""
        if not folder.exists() and _HUB_ID.fullmatch(path):
            hint = f"; a model of the Hub is downloaded first: hf download {path} --local-dir DIR"
        raise ConfigError(f"{expected}, found {found} at {path!r}{hint}")
    have = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{expected}, found no config.json in {path!r} (it holds {have})")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise ConfigError(f"{expected}, found no weights in {path!r} (it holds {have})")
    try:
        with no_progress_bars():
            # With output_loading_info it returns a pair, which its annotation leaves out.
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attention,
                local_files_only=True,
                output_loading_info=True,
            )
        model, report = loaded
    except Exception as error:
        problem = _attention_problem(folder, config.attention)
        if problem is not None:
            raise ConfigError(f"model.attention: {problem}") from error
        raise ConfigError(f"{expected}, cannot load {path!r}: {_first_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(problem) or ()))
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            what = "no weights for" if problem == "missing_keys" else "weights of another shape for"
            raise ConfigError(
                f"{key}: expected weights for every parameter, found {what} {some} in {path!r}"
            )
    _mend_generation_config(model)
    return model.to(device).eval()


def _attention_problem(folder: Path, attention: str) -> str | None:
    """What is wrong with an attention implementation: a folder's model can be made with another,
    without its weights, and not with this one. None if that is not so."""
    import transformers

    def tried(name: str) -> Exception | None:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
        except Exception as error:  # whatever a model's own code raises
            return error
        return None

    error = tried(attention)
    others = [f'"{name}"' for name in ("sdpa", "eager") if error and tried(name) is None]
    if error is None or not others:
        return None
    return (
        f"expected {' or '.join(others)} for {str(folder)!r} (or another one that is installed and "
        f'that its class has), got "{attention}" ({_first_line(error)})'
    )


_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def _mend_generation_config(model: Any) -> None:
    """Makes of what a folder says of generation what may be written again, where little is wrong.

    transformers loads more than it saves: `temperature` without `do_sample`, a padding token of -1.
    No rollout reads any of these.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        return
    mended = copy.deepcopy(config)
    if mended.pad_token_id is not None and mended.pad_token_id < 0:
        mended.pad_token_id = None
    if not _is_valid(mended):
        if mended.do_sample is False or mended.temperature == 0:  # it says greedy: so it stays
            for name in _SAMPLING_KEYS:
                setattr(mended, name, None)
        else:
            mended.do_sample = True  # its numbers are vLLM's defaults
    # Else it stays as it was: newer versions of transformers save what is as it was loaded.
    if _is_valid(mended):
        model.generation_config = mended


def _is_valid(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a folder.

    Raises:
        ConfigError: if there is none.
    """
    import transformers

    expected = f"model.path: expected a tokenizer beside the model in {str(folder)!r}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{expected}, got {_first_line(error)}") from error
    # Without any of its files transformers may hand out an empty tokenizer of the model's usual
    # class.
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(f"{expected}, found none of {', '.join(sorted(names))}")
    return tokenizer


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """None of transformers' bars for loading and saving: they would break the trainer's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
