"""Stage 2 of 80M: all sources, with instructions, distilled from 0.6B."""

from f2llm_jax.configs.common import stage2
from f2llm_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return stage2("80M")
