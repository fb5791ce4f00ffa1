"""Batches by length: nothing lost, few shapes, little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtl.data import buckets

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array)


def padded(lengths, chosen):
    """Returns the total if every text is filled up to the smallest of the lengths that holds it."""
    return sum(min(size for size in chosen if size >= length) for length in lengths)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 9))
def test_no_other_lengths_fill_up_less(lengths, count, multiple, above):
    limit = int(lengths.max()) + above
    found = buckets.bucket_lengths(lengths, count, limit, multiple)
    sizes = sorted({min(i * multiple, limit) for i in range(1, limit // multiple + 2)})
    assert list(found) == sorted(set(found))
    assert set(found) <= set(sizes)
    assert len(found) <= count
    assert found[-1] >= lengths.max()
    tried = (c for k in range(1, count + 1) for c in itertools.combinations(sizes, k) if c[-1] >= lengths.max())
    assert padded(lengths, found) == min(padded(lengths, chosen) for chosen in tried)


def test_buckets_by_hand():
    lengths = np.array([3, 9, 10, 30, 30])
    assert buckets.bucket_lengths(lengths, 1, 30) == (30,)
    assert buckets.bucket_lengths(lengths, 2, 64) == (16, 32)  # 3 x 16 + 2 x 32 < 8 + 4 x 32
    assert buckets.bucket_lengths(lengths, 9, 64) == (8, 16, 32)  # no bucket that saves nothing
    for wrong in (np.array([], int), np.array([65])):
        with pytest.raises(ValueError, match="limit 64"):
            buckets.bucket_lengths(wrong, 2, 64)


def test_another_length_is_added_while_it_saves_the_tokens_of_128_texts():
    """Exactly where the sum of both is least, so that few texts get one length and many get eight."""
    random, found = np.random.default_rng(0), []
    for count in (30, 500, 5_000, 50_000):
        lengths = random.integers(3, 129, count)
        chosen = buckets.bucket_lengths(lengths, None, 128)
        assert chosen == buckets.bucket_lengths(lengths, len(chosen), 128)
        costs = [
            padded(lengths, buckets.bucket_lengths(lengths, number, 128)) + 128 * number * lengths.mean()
            for number in range(1, 9)
        ]
        assert len(chosen) == 1 + np.argmin(costs)
        found.append(len(chosen))
    assert found[0] == 1
    assert found[-1] == 8
    assert found == sorted(found)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.none() | st.integers(0, 99))
def test_every_row_comes_once_in_the_fewest_batches_of_the_smallest_shapes(lengths, batch_size, count, seed):
    shapes = buckets.bucket_lengths(lengths, count, 64)
    random = None if seed is None else np.random.default_rng(seed)
    batches = buckets.group(lengths, shapes, batch_size, random)
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sorted(np.concatenate([rows for rows, _ in batches]).tolist()) == list(range(len(lengths)))
    for rows, length in batches:
        assert rows.dtype == np.int32
        assert length == min(shape for shape in shapes if shape >= lengths[rows].max())
    # One batch at most is short, and it is the last.
    assert [len(rows) for rows, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_at_most_one_batch_for_each_pair_of_neighbouring_buckets_mixes_them_if_there_is_no_order():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    batches = buckets.group(lengths, (16, 32, 48, 64), 10, None)
    assert sum(lengths[rows].min() <= length - 16 for rows, length in batches) <= 3
    (rows, length), *_ = buckets.group(np.array([5, 2, 5, 2]), (8,), 4, None)
    assert (rows.tolist(), length) == ([1, 3, 0, 2], 8)  # of one length: the order of the data set


def test_the_order_is_a_function_of_the_generator():
    lengths = np.random.default_rng(0).integers(1, 65, 200)

    def drawn(seed):
        return [(rows.tolist(), length) for rows, length in buckets.group(lengths, (32, 64), 8, seed)]

    assert drawn(np.random.default_rng(1)) == drawn(np.random.default_rng(1))
    assert drawn(np.random.default_rng(1)) != drawn(np.random.default_rng(2))
    assert drawn(None) == drawn(None)
    random = np.random.default_rng(1)
    first, second = drawn(random), drawn(random)
    assert first != second
    order = [length for _, length in first]
    assert order not in (sorted(order), sorted(order, reverse=True))  # batches of both lengths, mixed


def test_the_short_batch_is_not_always_of_the_longest_texts():
    lengths = np.append(np.repeat([8, 16, 24, 32], 7), 8)
    last = [buckets.group(lengths, (8, 16, 24, 32), 4, np.random.default_rng(seed))[-1] for seed in range(50)]
    assert {len(rows) for rows, _ in last} == {1}  # 29 rows
    assert len({length for _, length in last}) > 1


def test_images_are_one_group_in_their_own_order():
    batches = buckets.group(np.zeros(5, int), (0,), 2, None)
    assert [(rows.tolist(), length) for rows, length in batches] == [([0, 1], 0), ([2, 3], 0), ([4], 0)]
    assert buckets.group(np.zeros(0, int), (0,), 2, None) == []
    assert buckets.group(np.zeros(0, int), (0,), 2, np.random.default_rng(0)) == []


def test_a_text_longer_than_the_buckets_is_an_error():
    with pytest.raises(ValueError, match="33 tokens"):
        buckets.group(np.array([33]), (16, 32), 2, None)


def test_a_million_examples_take_no_loop_over_rows():
    lengths = np.random.default_rng(0).integers(1, 129, 1_000_000)
    shapes = buckets.bucket_lengths(lengths, 4, 128)
    batches = buckets.group(lengths, shapes, 64, np.random.default_rng(0))
    assert len(batches) == 15_625
    assert sum(len(rows) for rows, _ in batches) == len(lengths)
