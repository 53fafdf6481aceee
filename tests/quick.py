"""Programs that compile in less time: where our own layouts, kernels and meshes are compared with each other.

What is compared with others, as the reference's losses and steps, runs as users run it.
"""

from __future__ import annotations

import functools

import jax

# XLA:CPU's emitters of fused loops go through MLIR, kernel by kernel; the older ones do not.
jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})
