"""Released model sizes and training recipes. Imported as ``f2llm_jax.configs``."""
