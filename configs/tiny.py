"""For the demo's tiny model: two minutes on a CPU.

``f2llm demo --folder tiny`` writes the model, and text to prepare. Then::

    f2llm prepare --raw tiny/raw --tokenizer tiny --task '*=retrieval' --out tiny-data
    f2llm train tiny --out tiny-run
"""

from f2llm_jax.train.config import DataConfig, IntervalConfig, TrainConfig
from f2llm_jax.train.optimizer import OptimizerConfig
from f2llm_jax.train.step import ComputeConfig, LossConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model="tiny",
        epochs=1,
        data=DataConfig(path="tiny-data", batch_size=32, max_length=128),
        loss=LossConfig(mrl_dims=(8, 16, 32, 64)),
        optim=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        compute=ComputeConfig(remat="none"),
        every=IntervalConfig(log=5, validation=25, checkpoint=10, keep=5),
    )
