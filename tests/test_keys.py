from __future__ import annotations

import numpy as np
import pytest
import torch

from spec_rollout.keys import _GOLDEN, mix64, noise_keys, prompt_key


def _prompts(count: int) -> list[bytes]:
    return [prompt_key([i]) for i in range(count)]


def test_keys_are_those_of_earlier_versions() -> None:
    """Saved caches and the reproducibility of past runs rest on these values."""
    assert prompt_key([1, 2, 3]).hex() == "7a55133bc80afffda8e9dfff48dfb543"
    assert prompt_key([1, 2, 3], "math").hex() == "0fbf1d11c5c2e955cdf3d3c2cc5bc88a"
    keys = noise_keys(7, 3, [bytes(range(16)), bytes(16)], [0, 5])
    assert keys.tolist() == [-888787249211185055, -472272600547740402]


def test_the_mixing_function_is_splitmix64() -> None:
    """Published outputs of the generator with seed 1234567: mixes of successive Weyl states."""
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * _GOLDEN
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_a_prompt_key_depends_on_the_ids_alone_not_on_their_container() -> None:
    ids = [5, 0, 151_935, 2**31 - 1]
    key = prompt_key(ids)
    assert len(key) == 16
    assert prompt_key(tuple(ids)) == key
    assert prompt_key(torch.tensor(ids)) == key
    assert prompt_key(torch.tensor(ids, dtype=torch.int32)) == key
    assert prompt_key(np.array(ids, dtype=np.uint64)) == key
    assert prompt_key(np.repeat(np.array(ids), 2)[::2]) == key


def test_different_prompts_and_user_keys_have_different_keys() -> None:
    prompts = [(), (0,), (0, 0), (1,), (256,), (1, 2), (2, 1), (0x63626100,)]
    keys = {
        prompt_key(prompt, user_key)
        for prompt in prompts
        for user_key in ("", "abc", "abcd", "\0", "\0abc")
    }
    assert len(keys) == len(prompts) * 5


def test_a_user_key_is_not_taken_for_token_ids() -> None:
    """The bytes of 'abcd' are those of one more id."""
    extra = int.from_bytes(b"abcd", "little")
    assert prompt_key([1], "abcd") != prompt_key([1, extra])
    assert prompt_key([1], "\0abc") != prompt_key([1, int.from_bytes(b"\0abc", "little")])
    assert prompt_key([], "abcd") != prompt_key([extra])


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([[1, 2]], r"prompt_ids: .*shape \[1, 2\]"),
        ([1.0], r"prompt_ids: .*float64"),
        ([True], r"prompt_ids: .*bool"),
        ([3, -1], r"prompt_ids: .*got -1 to 3"),
        ([2**31], r"prompt_ids: .*got 2147483648"),
        ([2**70], r"prompt_ids: .*object"),
        (np.array([2**40]), r"prompt_ids: expected 0 <= id < 2\*\*31"),
    ],
)
def test_bad_prompts_have_no_key(prompt: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prompt_key(prompt)


def test_every_argument_changes_the_noise_key_and_the_batch_does_not() -> None:
    a, b = _prompts(2)
    key = noise_keys(1, 2, [a], [3]).item()
    others = [
        noise_keys(2, 2, [a], [3]),
        noise_keys(1, 3, [a], [3]),
        noise_keys(1, 2, [b], [3]),
        noise_keys(1, 2, [a], [2]),
        noise_keys(2, 1, [a], [3]),  # seed and epoch are not interchangeable
        noise_keys(1, 3, [a], [2]),  # nor epoch and sample
    ]
    assert key not in [other.item() for other in others]
    batch = noise_keys(1, 2, [b, a, a, b], [3, 0, 3, 9])
    assert batch[2].item() == key
    assert batch.dtype == torch.int64
    assert torch.equal(noise_keys(1, 2, [a, b], torch.tensor([3, 9])), batch[[2, 3]])


def test_seeds_and_epochs_of_any_size_work() -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 2, -(2**63) + 1]
    keys = [
        noise_keys(seed, epoch, _prompts(1), [0]).item() for seed in seeds for epoch in (0, 2**63)
    ]
    assert len(set(keys)) == len(keys)
    assert noise_keys(2**64 + 5, 0, _prompts(1), [0]) == noise_keys(5, 0, _prompts(1), [0])


@pytest.mark.slow
def test_a_million_keys_have_no_collision() -> None:
    prompts = [key for key in _prompts(500) for _ in range(20)]
    samples = list(range(20)) * 500
    keys = torch.cat(
        [noise_keys(s, e, prompts, samples) for s in range(10) for e in range(10)]
    ).numpy()
    assert keys.size == 1_000_000
    assert np.unique(keys).size == keys.size
    # Every 64-bit position is a fair coin too, not only the whole different.
    for shift in (0, 16, 32, 48):
        words = (keys.view(np.uint64) >> np.uint64(shift)) & np.uint64(0xFFFF)
        counts = np.bincount(words.astype(np.int64), minlength=65536)
        # Chi-square over 65,535 degrees of freedom: mean 65,535, standard deviation 362.
        statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert abs(statistic - 65535) < 6 * 362


def _bits(keys: torch.Tensor) -> np.ndarray:
    return np.unpackbits(keys.numpy().view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")


@pytest.mark.parametrize("argument", ["seed", "noise_epoch", "prompt_key", "sample_id"])
def test_one_flipped_input_bit_flips_every_output_bit_half_the_time(argument: str) -> None:
    count = 2000
    rng = np.random.default_rng(0)
    prompts = [rng.bytes(16) for _ in range(count)]
    samples = rng.integers(0, 2**40, count)
    base = _bits(noise_keys(11, 5, prompts, samples))
    for bit in (0, 1, 7, 20, 31, 39):
        flip = 1 << bit
        seed, epoch, keys, ids = 11, 5, prompts, samples
        if argument == "seed":
            seed ^= flip
        elif argument == "noise_epoch":
            epoch ^= flip
        elif argument == "prompt_key":
            keys = [(int.from_bytes(key, "little") ^ flip).to_bytes(16, "little") for key in keys]
        else:
            ids = samples ^ flip
        flipped = (_bits(noise_keys(seed, epoch, keys, ids)) != base).mean(axis=0)
        assert flipped.shape == (64,)
        # Standard deviation of each of the 64 shares: 0.5 / sqrt(2000) = 0.0112.
        assert np.abs(flipped - 0.5).max() < 5 * 0.0112


def test_mismatched_rows_and_short_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sample_ids: expected one per prompt key \(2\), got 1"):
        noise_keys(0, 0, _prompts(2), [0])
    with pytest.raises(ValueError, match=r"prompt_keys: expected at least 8 bytes each, got 3"):
        noise_keys(0, 0, [b"abc"], [0])
    assert noise_keys(0, 0, [], []).shape == (0,)


def test_names_that_begin_alike_have_noise_of_their_own() -> None:
    names = [f"gsm8k/train/{i}".encode() for i in range(100)]
    assert len(set(noise_keys(0, 0, names, [0] * 100).tolist())) == 100
