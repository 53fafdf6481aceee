"""Training: data, losses on a mesh, the loop. Imported as ``f2llm_jax.train``."""
