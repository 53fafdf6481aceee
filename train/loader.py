"""What the training loop needs of a source of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from f2llm_jax.train.batch import AnyTrainBatch


class Item(Protocol):
    """A batch, of which this process has its share; whatever follows its first ``examples`` is there to fill it."""

    @property
    def dataset(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def batch(self) -> AnyTrainBatch: ...

    @property
    def examples(self) -> int: ...


class Loader(Protocol):
    """Batches, the same in every process but for the share."""

    @property
    def steps(self) -> int:
        """Batches of all epochs."""

    def __iter__(self) -> Iterator[Item]:
        """The batches from where the loader stands."""

    def get_state(self) -> Any:
        """Where the loader stands, as JSON can hold it; the same in every process."""

    def set_state(self, state: Any) -> None:
        """Goes to where a loader stood, of however many processes."""

    @property
    def validation_batches(self) -> int:
        """Batches of a validation."""

    def validation(self) -> Mapping[str, Iterable[Item]]:
        """Batches of the held-back examples of every dataset."""
