"""What the recipes of F2LLM-v2 have in common (paper arXiv:2603.19223, Table 1 and Section 3)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from f2llm_jax.configs.models import MODELS
from f2llm_jax.train.config import DataConfig, MeshConfig, TrainConfig
from f2llm_jax.train.optimizer import OptimizerConfig
from f2llm_jax.train.step import LossConfig

QUERY_PROMPT = "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "


class Size(NamedTuple):
    """How the recipe of a size differs from the others.

    Attributes:
        learning_rate: the peak learning rate.
        epochs: passes over the data.
        base: the model that stage 1 starts from; None for a size that is pruned from a larger one after stage 1.
        start: the model that stage 2 starts from.
        teacher: the size that stage 2 distils from; None for no distillation.
    """

    learning_rate: float
    epochs: int
    base: str | None
    start: str
    teacher: str | None


HUB = "codefuse-ai/F2LLM-v2-"

SIZES = {
    "80M": Size(4e-5, 4, None, f"{HUB}0.6B-Preview-Pruned-80M", "0.6B"),
    "160M": Size(3e-5, 3, None, f"{HUB}0.6B-Preview-Pruned-160M", "0.6B"),
    "330M": Size(2e-5, 3, None, f"{HUB}0.6B-Preview-Pruned-330M", "0.6B"),
    "0.6B": Size(1e-5, 2, "Qwen/Qwen3-0.6B", f"{HUB}0.6B-Preview", "1.7B"),
    "1.7B": Size(9e-6, 2, "Qwen/Qwen3-1.7B", f"{HUB}1.7B-Preview", "4B"),
    "4B": Size(7e-6, 2, "Qwen/Qwen3-4B", f"{HUB}4B-Preview", None),
    "8B": Size(6e-6, 2, "Qwen/Qwen3-8B", f"{HUB}8B-Preview", None),
    "14B": Size(5e-6, 2, "Qwen/Qwen3-14B", f"{HUB}14B-Preview", None),
}


def stage1(size: str) -> TrainConfig:
    """Seven retrieval sources without instructions, starting from a Qwen3 language model; for 0.6B and larger.

    An exported model has the prompts of the model it started from: for a Qwen3 language model, none.
    """
    base = SIZES[size].base
    assert base is not None, size
    return _config(size, model=base, teacher=None, data="data/stage1")


def stage2(size: str) -> TrainConfig:
    """At most 80,000 queries of every source, with instructions; the small sizes are distilled."""
    teacher = SIZES[size].teacher
    config = _config(size, model=SIZES[size].start, teacher=teacher and HUB + teacher, data="data/stage2")
    return dataclasses.replace(config, query_prompt=QUERY_PROMPT)


def _config(size: str, *, model: str, teacher: str | None, data: str) -> TrainConfig:
    return TrainConfig(
        model=model,
        teacher=teacher,
        epochs=SIZES[size].epochs,
        data=DataConfig(path=data),
        loss=LossConfig(mrl_dims=MODELS[size].matryoshka_dims[:-1]),
        optim=OptimizerConfig(learning_rate=SIZES[size].learning_rate),
        # The training state of a small size is replicated on every device; that of the others is sharded over all.
        mesh=MeshConfig(data=0) if SIZES[size].base is None else MeshConfig(data=1, fsdp=0),
    )
