"""Programs that compile in less time: for tests of sums and shards, not of programs as users get them."""

from __future__ import annotations

import functools

import jax

# XLA:CPU's emitters of fused loops go through MLIR, kernel by kernel; the older ones do not.
jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})
