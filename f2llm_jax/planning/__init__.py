"""What ``f2llm_jax.plan`` is made of: the chips, analytic counts, and the reading of compiled programs."""
