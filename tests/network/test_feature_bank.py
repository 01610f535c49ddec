"""Virtual ids: stable for the same medium, never shared, recycled only when nothing holds them."""

import mlx.core as mx
import pytest

from mlx_onevision.network import feature_bank as bank_module
from mlx_onevision.network.feature_bank import FeatureBank

VOCAB = 100
ROW = 4 * 2  # bytes of a row of two float32 values


def rows(length: int, value: float = 0.0) -> mx.array:
    return mx.full((length, 2), value)


def test_ids_begin_above_the_vocabulary_and_do_not_overlap() -> None:
    bank = FeatureBank(VOCAB, 1 << 20)
    first, second = bank.reserve("a", 5), bank.reserve("b", 7)
    assert first.start == VOCAB
    assert len(first) == 5
    assert not set(first) & set(second)
    assert bank.reserve("a", 5) == first


def test_rows_are_found_by_id() -> None:
    bank = FeatureBank(VOCAB, 1 << 20)
    for key, value in (("a", 1.0), ("b", 2.0)):
        bank.reserve(key, 4)
        bank.store(key, mx.arange(8).reshape(4, 2) + 100 * value)
    second = bank.reserve("b", 4)
    assert bank.look_up(second.start + 1, second.start + 3).tolist() == [[202, 203], [204, 205]]
    assert bank.last_of(second.start + 2) == second.stop


def test_ids_that_nobody_owns_are_an_error() -> None:
    bank = FeatureBank(VOCAB, 1 << 20)
    ids = bank.reserve("a", 4)
    with pytest.raises(ValueError, match=str(ids.stop)):
        bank.look_up(ids.stop, ids.stop + 1)
    with pytest.raises(ValueError, match="dropped"):
        bank.look_up(ids.start, ids.stop)
    bank.store("a", rows(4))
    bank.reserve("b", 4)
    with pytest.raises(ValueError, match="not of one medium"):
        bank.look_up(ids.stop - 1, ids.stop + 1)


def test_wrong_lengths_are_refused() -> None:
    bank = FeatureBank(VOCAB, 1 << 20)
    bank.reserve("a", 4)
    with pytest.raises(ValueError, match="not 5"):
        bank.reserve("a", 5)
    with pytest.raises(ValueError, match="3 embeddings"):
        bank.store("a", rows(3))


def test_rows_leave_in_order_of_last_use() -> None:
    bank = FeatureBank(VOCAB, 2 * 4 * ROW)
    for key in "ab":
        bank.reserve(key, 4)
        bank.store(key, rows(4))
    bank.reserve("a", 4)  # used again, so b is the oldest
    bank.reserve("c", 4)
    bank.store("c", rows(4))
    assert "a" in bank
    assert "b" not in bank
    assert "c" in bank
    assert bank.nbytes <= bank.capacity


def test_rows_in_use_stay_beyond_the_capacity() -> None:
    bank = FeatureBank(VOCAB, 4 * ROW)
    bank.reserve("a", 4)
    with bank.in_use(["a"]):
        bank.store("a", rows(4))
        bank.reserve("b", 4)
        with bank.in_use(["b"]):
            bank.store("b", rows(4))
            assert "a" in bank
            assert "b" in bank
    assert bank.nbytes <= bank.capacity


def test_ids_that_a_cached_prompt_holds_are_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "LAST_ID", VOCAB + 9)  # ten virtual ids in all
    bank = FeatureBank(VOCAB, 4 * ROW)
    held = bank.reserve("a", 4)
    bank.store("a", rows(4))
    bank.hold(["a"])
    for key in "bcdef":  # each evicts the one before it
        ids = bank.reserve(key, 4)
        with bank.in_use([key]):
            bank.store(key, rows(4))
            assert not set(ids) & set(held)
    assert bank.reserve("a", 4) == held
    assert "a" not in bank  # its rows went, its ids did not
    bank.release(["a"])
    assert len({bank.reserve(key, 3) for key in "xyz"}) == 3


def test_running_out_of_ids_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "LAST_ID", VOCAB + 5)
    bank = FeatureBank(VOCAB, 1 << 20)
    bank.reserve("a", 4)
    with bank.in_use(["a"]), pytest.raises(RuntimeError, match="no virtual ids"):
        bank.reserve("b", 4)
    assert len(bank.reserve("b", 4)) == 4  # a is idle now and makes way


def test_what_is_forgotten_leaves_unless_a_request_needs_it() -> None:
    bank = FeatureBank(VOCAB, 1 << 20)
    for key in "abc":
        bank.reserve(key, 4)
        bank.store(key, rows(4))
    with bank.in_use(["a"]):
        bank.forget(["a", "b", "unknown"])
        assert ("a" in bank, "b" in bank, "c" in bank) == (True, False, True)


def test_less_room_evicts_what_was_used_least_recently() -> None:
    bank = FeatureBank(VOCAB, 3 * 4 * ROW)
    for key in "abc":
        bank.reserve(key, 4)
        bank.store(key, rows(4))
    bank.shrink(3 * 4 * ROW)
    assert bank.nbytes == 3 * 4 * ROW
    bank.shrink(3 * 4 * ROW - 1)
    assert ("a" in bank, "b" in bank, "c" in bank) == (False, True, True)


def test_ids_come_from_the_lowest_gap_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "LAST_ID", VOCAB + 9)  # ten virtual ids in all
    bank = FeatureBank(VOCAB, 1 << 20)
    for key, length in (("a", 3), ("b", 2), ("c", 5)):
        bank.reserve(key, length)
    bank.hold(["b", "c"])
    bank.forget(["a"])  # leaves the ids before b
    assert bank.reserve("d", 3) == range(VOCAB, VOCAB + 3)
    bank.hold(["d"])
    bank.release(["c"])
    assert bank.reserve("e", 4) == range(VOCAB + 5, VOCAB + 9)


def test_virtual_ids_fit_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bank_module.LAST_ID == 2_147_483_647
    monkeypatch.setattr(bank_module, "LAST_ID", VOCAB + 9)
    bank = FeatureBank(VOCAB, 1 << 20)
    with pytest.raises(RuntimeError, match="no virtual ids"):
        bank.reserve("a", 11)
    assert bank.reserve("a", 10) == bank.ids_of("a") == range(VOCAB, VOCAB + 10)


def test_ids_that_became_free_are_not_given_out_next() -> None:
    bank = FeatureBank(VOCAB, 1 << 20)
    bank.reserve("a", 4)
    bank.hold(["a"])
    bank.reserve("b", 4)
    bank.forget(["b"])
    assert bank.reserve("c", 4).start == VOCAB + 8


def test_a_medium_that_nothing_holds_is_unknown() -> None:
    bank = FeatureBank(VOCAB, 4 * ROW)
    bank.reserve("a", 4)
    bank.hold(["a"])
    bank.release(["a"])
    bank.reserve("a", 5)  # of another length, so it was unknown
    bank.forget(["a"])
    bank.reserve("a", 6)
    with bank.in_use(["a"]):
        bank.reserve("b", 4)
        bank.store("b", rows(4))
        bank.shrink(0)
        assert bank.ids_of("a") == range(VOCAB + 9, VOCAB + 15)
