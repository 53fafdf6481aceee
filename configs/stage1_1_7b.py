"""Stage 1 of 1.7B: contrastive training on seven retrieval sources."""

from f2llm_jax.configs.common import stage1
from f2llm_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return stage1("1.7B")
