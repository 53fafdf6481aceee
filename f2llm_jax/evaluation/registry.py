"""A model's entry in the registry of the installed mteb: above all, its official instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from f2llm_jax.errors import InputError
from f2llm_jax.evaluation import optional

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

# The instructions of F2LLM-v2 are the same for all sizes; a release that is not in the registry gets this model's.
DEFAULT_INSTRUCTIONS = "codefuse-ai/F2LLM-v2-0.6B"


def registered(model: str) -> ModelMeta | None:
    """The registry entry of a model, by its hub id; does not access the hub."""
    return optional("mteb.models.model_implementations").MODEL_REGISTRY.get(model)


def states_instructions(entry: ModelMeta) -> bool:
    return "prompts_dict" in entry.loader_kwargs and "instruction_template" in entry.loader_kwargs


def instructions(model: str, instructions_of: str | None = None) -> dict[str, Any]:
    """The instructions of a model: the arguments for mteb's InstructSentenceTransformerModel in its registry entry.

    Args:
        model: a hub id or a folder.
        instructions_of: the entry to use; default: ``model``, or ``DEFAULT_INSTRUCTIONS`` if that has no entry.

    Returns:
        ``instruction_template``, ``prompts_dict`` and, if the entry has them, ``apply_instruction_to_passages``,
        ``max_seq_length``, ``prompt_priority`` and others.

    Raises:
        InputError: there is no such entry, or it has no instructions.
    """
    name = instructions_of or (model if registered(model) is not None else DEFAULT_INSTRUCTIONS)
    entry = registered(name)
    if entry is None:
        version = optional("mteb").__version__
        raise InputError(
            f"mteb {version} knows no model {name!r} (F2LLM-v2 is in mteb 2.26.24); instructions_of names another"
        )
    if not states_instructions(entry):
        raise InputError(f"mteb's entry of {name} states no instructions; instructions_of names a model that has them")
    return entry.loader_kwargs


def bitext_prompt(loader_kwargs: dict[str, Any]) -> str:
    """The prompt that mteb prepends to both sides of a BitextMining task that has no instruction of its own."""
    default = optional("mteb.abstasks").AbsTaskBitextMining.abstask_prompt
    instruction = loader_kwargs["prompts_dict"].get("BitextMining", default)
    template = loader_kwargs["instruction_template"]
    return template.format(instruction=instruction) if isinstance(template, str) else template(instruction, None)
