"""Stage 2 of 14B: all sources, with instructions."""

from f2llm_jax.configs.common import stage2
from f2llm_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return stage2("14B")
