"""The interface that the training loop requires of a source of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from f2llm_jax.train.batch import AnyTrainBatch
from f2llm_jax.train.records import Settings


class Item(Protocol):
    """A batch, of which this process holds its share; rows after the first ``examples`` only fill it."""

    @property
    def dataset(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def batch(self) -> AnyTrainBatch: ...

    @property
    def examples(self) -> int: ...


class Loader(Protocol):
    """Batches, the same in every process except for its share."""

    @property
    def settings(self) -> Settings:
        """Those of the prepared data, from which an export takes its query prompt."""

    @property
    def steps(self) -> int:
        """The number of batches of all epochs."""

    def __iter__(self) -> Iterator[Item]:
        """The batches from the loader's position on."""

    def get_state(self) -> Any:
        """The loader's position as a JSON value; the same in every process."""

    def set_state(self, state: Any) -> None:
        """Moves to the position of a loader, which may have had another number of processes."""

    @property
    def validation_batches(self) -> int:
        """The number of batches of a validation."""

    def validation(self) -> Mapping[str, Iterable[Item]]:
        """Batches of the held-back examples of each dataset."""
