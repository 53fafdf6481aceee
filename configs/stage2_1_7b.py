"""Stage 2 of 1.7B: all sources, with instructions, distilled from 4B."""

from f2llm_jax.configs.common import stage2
from f2llm_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return stage2("1.7B")
