"""Which word pieces are hidden: how many, where, what becomes of them, and that nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtl.data import masking
from jaxtl.models.stages import Sequence, Staged, abstract
from jaxtl.training import step

SPECIAL = (0, 1, 2, 3, 4)  # [PAD], [UNK], [CLS], [SEP], [MASK]
CLS, SEP, MASK, UNKNOWN = 2, 3, 4, 1
VOCABULARY = 200
RATE = 0.15


def texts(lengths, padded, seed=0):
    """Ids of [CLS], pieces, [SEP], then padding."""
    random = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), padded), np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = random.integers(len(SPECIAL), VOCABULARY, length)
        row[0], row[length - 1] = CLS, SEP
    return Sequence(jnp.asarray(ids), jnp.asarray(lengths, jnp.int32))


@functools.cache
def many_keys(seed):
    return jax.random.split(jax.random.key(seed), 2000)


def keys(count, seed=0):
    return many_keys(seed)[:count]


@functools.partial(jax.jit, static_argnames="rate")
def hide(tokens, keys, rate=RATE):
    return masking.mask(tokens, keys, rate=rate, mask_id=MASK, special_ids=SPECIAL, vocabulary=VOCABULARY)


def chosen_positions(hidden, weights):
    """The positions chosen in each text, as sets; no position counts twice."""
    found = []
    for positions, weight in zip(np.asarray(hidden.positions), np.asarray(weights), strict=True):
        row = positions[weight == 1].tolist()
        assert len(set(row)) == len(row)
        found.append(set(row))
    return found


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_of_each_text_the_rate_of_its_own_pieces_is_chosen_and_at_least_one(rate):
    """Halves are rounded to even, in float32, as `jnp.round` does: 0.5 * 3 = 1.5 -> 2, 0.5 * 5 = 2.5 -> 2."""
    lengths = np.arange(3, 33)
    _, _, weights = hide(texts(lengths, 40), keys(len(lengths)), rate)
    pieces = lengths - 2
    expected = np.maximum(1, np.round(np.float32(rate) * pieces.astype(np.float32)))
    np.testing.assert_array_equal(np.asarray(weights).sum(axis=1), expected)
    if rate == 0.5:
        assert expected[[2, 4]].tolist() == [2, 2]  # 3 and 5 pieces


def test_no_more_are_chosen_than_the_batchs_length_has_places_for():
    """A text of nothing but pieces, as a tokenizer without special tokens makes it, has two more than are read for."""
    ids = jnp.full((1, 16), 50, jnp.int32)
    hidden, _, weights = hide(Sequence(ids, jnp.array([16])), keys(1), 0.5)
    assert masking.read_positions(16, 0.5) == 7
    assert hidden.positions.shape == weights.shape == (1, 7)
    assert weights.sum() == 7


def test_special_pieces_and_padding_are_never_chosen():
    """Over 500 draws of each text, [UNK] in the middle of it included."""
    tokens = texts([3, 10, 24, 17] * 500, 102)
    ids, lengths = np.array(tokens.values), np.asarray(tokens.lengths)
    ids[3::4, 5:9] = UNKNOWN
    hidden, labels, weights = hide(tokens._replace(values=jnp.asarray(ids)), keys(2000))
    for row, chosen in enumerate(chosen_positions(hidden, weights)):
        for position in chosen:
            assert position < lengths[row]
            assert ids[row, position] not in SPECIAL
    assert not np.isin(np.asarray(labels)[np.asarray(weights) == 1], SPECIAL).any()


def test_labels_are_the_originals_and_what_was_not_chosen_is_untouched():
    tokens = texts([12, 30, 5, 22], 32)
    hidden, labels, weights = hide(tokens, keys(4))
    ids, after = np.asarray(tokens.values), np.asarray(hidden.values)
    np.testing.assert_array_equal(np.take_along_axis(ids, np.asarray(hidden.positions), axis=1), labels)
    for row, chosen in enumerate(chosen_positions(hidden, weights)):
        kept = [position for position in range(ids.shape[1]) if position not in chosen]
        np.testing.assert_array_equal(after[row, kept], ids[row, kept])
    np.testing.assert_array_equal(hidden.lengths, tokens.lengths)


def test_of_the_chosen_80_percent_become_the_mask_10_percent_any_piece_and_10_percent_stay():
    """Five standard errors of a binomial: 2,000 texts of 100 pieces, 15 chosen in each.

    Any of the 200 ids may be drawn: 1 in 200 of the 10 % is the piece itself, and as many the mask.
    """
    tokens = texts([102] * 2000, 102)
    hidden, labels, weights = hide(tokens, keys(2000))
    count = 2000 * 15
    assert weights.sum() == count
    after = np.asarray(jnp.take_along_axis(hidden.values, hidden.positions, axis=1))
    labels = np.asarray(labels)
    shares = {
        "mask": (np.mean(after == MASK), 0.8 + 0.1 / VOCABULARY),
        "stay": (np.mean(after == labels), 0.1 + 0.1 / VOCABULARY),
        "other": (np.mean((after != MASK) & (after != labels)), 0.1 * (1 - 2 / VOCABULARY)),
    }
    for what, (found, expected) in shares.items():
        assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count), what
    other = after[(after != MASK) & (after != labels)]
    assert len(np.unique(other)) > 0.9 * VOCABULARY  # about 15 draws of each id
    # And every position is as likely: 300 draws of each on average, five standard deviations.
    where = np.bincount(np.asarray(hidden.positions).ravel(), minlength=102)
    assert where[[0, 101]].tolist() == [0, 0]
    assert np.abs(where[1:101] - 300).max() < 5 * np.sqrt(300)


def test_masks_are_a_function_of_the_key_alone():
    tokens = texts([20, 32, 28, 24], 32)
    first, again, other = hide(tokens, keys(4)), hide(tokens, keys(4)), hide(tokens, keys(4, seed=1))
    np.testing.assert_array_equal(first[0].values, again[0].values)
    np.testing.assert_array_equal(first[0].positions, again[0].positions)
    assert chosen_positions(first[0], first[2]) != chosen_positions(other[0], other[2])


def test_masks_of_a_text_do_not_depend_on_the_texts_beside_it_nor_on_the_length_it_is_filled_up_to():
    """Holds for the length since a random number of JAX's depends on its place alone (jax_threefry_partitionable).

    But for the number chosen, where rounding would give one more than the shorter batch has places for.
    """
    lengths = [7, 16, 12, 20]
    first, _, weights = hide(texts(lengths, 32), keys(4))
    longer, _, weights_longer = hide(texts(lengths, 40), keys(4))
    assert chosen_positions(first, weights) == chosen_positions(longer, weights_longer)
    np.testing.assert_array_equal(first.values, longer.values[:, :32])
    # The third text as the first of other ones.
    others = texts([12, 30, 5, 9], 32, seed=1)
    others = others._replace(values=others.values.at[0].set(texts(lengths, 32).values[2]))
    beside, _, weights_beside = hide(others, keys(4)[jnp.array([2, 0, 1, 3])])
    assert chosen_positions(beside, weights_beside)[0] == chosen_positions(first, weights)[2]
    np.testing.assert_array_equal(beside.values[0], first.values[2])


class Table(nnx.Module):
    """Logits of a piece: the row of a table by what stands in its place; of hidden texts [batch, read, ids]."""

    def __init__(self, rngs):
        self.rows = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, VOCABULARY)))

    def __call__(self, x, rng):
        ids = x if x.positions is None else jnp.take_along_axis(x.values, x.positions, axis=1)
        return self.rows[...][ids]


def scored(tokens, weight):
    """What `step.score` and `step.train_step` find in a batch, hidden as evaluation does."""
    structure, params, _ = abstract(lambda rngs: Staged([("head", Table(rngs))]))
    values = {"head/rows": jax.random.normal(jax.random.key(3), params["head/rows"].shape)}
    table = np.array(values["head/rows"])
    weight = jnp.asarray(weight, jnp.float32)
    count = len(weight)
    hidden, labels, weights = hide(tokens, keys(count))

    def prepare(batch, key):
        return {**batch, "input": hidden, "label": labels, "weight": weights * batch["weight"][:, None]}

    batch = {"input": tokens, "label": jnp.zeros(count, jnp.int32), "weight": weight, "index": jnp.arange(count)}
    figures = step.score(structure, prepare)({}, values, batch)
    optimizer = optax.sgd(0.1)
    state = step.TrainState.create(values, optimizer)  # donated: the table above is a copy
    state, trained_on = step.train_step(structure, optimizer, prepare, ())(state, {}, batch, jax.random.key(0))
    return np.asarray(figures), np.asarray(trained_on), table, np.asarray(state.params["head/rows"])


def test_the_loss_is_the_cross_entropy_at_the_chosen_positions_alone():
    tokens = texts([12, 30, 5, 22], 32)
    # The fourth row fills up the batch: it has no weight.
    figures, trained_on, table, _ = scored(tokens, [1, 1, 1, 0])
    np.testing.assert_allclose(figures, trained_on[:4], rtol=1e-6)
    hidden, _, weights = hide(tokens, keys(4))
    ids = np.asarray(tokens.values)
    losses, right = [], 0
    for row, chosen in enumerate(chosen_positions(hidden, weights)[:3]):
        for position in chosen:
            logits = table[np.asarray(hidden.values)[row, position]].astype(np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[ids[row, position]])
            right += np.argmax(logits) == ids[row, position]
    # 10, 28 and 3 pieces: 1.5 -> 2, 4.2 -> 4, 0.45 -> 1
    assert len(losses) == 2 + 4 + 1
    np.testing.assert_allclose(figures, [np.sum(losses), right, 7, 3], rtol=1e-5)


def test_a_text_of_special_pieces_alone_has_no_weight_and_a_batch_of_such_changes_nothing():
    """`🧄 🧄` is [CLS] [UNK] [UNK] [SEP] to a tokenizer without garlic: nothing can be hidden, and no loss is NaN."""
    ids = jnp.array([[CLS, UNKNOWN, UNKNOWN, SEP] + [0] * 28] * 4, jnp.int32)
    tokens = Sequence(ids, jnp.full(4, 4, jnp.int32))
    hidden, _, weights = hide(tokens, keys(4))
    assert weights.sum() == 0
    np.testing.assert_array_equal(hidden.values, ids)
    figures, _, before, after = scored(tokens, [1, 1, 1, 1])
    np.testing.assert_array_equal(figures, [0, 0, 0, 4])
    np.testing.assert_array_equal(after, before)
