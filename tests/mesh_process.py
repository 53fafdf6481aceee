"""One of two processes with four CPU devices each, which load a model onto their common mesh and export it from there.

Run by test_mesh_load.py with: number of the process, port, folder to load, folder to export to, format.
Prints a line of JSON: the bytes read, and the bytes of the shards that this process needs.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax

if __name__ == "__main__":
    number, port, folder, out, to = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))

    from flax.traverse_util import flatten_dict

    from f2llm_jax.convert.export import export_release
    from f2llm_jax.convert.load import load_params, open_checkpoint
    from f2llm_jax.convert.table import tensor_table
    from f2llm_jax.release import read_release
    from f2llm_jax.sharding import make_mesh

    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    config = read_release(Path(folder)).config
    checkpoint = open_checkpoint(Path(folder))
    params = load_params(checkpoint, config, mesh=make_mesh(fsdp=4, tensor=2))
    arrays = flatten_dict(params, sep=".")
    needed = 0
    for tensor in tensor_table(config):
        array = arrays[tensor.path]
        indices = {str(shard.index): shard.index for shard in array.addressable_shards}.values()
        for index in indices:
            bounds = [part.indices(size)[:2] for part, size in zip(index, tensor.shape, strict=True)]
            needed += math.prod(max(0, end - begin) for begin, end in bounds) * 4
    print(json.dumps({"read": checkpoint.bytes_read, "needed": needed}), flush=True)
    export_release(params, config, out, like=folder, to=to)
