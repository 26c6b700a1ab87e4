"""The compiled way between entries and packed tensors, against its plain definition, and what its
checksum notices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cache_samples import make_rollouts
from hypothesis import given
from hypothesis import strategies as st

from spec_rollout._native import _C
from spec_rollout.cache import arrays, reference
from spec_rollout.cache.arrays import PackedRollouts, sound_drafts
from spec_rollout.cache.entry import UNREADABLE, Entry, checksum_of, is_sound, make_entry
from spec_rollout.types import Drafts, FinishReason, Rollouts

IMPLS = _C.crc32c_available()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", ["", *IMPLS])
@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"123456789", 0xE3069283),  # the check value of the catalogue of CRCs
        (b"", 0),
        # RFC 3720, appendix B.4.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_of_known_bytes(data: bytes, value: int, impl: str) -> None:
    assert _C.crc32c(data, 0, impl) == value
    assert reference.crc32c(data) == value


def test_crc32c_by_instruction_and_table_is_the_same_of_any_bytes() -> None:
    data = np.random.default_rng(0).bytes(1 << 16)
    # Around the borders of its blocks: 8, 3 x 128 and 3 x 1,024 bytes.
    borders = [n + d for n in (0, 8, 384, 768, 3072, 6144, 3072 + 384) for d in (-9, -1, 0, 1, 7)]
    for size in [*filter(lambda size: size >= 0, borders), 40_001]:
        for start in (0, 1, 5):
            piece = data[start : start + size]
            values = {_C.crc32c(piece, 17 * start, impl) for impl in ("", *IMPLS)}
            if size < 4000:
                values.add(reference.crc32c(piece, 17 * start))
            assert len(values) == 1
    assert _C.crc32c(data[100:], _C.crc32c(data[:100])) == _C.crc32c(data)


def test_a_crc32c_that_there_is_not_is_refused() -> None:
    assert "table" in IMPLS
    with pytest.raises(ValueError, match=r"impl: expected one of .*table, got md5"):
        _C.crc32c(b"", 0, "md5")


def full_entry(key: bytes, sample_id: int, num_tokens: int = 5) -> Entry:
    """With all arrays."""
    ids = np.arange(num_tokens, dtype=np.int32)
    values = ids.astype(np.float32)
    return make_entry(
        *(key, sample_id),
        token_ids=ids.tobytes(),
        logprobs=(values - 9).tobytes(),
        trainer_logprobs=(values - 8).tobytes(),
        finish_reason=0,
        policy_version=3,
        behaviour_logprobs=(values - 7).tobytes(),
        ages=ids.astype(np.int16).tobytes(),
    )


def damaged(entry: Entry) -> Iterator[Entry]:
    """The entry with every single bit flipped, and with every array gone or cut."""
    for name in Entry._fields:
        value = getattr(entry, name)
        if isinstance(value, int):
            for bit in range(8 if name == "finish_reason" else 32):
                yield entry._replace(**{name: value ^ 1 << bit})
            continue
        for bit in range(8 * len(value)):
            flipped = bytearray(value)
            flipped[bit // 8] ^= 1 << bit % 8
            yield entry._replace(**{name: bytes(flipped)})
        yield entry._replace(**{name: value[:-1]})
        yield entry._replace(**{name: value[:-4]})
        yield entry._replace(**{name: value + bytes(4)})
        if name != "token_ids":
            yield entry._replace(**{name: None})


def test_every_flipped_bit_is_found(threads: int) -> None:
    entry = full_entry(b"key", 7)
    assert entry.checksum == reference.checksum_of(b"key", 7, entry)
    entries: list[Entry | None] = []
    for wrong in damaged(entry):
        assert not is_sound(b"key", 7, wrong)
        entries += [wrong, entry, None]
    entries += [UNREADABLE, entry._replace(finish_reason=256), entry._replace(checksum=2**70)]
    keys, ids = [b"key"] * len(entries), [7] * len(entries)
    expected = [row for row, e in enumerate(entries) if e is not None and e is not entry]
    assert len(expected) > 8 * 18 * 5
    for length in (5, 2):  # also where it would not be used
        drafts, failed = sound_drafts(keys, ids, entries, length, trainer_logprobs=False)
        assert failed == expected
        assert drafts.lens.tolist() == [length if e is entry else 0 for e in entries]
        last = drafts.token_ids.reshape(-1, length)[-1]
        assert torch.equal(last, torch.arange(length, dtype=torch.int32))
    # Nor does it fit another place.
    for key, sample_id in ((b"kez", 7), (b"key", 6), (b"key\0", 7)):
        assert not is_sound(key, sample_id, entry)
        assert sound_drafts([key], [sample_id], [entry], 9, trainer_logprobs=False)[1] == [0]


def test_arrays_of_unequal_lengths_are_no_entry_whatever_their_checksum() -> None:
    entry = full_entry(b"key", 0)
    for name in ("token_ids", "logprobs", "trainer_logprobs", "behaviour_logprobs", "ages"):
        for change in (lambda array: array[:-2], lambda array: array + bytes(400)):
            odd = entry._replace(**{name: change(getattr(entry, name))})
            odd = odd._replace(checksum=checksum_of(b"key", 0, odd))
            assert not is_sound(b"key", 0, odd)
            assert sound_drafts([b"key"], [0], [odd], 999, trainer_logprobs=True)[1] == [0]


def same_drafts(one: Drafts, other: Drafts) -> None:
    for field in fields(Drafts):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert (mine is None) == (theirs is None), field.name
        if mine is not None:
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name


@st.composite
def entries_of(draw: st.DrawFn, key: bytes, sample_id: int) -> Entry | None:
    num_tokens = draw(st.none() | st.integers(0, 40))
    if num_tokens is None:
        return None
    entry = full_entry(key, sample_id, num_tokens)
    # Mostly the same arrays: what some rows lack, all of a batch may.
    absent = draw(st.sampled_from([(), (), ("ages",), ("behaviour_logprobs", "ages")]))
    more = draw(st.sampled_from([(), (), (), ("logprobs",), ("trainer_logprobs",)]))
    entry = entry._replace(**dict.fromkeys((*absent, *more)), finish_reason=draw(st.integers(0, 1)))
    return entry._replace(checksum=checksum_of(key, sample_id, entry))


@given(st.data(), st.integers(1, 50), st.booleans(), st.booleans(), st.booleans())
def test_drafts_are_those_of_the_plain_definition(
    data: st.DataObject, max_tokens: int, trainer: bool, borrowed: bool, damage: bool
) -> None:
    keys = [bytes([65 + row % 3]) * (1 + row) for row in range(data.draw(st.integers(0, 12)))]
    ids = list(range(len(keys)))
    entries = [data.draw(entries_of(key, row)) for row, key in zip(ids, keys, strict=True)]
    wrong: list[int] = []
    if damage:
        wrong = [r for r, e in enumerate(entries) if e is not None and data.draw(st.booleans())]
    given_entries: list[Entry | None] = []
    for row, entry in enumerate(entries):
        if entry is not None and row in wrong:
            entry = entry._replace(policy_version=4)
        if entry is not None and borrowed:
            views = {n: memoryview(v) for n, v in entry._asdict().items() if isinstance(v, bytes)}
            entry = entry._replace(**views)
        given_entries.append(entry)
    drafts, failed = sound_drafts(keys, ids, given_entries, max_tokens, trainer_logprobs=trainer)
    assert failed == wrong
    sound = [None if row in wrong else entry for row, entry in enumerate(entries)]
    same_drafts(drafts, reference.drafts_of(sound, max_tokens, trainer))


def plain_entry(
    rollouts: Rollouts, trainer: torch.Tensor | None, keep: tuple[bool, bool], row: int, key: bytes
) -> Entry:
    """Of a row, as the documentation of `RolloutCache` says it."""
    keep_logprobs, keep_behaviour = keep
    start, end = rollouts.cu_response_lens[row : row + 2].tolist()

    def part(values: torch.Tensor | None) -> bytes | None:
        return None if values is None else values[start:end].numpy().tobytes()

    says_more = keep_behaviour and rollouts.accepted_lens[row] > 0
    behaviour = rollouts.behaviour_logprobs
    drawn_with = rollouts.logprobs if behaviour is None else behaviour
    token_ids = part(rollouts.response_ids)
    assert token_ids is not None
    entry = Entry(
        token_ids,
        part(rollouts.logprobs) if keep_logprobs else None,
        part(trainer),
        int(rollouts.finish_reasons[row]),
        rollouts.policy_version,
        0,
        part(drawn_with) if says_more or (keep_behaviour and not keep_logprobs) else None,
        part(rollouts.ages) if says_more else None,
    )
    return entry._replace(checksum=reference.checksum_of(key, row, entry))


@given(
    st.lists(st.integers(0, 30), max_size=9),
    st.tuples(st.booleans(), st.booleans()),
    *(st.booleans(), st.booleans(), st.booleans()),
    st.integers(1, 3),
)
def test_entries_are_those_of_the_plain_definition(
    lens: list[int],
    keep: tuple[bool, bool],
    with_trainer: bool,
    with_behaviour: bool,
    with_ages: bool,
    num_threads: int,
) -> None:
    batch, total = len(lens), sum(lens)
    rollouts = replace(
        make_rollouts(
            [range(n) for n in lens], finish_reasons=[(0, 1, 2)[r % 3] for r in range(batch)],
            policy_version=5,
        ),
        accepted_lens=torch.tensor([n if r % 2 else 0 for r, n in enumerate(lens)]).int(),
        behaviour_logprobs=-torch.arange(total).float() if with_behaviour else None,
        ages=torch.arange(total).short() if with_ages else None,
    )  # fmt: skip
    trainer = torch.arange(total).float() / 2 if with_trainer else None
    packed = PackedRollouts(rollouts, trainer, keep_logprobs=keep[0], keep_behaviour=keep[1])
    keys = [b"a" if row < 4 else b"b" for row in range(batch)]
    made = list(packed.groups(keys, list(range(batch)), num_threads=num_threads))
    usable = [
        r for r in range(batch) if lens[r] and rollouts.finish_reasons[r] != FinishReason.ABORT
    ]
    expected = {
        key: {r: plain_entry(rollouts, trainer, keep, r, key) for r in usable if keys[r] == key}
        for key in (b"a", b"b")
    }
    assert made == [(key, samples) for key, samples in expected.items() if samples]


def test_batches_are_made_in_pieces(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread and on several."""
    monkeypatch.setattr(arrays, "_TOKENS_AT_ONCE", 1000)
    lens = [1 + 997 * row % 300 for row in range(400)]
    rollouts = replace(make_rollouts([[row] * n for row, n in enumerate(lens)]), policy_version=-1)
    packed = PackedRollouts(rollouts, None, keep_logprobs=True, keep_behaviour=True)
    keys = [row.to_bytes(2, "big") for row in range(200) for _ in range(2)]
    ids = [0, 1] * 200
    groups = list(packed.groups(keys, ids, num_threads=threads))
    assert [key for key, _ in groups] == keys[::2]
    entries = [samples[s] for _, samples in groups for s in (0, 1)]
    assert all(is_sound(*row) for row in zip(keys, ids, entries, strict=True))
    drafts, failed = sound_drafts(keys, ids, entries, 200, trainer_logprobs=False)
    assert failed == []
    same_drafts(drafts, reference.drafts_of(entries, 200, False))


def test_arguments_that_do_not_fit_are_refused() -> None:
    entry = full_entry(b"key", 0)
    with pytest.raises(ValueError, match="prompt_keys: expected 2 rows, got 1"):
        _C.EntryBatch([b"key"], [0, 1], [entry, entry])
    with pytest.raises(ValueError, match="sample_ids: expected 1 rows, got 2"):
        _C.EntryBatch([b"key"], [0, 1], [entry])
    with pytest.raises(ValueError, match="entries: expected an Entry or None, got int"):
        _C.EntryBatch([b"key"], [0], [3])
    batch = _C.EntryBatch([b"key"], [0], [entry])
    ids = np.empty(5, np.int32)
    nothing = (None, None, None, 1)
    for cu, message in (
        ([0, 6], "cu_lens: expected lengths of 0 to 5, got 6 in row 0"),
        ([0, -1], "cu_lens: expected lengths of 0 to 5, got -1 in row 0"),
        ([1, 5], "cu_lens: expected to start at 0, got 1"),
        ([0, 4], "token_ids: expected 4 contiguous items of 4 bytes, got 5 of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.unpack(np.array(cu), False, ids, *nothing)
    with pytest.raises(ValueError, match="ages: expected 5 contiguous items of 2 bytes"):
        batch.unpack(np.array([0, 5]), False, ids, None, None, ids, 1)
    # Log-probs that the row does not have are never made up.
    lean = entry._replace(logprobs=None, trainer_logprobs=None, behaviour_logprobs=None)
    lean = lean._replace(checksum=checksum_of(b"key", 0, lean))
    batch = _C.EntryBatch([b"key"], [0], [lean])
    for outputs in ((np.empty(5, np.float32), None), (None, np.empty(5, np.float32))):
        assert batch.unpack(np.array([0, 5]), False, ids, *outputs, None, 1) == [0]


def test_rows_beyond_the_arrays_are_refused() -> None:
    def pack(rows: list[int], cu: list[int], ids: np.ndarray | None) -> list[Entry]:
        none = np.zeros(2, np.uint8)
        return _C.pack_entries(
            *(Entry, [b"a", b"b"], [0, 1], rows, [ids, None, None, None, None]),
            *(np.array(cu), none, none.astype(np.bool_), 0, 1),
        )

    ids = np.arange(5, dtype=np.int32)
    made = pack([1, 0], [0, 2, 5], ids)
    assert [entry.token_ids for entry in made] == [ids[2:].tobytes(), ids[:2].tobytes()]
    for rows, cu, given_ids, message in (
        ([2], [0, 2, 5], ids, "rows: expected 0 <= row < 2, got 2"),
        ([1], [0, 2, 6], ids, "cu_lens: expected offsets of 0 to 5, got 2 to 6 in row 1"),
        ([1], [0, 4, 3], ids, "cu_lens: expected offsets of 0 to 5, got 4 to 3 in row 1"),
        ([0], [0, 2, 5], None, "arrays: expected token ids, got None"),
        ([0], [0, 2, 5, 5], ids, "cu_lens: expected 3 contiguous items of 8 bytes, got 4 of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(rows, cu, given_ids)
