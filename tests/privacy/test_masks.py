"""Masked sums are plain sums to the bit, whoever is lost; what the server holds says nothing before, and what
a member is asked for beyond one opening is refused."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import Refused
from fedtune.privacy.masks import KEYS, SEALED, SHARE, Roll, Session, unmask
from fedtune.privacy.masks.sealing import own_key, pair_key
from fedtune.privacy.masks.server import valid
from fedtune.privacy.masks.shamir import PRIME, joined, split
from fedtune.privacy.masks.stream import shift
from tests.marks import mostly_thorough
from tests.privacy.parties import NAME, STEPS, kept, until_answers, vectors_of

RING = pytest.mark.parametrize("kind", ["uint32", "uint64"])


@RING
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("count", "gone"), [(n, g) for n in (3, 10) for g in (0, 1, n // 3)])
def test_a_masked_sum_is_the_plain_sum_to_the_bit(count: int, gone: int, step: str, kind: str) -> None:
    if count == 3 and step == "keys" and gone:
        pytest.skip("two members are no sum: test_a_sum_of_two_is_refused")
    equal(count, gone, step, kind)


@pytest.mark.parametrize(
    ("step", "gone"),
    mostly_thorough([("keys", 33), ("shares", 33), ("answers", 1), ("opening", 33)], [("answers", 1)]),
)
def test_a_masked_sum_of_a_hundred_is_the_plain_sum_to_the_bit(step: str, gone: int) -> None:
    equal(100, gone, step, "uint64")


def equal(count: int, gone: int, step: str, kind: str) -> None:
    vectors = vectors_of(count, 33, kind)
    parties = until_answers(vectors, {step: gone} if step != "opening" else None)
    openers = sorted(parties.covered)[gone if step == "opening" else 0 :]
    want = np.sum([vectors[m] for m in parties.covered], axis=0, dtype=kind)
    assert len(parties.covered) == count - (gone if step != "opening" else 0)
    np.testing.assert_array_equal(parties.sum(openers), want)


def test_members_may_be_lost_at_every_step_of_one_sum() -> None:
    vectors = vectors_of(20, 50)
    parties = until_answers(vectors, {"keys": 2, "shares": 2, "answers": 2})
    assert (len(parties.roll.keys), len(parties.sealed), len(parties.covered)) == (18, 16, 14)
    want = np.sum([vectors[m] for m in parties.covered], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(parties.sum(sorted(parties.covered)[2:]), want)


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16, 2**16 + 1, 200_001])
def test_vectors_of_any_length_around_a_piece_of_the_stream(size: int) -> None:
    vectors = vectors_of(3, size)
    parties = until_answers(vectors, {"answers": 1})
    want = np.sum([vectors[m] for m in parties.covered], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(parties.sum(parties.covered), want)


# --- what the server learns


def far_from_uniform(numbers: np.ndarray) -> tuple[float, float]:
    """Kolmogorov-Smirnov's distance of the numbers of a ring, times the root of their count (above 2.8 once in
    three million), and how many deviations chi-square over their 256 values of a byte is away from its mean."""
    shares = np.sort(numbers.astype(np.float64) / np.iinfo(numbers.dtype).max)
    steps = np.arange(len(shares) + 1) / len(shares)
    apart = max(float((shares - steps[:-1]).max()), float((steps[1:] - shares).max()))
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    fair = counts.sum() / 256
    chi = float(((counts - fair) ** 2).sum() / fair)
    return apart * math.sqrt(len(shares)), abs(chi - 255) / math.sqrt(2 * 255)


def test_the_test_of_uniform_numbers_tells_others() -> None:
    draw = np.random.default_rng(0)
    ks, chi = far_from_uniform(draw.integers(0, 1 << 31, 20_000, "uint32"))  # one bit is always 0
    assert ks > 2.8 and chi > 6
    ks, chi = far_from_uniform(draw.integers(0, 1 << 32, 20_000, "uint32"))
    assert ks < 2.8 and chi < 6


@RING
def test_what_the_server_holds_before_the_opening_is_uniform(kind: str) -> None:
    """Of the most telling vectors there are: zeros."""
    vectors = {m: np.zeros(40_000, kind) for m in range(4)}
    parties = until_answers(vectors)
    for view in [*parties.covered.values(), parties.covered[0] + parties.covered[1] + parties.covered[2]]:
        ks, chi = far_from_uniform(view)
        assert ks < 2.8 and chi < 6
    for one, two in itertools.combinations(parties.covered.values(), 2):
        assert abs(np.corrcoef(one.astype(float), two.astype(float))[0, 1]) < 0.03


def test_two_sums_of_the_same_answers_share_no_mask() -> None:
    vectors = {m: np.zeros(1000, np.uint32) for m in range(3)}
    first, second = until_answers(vectors), until_answers(vectors)
    for member in vectors:
        apart = first.covered[member] - second.covered[member]
        assert np.count_nonzero(apart) > 990 and not set(first.roll.keys.values()) & set(
            second.roll.keys.values()
        )


def test_server_and_colluders_below_the_threshold_learn_nothing_but_the_sum() -> None:
    """Two of six, threshold four, give the server all they have after an honest opening: their secrets, and
    every share they hold. They try to take the mask off one honest answer: by its seed, its key, and by what
    remains of the sum."""
    vectors = vectors_of(6, 500)
    parties = until_answers(vectors)
    spies, honest = sorted(vectors)[:2], sorted(vectors)[2:]
    victim = honest[0]
    assert parties.roll.needed == 4
    seeds = {
        m: joined({o + 1: parties.sessions[o].held[m][:SHARE] for o in sorted(vectors)[:4]}) for m in vectors
    }
    known = parties.covered[victim].copy()
    shift(
        known, [(own_key(seeds[victim], parties.roll.bound, victim), -1)]
    )  # an honest opening gives seeds away
    for spy in spies:
        pair = sorted((spy, victim))
        key = pair_key(
            b"mask", parties.sessions[spy].mask, parties.roll.keys[victim][32:64], parties.roll.bound, *pair
        )
        shift(known, [(key, -1 if victim < spy else +1)])
    # three honest members' pair masks are left on it: uniform, and unlike the answer
    left = known - vectors[victim]
    assert np.count_nonzero(left) > 490
    assert far_from_uniform(left)[0] < 2.8
    # their shares of the victim's masking key give nothing: each of all keys is as likely
    shares = {spy + 1: parties.sessions[spy].held[victim][SHARE:] for spy in spies}
    with pytest.raises((ValueError, AssertionError)):
        assert joined(shares) == parties.sessions[victim].mask
    # what they know together is the honest sum
    np.testing.assert_array_equal(
        parties.sum(vectors) - vectors[spies[0]] - vectors[spies[1]],
        np.sum([vectors[m] for m in honest], axis=0, dtype=np.uint32),
    )


def test_shares_below_the_threshold_fit_every_secret() -> None:
    """For any secret there is a last share that makes it of the two that are known: two of three say nothing."""
    shares = split(b"\x07" * 32, 3, (1, 2, 3))
    for wanted in (b"\0" * 32, b"\xff" * 32, b"\x07" * 32):
        one, two = (int.from_bytes(shares[point], "big") for point in (1, 2))
        third = (int.from_bytes(wanted, "big") - 3 * one + 3 * two) % PRIME  # weights at 0: 3, -3, 1
        assert joined({1: shares[1], 2: shares[2], 3: third.to_bytes(SHARE, "big")}) == wanted


def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_another() -> None:
    secret = bytes(range(32))
    shares = split(secret, 3, range(1, 6))
    for points in itertools.combinations(shares, 3):
        assert joined({point: shares[point] for point in points}) == secret
    for points in itertools.combinations(shares, 2):
        with contextlib.suppress(ValueError):  # of no 32 bytes at all
            assert joined({point: shares[point] for point in points}) != secret
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11))


# --- what members refuse


def ready(count: int = 4) -> tuple[Any, dict[int, np.ndarray]]:
    vectors = vectors_of(count, 20)
    return until_answers(vectors), vectors


def says(words: str, work: Callable[[], Any]) -> None:
    with pytest.raises(Refused, match=words) as error:
        work()
    assert error.value.code == "W608"


def test_lists_that_overlap_are_refused() -> None:
    parties, vectors = ready()
    session, everyone = parties.sessions[0], set(vectors)
    says("both in the sum and outside", lambda: session.open(everyone, {3}))
    says("both in the sum and outside", lambda: session.open(everyone, everyone))


def test_openings_of_other_members_or_too_few_are_refused() -> None:
    parties, vectors = ready()
    session, everyone = parties.sessions[0], set(vectors)
    says("other members", lambda: session.open(everyone - {3}, set()))
    says("other members", lambda: session.open(everyone | {99}, set()))
    says("without this one", lambda: session.open(everyone - {0}, {0}))
    says("threshold of this sum, 3", lambda: session.open({0, 3}, everyone - {0, 3}))


def test_one_opening_a_sum() -> None:
    parties, vectors = ready()
    everyone = set(vectors)
    after, shares = kept(parties.sessions[0]).open(everyone - {3}, {3})
    assert after.seal == after.mask == after.seed == b""  # nothing is left to give away
    again, same = kept(after).open(everyone - {3}, {3})
    assert same == shares and again == after
    says("second opening", lambda: kept(after).open(everyone, set()))
    says("already", lambda: kept(after).cover(vectors[0]))


def test_another_answer_under_the_same_masks_is_refused() -> None:
    parties, vectors = ready()
    after, same = kept(parties.sessions[0]).cover(vectors[0])
    np.testing.assert_array_equal(same, parties.covered[0])
    says("already", lambda: kept(after).cover(vectors[0] + np.uint32(1)))


def test_steps_come_in_their_order_and_once() -> None:
    vectors = vectors_of(4, 20)
    fresh = {m: Session.begin(m, NAME, vectors, 2 / 3) for m in vectors}
    keys = {m: session.public for m, session in fresh.items()}
    says("already", lambda: fresh[0].receive({}))
    says("already", lambda: fresh[0].cover(vectors[0]))
    shared, sealed = fresh[0].share(keys)
    says("already", lambda: shared.share({m: key for m, key in keys.items() if m != 9}))
    says("already", lambda: shared.cover(vectors[0]))
    again, others = shared.share(keys)  # a member that died before its shares left
    assert again.keys == shared.keys and not set(others.values()) & set(sealed.values())
    parties = until_answers(vectors)
    says("already", lambda: parties.sessions[0].receive({}))


def test_a_sum_of_two_is_refused() -> None:
    says("sum of 2 members", lambda: Session.begin(0, NAME, (0, 1), 2 / 3))
    says("with this one", lambda: Session.begin(0, NAME, (1, 2, 3), 2 / 3))
    sessions = {m: Session.begin(m, NAME, (0, 1, 2), 2 / 3) for m in (0, 1, 2)}
    says("keys of 2 among 3", lambda: sessions[0].share({m: sessions[m].public for m in (0, 1)}))
    roll = Roll(NAME, (0, 1, 2), 2 / 3, {m: sessions[m].public for m in (0, 1)})
    assert not roll.enough


def test_keys_that_are_not_what_they_should_be_are_refused() -> None:
    sessions = {m: Session.begin(m, NAME, range(4), 2 / 3) for m in range(4)}
    keys = {m: session.public for m, session in sessions.items()}
    me = sessions[0]
    says("not this one's", lambda: me.share({**keys, 0: keys[1]}))
    says("not asked", lambda: me.share({**keys, 9: keys[1]}))
    says("same of two members", lambda: me.share({**keys, 2: keys[1]}))
    says("cut", lambda: me.share({**keys, 2: keys[2][:-1]}))
    says("is none", lambda: me.share({**keys, 2: bytes(32) + keys[2][32:]}))
    assert valid(keys[1]) and not valid(keys[1][:-1]) and not valid(bytes(KEYS))
    assert not valid(bytes(32) + keys[1][32:])


def test_shares_that_were_changed_cut_or_swapped_are_refused() -> None:
    vectors = vectors_of(4, 20)
    sessions = {m: Session.begin(m, NAME, vectors, 2 / 3) for m in vectors}
    keys = {m: session.public for m, session in sessions.items()}
    shared, sealed = {}, {}
    for m in vectors:
        shared[m], sealed[m] = sessions[m].share(keys)
    for_me = {m: sealed[m][0] for m in vectors if m != 0}
    assert {len(value) for value in for_me.values()} == {SEALED}
    bad = bytes([for_me[3][0] ^ 1]) + for_me[3][1:]
    for spoilt in ({3: bad}, {3: for_me[3][:-1]}, {3: for_me[6]}, {3: sealed[3][6]}):
        says("cannot be read", lambda spoilt=spoilt: shared[0].receive({**for_me, **spoilt}))
    says("others", lambda: shared[0].receive({**for_me, 42: bad}))
    says("shares of 1 others", lambda: shared[0].receive({3: for_me[3]}))


def test_members_who_were_told_of_different_members_share_nothing() -> None:
    """A server that gives one member another list gets no sum: names of sums hold all keys."""
    sessions = {m: Session.begin(m, NAME, range(5), 0.6) for m in range(5)}
    keys = {m: session.public for m, session in sessions.items()}
    one, _ = sessions[0].share(keys)
    _, sealed = sessions[1].share({m: keys[m] for m in range(4)})
    says("cannot be read", lambda: one.receive(dict.fromkeys((1, 2, 3), sealed[0])))


# --- what the server refuses


def test_one_false_share_does_no_harm_and_many_are_noticed() -> None:
    vectors = vectors_of(10, 20)
    parties = until_answers(vectors, {"answers": 2})
    opened = parties.opened(parties.covered)
    want = np.sum([vectors[m] for m in parties.covered], axis=0, dtype=np.uint32)

    def spoilt(*liars: int) -> np.ndarray:
        lies = {m: {who: bytes(SHARE) for who in shares} for m, shares in opened.items() if m in liars}
        total = np.sum(list(parties.covered.values()), axis=0, dtype=np.uint32)
        unmask(total, parties.roll, parties.covered, parties.dropped, {**opened, **lies})
        return total

    for liar in parties.covered:
        np.testing.assert_array_equal(spoilt(liar), want)
    says("give no secret", lambda: spoilt(*sorted(parties.covered)[:3]))


def test_too_few_openings_leave_the_sum_as_it_is() -> None:
    parties, _ = ready(10)
    total = np.sum(list(parties.covered.values()), axis=0, dtype=np.uint32)
    before = total.copy()
    openers = sorted(parties.covered)[: parties.roll.needed - 1]
    says("7 or more", lambda: unmask(total, parties.roll, parties.covered, (), parties.opened(openers)))
    np.testing.assert_array_equal(total, before)


def test_a_session_shows_no_secret_where_it_is_printed() -> None:
    session = replace(Session.begin(0, NAME, range(3), 2 / 3), held={0: b"share"})
    for secret in (session.seal, session.mask, session.seed, b"share"):
        assert repr(secret) not in repr(session)
