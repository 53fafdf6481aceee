"""AdamW with the reference's schedule, built with Optax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The reference's values; the learning rate depends on the model's size (``configs/``).

    Attributes:
        learning_rate: the peak learning rate.
        min_learning_rate: the floor of the learning rate.
        warmup_steps: number of steps of linear warm-up from 0.
        b1, b2, eps, weight_decay: as in AdamW; the decay applies to all parameters.
        clip_norm: maximum global gradient norm.
    """

    learning_rate: float = 1e-5
    min_learning_rate: float = 1e-7
    warmup_steps: int = 500
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay to 0, but never below the floor once the first step is done.

    This is transformers' ``get_cosine_schedule_with_warmup`` with the floor of the reference's ``accelerate_train``,
    which applies it after each step: the very first step of a warm-up has a learning rate of 0.
    """
    warmup, total = config.warmup_steps, max(total_steps, config.warmup_steps + 1)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = step / max(warmup, 1)
        # (1 + cos(pi * progress)) / 2 cancels at the end of the decay; in terms of the remaining steps it stays exact.
        remaining = jnp.maximum(total - step, 0.0) / (total - warmup)
        fall = jnp.sin(0.5 * jnp.pi * remaining) ** 2
        rate = config.learning_rate * jnp.where(step < warmup, rise, fall)
        return jnp.where(step == 0, rate, jnp.maximum(rate, config.min_learning_rate))

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with the rates of ``make_schedule``."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
