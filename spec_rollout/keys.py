"""Identity of prompts and of noise.

Every random decision of a rollout is a pure function of a 64-bit *noise key* and the response
position (`csrc/include/spec_rollout/philox.h`). The key is derived from what a rollout *is* (seed,
noise epoch, prompt, sample index), never from where it sits in a batch, so results do not depend on
batch order, chunk size, engine or device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from spec_rollout.checks import as_array, items, of_kind, shown, whole

# The token ids of one prompt, any integer type.
TokenIds: TypeAlias = Sequence[int] | np.ndarray | torch.Tensor

_KEY_BYTES = 16  # of a prompt's hash
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def prompt_key(prompt_ids: TokenIds, user_key: str = "") -> bytes:
    """Content hash of one prompt.

    Args:
        prompt_ids: Token ids of the prompt. [num_prompt_tokens], any integer type.
        user_key: Optional namespace (a data source, say); equal prompts under different user keys
            stay apart.

    Returns:
        16 bytes (BLAKE2b-128 over the number of ids, the int32 ids and the user key).

    Raises:
        ValueError: if `prompt_ids` is not a row of integers in 0 .. 2**31 - 1, or the user key is
            no text.
    """
    ids = as_array("prompt_ids", prompt_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"prompt_ids: expected a row of integers, got {ids.dtype} of shape {list(ids.shape)}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise ValueError(f"prompt_ids: expected 0 <= id < 2**31, got {ids.min()} to {ids.max()}")
    try:
        user_bytes = of_kind("user_key", user_key, str, "a string").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"user_key: expected text that UTF-8 can hold, got {error}") from None
    # The length comes first, so that no user key can be mistaken for further ids.
    digest = hashlib.blake2b(ids.size.to_bytes(8, "little"), digest_size=_KEY_BYTES)
    digest.update(ids.astype("<i4").tobytes())
    digest.update(user_bytes)
    return digest.digest()


def _head(key: bytes) -> bytes:
    """8 bytes that depend on all of a key. Hashes begin with such; names of rows begin alike."""
    return key[:8] if len(key) == _KEY_BYTES else hashlib.blake2b(key, digest_size=8).digest()


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers: SplitMix64's finalizer (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise_keys(
    seed: int,
    noise_epoch: int,
    prompt_keys: Sequence[bytes],
    sample_ids: Sequence[int] | np.ndarray,
) -> torch.Tensor:
    """Noise keys of a batch of rollouts.

    Args:
        seed: Seed of the run; any Python int, taken modulo 2**64.
        noise_epoch: Changes whenever fresh noise is wanted: the training step for rules that need
            fresh uniforms each step (`Lenient`), `epoch // refresh_epochs` for `Coupled`.
        prompt_keys: `prompt_key` of each row. Length batch. Others of 16 bytes are taken for such
            hashes: their first 8 bytes say it all.
        sample_ids: Index of the rollout within its prompt's group. [batch].

    Returns:
        Keys, 64 random-looking bits each. [batch], int64.

    Raises:
        ValueError: naming the argument; also if `prompt_keys` and `sample_ids` differ in length, or
            a key has fewer than 8 bytes.
    """
    seed, noise_epoch = whole("seed", seed), whole("noise_epoch", noise_epoch)
    prompt_keys = items("prompt_keys", prompt_keys)
    ids = as_array("sample_ids", sample_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"sample_ids: expected a row of integers of 64 bits, got {ids.dtype} "
            f"of shape {list(ids.shape)}"
        )
    samples = ids.astype(np.int64).astype(np.uint64)
    if len(prompt_keys) != len(samples):
        raise ValueError(
            f"sample_ids: expected one per prompt key ({len(prompt_keys)}), got {len(samples)}"
        )
    for key in prompt_keys:
        if not isinstance(key, bytes):
            raise ValueError(f"prompt_keys: expected bytes, got {shown(key)}")
        if len(key) < 8:
            raise ValueError(f"prompt_keys: expected at least 8 bytes each, got {len(key)}")
    prompts = np.frombuffer(b"".join(map(_head, prompt_keys)), dtype="<u8")
    with np.errstate(over="ignore"):
        state = mix64(np.full(len(samples), seed & (2**64 - 1), dtype=np.uint64) + _GOLDEN)
        state = mix64((state ^ np.uint64(noise_epoch & (2**64 - 1))) + _GOLDEN)
        state = mix64((state ^ prompts) + _GOLDEN)
        state = mix64((state ^ samples) + _GOLDEN)
    return torch.from_numpy(state.view(np.int64).copy())
