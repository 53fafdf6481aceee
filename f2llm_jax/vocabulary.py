"""The vocabulary table on a mesh: looked up where it is stored, so that only token ids and their rows are sent.

The table is the largest parameter of the small models (61 % of the 80M), sharded over ``tensor`` by rows and over
``fsdp`` by hidden size. Indexing it as one array would gather it on every device first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from f2llm_jax.axes import COMPUTE_RULES, STORAGE_RULES, partition_spec


def lookup(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """``table_vd[tokens_bt]``, on the mesh of ``jax.set_mesh`` without gathering the table.

    For all rows of its fsdp group, a device reads the tokens in its shard of the vocabulary, and zeros for the others.
    An all-to-all over fsdp then trades rows for hidden size, and a sum over tensor combines the shards. Gradients take
    the same path back.

    Args:
        table_vd: [vocabulary, hidden], sharded as ``STORAGE_RULES`` say.
        tokens_bt: int32 [batch, length], sharded as ``COMPUTE_RULES`` say.

    Returns:
        [batch, length, hidden] in the table's dtype, sharded over rows only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table_vd[tokens_bt]
    table_spec = partition_spec(table_vd.shape, ("vocab", "embed"), STORAGE_RULES, mesh.shape)
    tokens_spec = partition_spec(tokens_bt.shape, ("batch", "length"), COMPUTE_RULES, mesh.shape)

    def on_shard(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        tokens_bt = jax.lax.all_gather(tokens_bt, "fsdp", axis=0, tiled=True)
        row_bt = tokens_bt - jax.lax.axis_index("tensor") * len(table_vd)
        here_bt = (row_bt >= 0) & (row_bt < len(table_vd))
        x_btd = jnp.where(here_bt[..., None], table_vd[jnp.where(here_bt, row_bt, 0)], 0)
        x_btd = jax.lax.all_to_all(x_btd, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x_btd, "tensor")

    return jax.shard_map(on_shard, in_specs=(table_spec, tokens_spec), out_specs=tokens_spec)(table_vd, tokens_bt)
