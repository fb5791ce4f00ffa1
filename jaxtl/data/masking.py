"""Masked language modelling's examples: which word pieces are hidden, traced into the compiled step.

Devlin et al. 2018 (arXiv:1810.04805), A.1: of the pieces that are not special, `rate` are chosen, the same number in
every text of a length; of the chosen, 80 % become the mask, 10 % any piece, and 10 % stay.
"""

import jax
import jax.numpy as jnp

from jaxtl.models.stages import Sequence


def read_positions(length: int, rate: float) -> int:
    """Returns the most pieces that are chosen in a text of `length` pieces, two of them special."""
    return max(1, round(rate * (length - 2)))


def mask(
    tokens: Sequence, keys: jax.Array, *, rate: float, mask_id: int, special_ids: tuple[int, ...], vocabulary: int
) -> tuple[Sequence, jax.Array, jax.Array]:
    """Returns the texts with some pieces hidden, and what they were.

    Args:
        tokens: ids int32 `[batch, length]`.
        keys: `[batch]` JAX random keys, one for each text.
        rate: share of the pieces chosen; at least one is, of a text that has any.
        mask_id: the id of `[MASK]`.
        special_ids: ids never chosen: `[CLS]`, `[SEP]`, ..
        vocabulary: number of ids.

    Returns:
        The texts, with `positions` int32 `[batch, read]`; the ids at those positions, int32 `[batch, read]`; and their
        weights, float32 `[batch, read]`, 0 where a text has fewer chosen pieces than `read`.
    """
    ids, lengths, _ = tokens
    read = read_positions(ids.shape[1], rate)

    def one(ids: jax.Array, length: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        order_key, fate_key, piece_key = jax.random.split(key, 3)
        free = (jnp.arange(len(ids)) < length) & ~jnp.isin(ids, jnp.asarray(special_ids, ids.dtype))
        available = jnp.sum(free)
        wanted = jnp.clip(jnp.round(rate * available).astype(jnp.int32), 1, read)
        chosen = jnp.arange(read) < jnp.minimum(wanted, available)
        # The highest of random numbers: a draw without repetition.
        _, positions = jax.lax.top_k(jnp.where(free, jax.random.uniform(order_key, ids.shape), -1.0), read)
        originals = ids[positions]
        fate = jax.random.uniform(fate_key, (read,))
        other = jax.random.randint(piece_key, (read,), 0, vocabulary, ids.dtype)
        hidden = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, other, originals))
        ids = ids.at[positions].set(jnp.where(chosen, hidden, originals).astype(ids.dtype))
        return ids, positions, originals, chosen.astype(jnp.float32)

    ids, positions, originals, weights = jax.vmap(one)(ids, lengths, keys)
    return Sequence(ids, lengths, positions), originals, weights
