"""Segment ids: which text of its row each token belongs to.

int32 [batch, length]: equal for the tokens of one text, which are adjacent, and different from those of the row's other
texts; 0 for padding. ``PREFIX`` marks a prefix that all texts of a row share, stored once at the start of the row.
Every text sees it, and its positions are those it would have if it alone followed the prefix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PREFIX = -1


def sees(query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
    """Whether the segments of queries let them see keys; causality is not checked here."""
    return (query_ids == key_ids) | (key_ids == PREFIX)


def positions(length: int, segment_ids_bt: jax.Array | None) -> jax.Array:
    """The position of each token in its own text: int32 [1, length], or [batch, length] with segment ids."""
    position_1t = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids_bt is None:
        return position_1t
    starts_bt = jnp.diff(segment_ids_bt, axis=1, prepend=segment_ids_bt[:, :1]) != 0
    first_bt = jax.lax.cummax(jnp.where(starts_bt, position_1t, 0), axis=1)
    prefix_bt = segment_ids_bt == PREFIX
    before_bt = jnp.where(prefix_bt, 0, jnp.sum(prefix_bt, axis=1, keepdims=True, dtype=jnp.int32))
    return position_1t - first_bt + before_bt
