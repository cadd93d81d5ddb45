"""data.py: every token once per epoch, whatever the shape of the run."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import UserError
from corpus.shards import TokenStream
from data import TrainBatches, validation_batches

sizes = st.integers(1, 5)


def cut(length: int, cuts) -> TokenStream:
    """A stream whose token at each place is the place itself, in shards cut at `cuts` (empty shards too)."""
    return TokenStream(np.split(np.arange(length, dtype=np.uint32), sorted(c % (length + 1) for c in cuts)))


@st.composite
def streams(draw):
    """(block size, stream of at least one sequence)"""
    T = draw(st.integers(1, 7))
    length = draw(st.integers(T + 1, 60))
    return T, cut(length, draw(st.lists(st.integers(0, 60), max_size=4)))


def starts(batches: TrainBatches, count: int, batch_size: int, accumulation: int, world: int, first_step: int = 0):
    """First tokens of the sequences of `count` steps, a list per step, by (micro, rank): {(micro, rank): [starts]}"""

    def start(*place: int) -> list[int]:
        x, y = batches.batch(*place)
        assert x.shape == y.shape == (batch_size, batches.T)
        assert (y == x + 1).all()  # in these streams the next token is the next number
        return x[:, 0].tolist()

    places = list(itertools.product(range(accumulation), range(world)))
    return [
        {(micro, rank): start(step, micro, batch_size, accumulation, rank, world) for micro, rank in places}
        for step in range(first_step, first_step + count)
    ]


@given(streams(), sizes, sizes, st.integers(1, 3), st.integers(0, 9))
def test_an_epoch_holds_each_of_its_targets_once(case, batch_size, accumulation, world, seed):
    """n·T different targets, then the next epoch starts: ranks and micro-steps are disjoint, none is left out."""
    T, stream = case
    batches = TrainBatches(stream, T, seed, "shuffled")
    n, per_step = (len(stream) - 1) // T, batch_size * accumulation * world
    run = starts(batches, -(-2 * n // per_step), batch_size, accumulation, world)
    in_order = [s for step in run for places in step.values() for s in places]
    for epoch in range(2):
        seen = Counter(t for s in in_order[epoch * n : epoch * n + n] for t in range(s + 1, s + T + 1))
        assert len(seen) == n * T
        assert set(seen.values()) == {1}
        assert max(seen) < len(stream)
        assert min(seen) >= 1


@given(streams(), st.integers(0, 9), st.integers(0, 30))
def test_a_step_sees_the_same_sequences_however_it_is_split(case, seed, step):
    """12 sequences a step, as any batch size x accumulation x world size, at any step: also across an epoch's border."""
    T, stream = case
    splits = [(b, a, 12 // (b * a)) for b in (1, 2, 3, 4, 6, 12) for a in (1, 2, 3, 4, 6, 12) if 12 % (b * a) == 0]
    found = {
        split: starts(TrainBatches(stream, T, seed, "shuffled"), 1, *split, first_step=step)[0].values() for split in splits
    }
    assert len({tuple(s for places in parts for s in places) for parts in found.values()}) == 1


def test_epochs_and_seeds_have_different_orders():
    """100 sequences: that two permutations agree by chance has probability 1/100!."""
    stream = cut(401, [])
    orders = [
        tuple(s // 4 for s in starts(TrainBatches(stream, 4, seed, "shuffled"), 1, 100, 1, 1, first_step=epoch)[0][0, 0])
        for seed in (1, 2)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 6
    assert tuple(range(100)) not in orders


def test_what_does_not_fill_a_sequence_changes_between_epochs():
    """11 tokens, T=4: two sequences, two of ten targets left out; over epochs no token is left out for ever."""
    batches = TrainBatches(cut(11, []), 4, 0, "shuffled")
    left_out = set()
    for epoch in range(50):
        seen = {t for s in starts(batches, 1, 2, 1, 1, first_step=epoch)[0][0, 0] for t in range(s + 1, s + 5)}
        left_out.add(frozenset(range(1, 11)) - seen)
    assert left_out == {frozenset({9, 10}), frozenset({1, 10}), frozenset({1, 2})}


@given(streams(), sizes, sizes, st.integers(1, 3))
def test_sequential_goes_through_the_text_and_starts_again(case, batch_size, accumulation, world):
    """... and one_batch is its first step, for ever."""
    T, stream = case
    run = starts(TrainBatches(stream, T, 5, "sequential"), 4, batch_size, accumulation, world)
    n, found = (len(stream) - 1) // T, [s for step in run for places in step.values() for s in places]
    assert found == [g % n * T for g in range(len(found))]
    assert starts(TrainBatches(stream, T, 5, "one_batch"), 3, batch_size, accumulation, world) == 3 * run[:1]


@given(streams(), st.integers(1, 70), sizes, st.integers(1, 4))
def test_validation_covers_the_first_targets_once(case, limit, batch_size, world):
    """Over all ranks; each rank yields equally often (or it would hang the others), always in one shape."""
    T, stream = case
    ranks = [list(validation_batches(stream, T, limit, batch_size, rank, world)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    targets = []
    for x, y in (pair for rank in ranks for pair in rank):
        assert x.shape == y.shape == (batch_size, T)
        assert (y[y >= 0] == x[y >= 0] + 1).all()
        assert set(y[y < 0].tolist()) <= {-100}
        targets += y[y >= 0].tolist()
    assert sorted(targets) == list(range(1, min(limit, len(stream) - 1) + 1))


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_text_shorter_than_one_sequence_is_refused_with_what_would_fit(length):
    """The block size in the remedy is itself accepted."""
    with pytest.raises(UserError, match=f"has {length} tokens") as e:
        TrainBatches(cut(length, []), 8, 0, "shuffled")
    if length > 1:
        remedy = int(str(e.value).split("--sequence_length=")[1])
        assert TrainBatches(cut(length, []), remedy, 0, "shuffled").n >= 1
