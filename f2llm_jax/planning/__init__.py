"""The parts of ``f2llm_jax.plan``: chips, analytic counts, and the analysis of compiled programs."""
