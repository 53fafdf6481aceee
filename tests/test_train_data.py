"""Batches of prepared data: every example once, the same on every process, from any step on."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from raw_data import rows, write_raw

from f2llm_jax.errors import InputError
from f2llm_jax.sharding import make_mesh
from f2llm_jax.train.data import (
    DataLoader,
    Share,
    TrainBatches,
    TrainingData,
    ValidationBatches,
    draw_datasets,
    row_lengths,
)
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.records import data_digest
from f2llm_jax.train.validation import validate

ROWS = {"aya": 400, "banking77": 90, "imdb": 30, "mqa_de": 200}
BATCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_release) -> Path:
    """Datasets of three task types, whose queries are all different."""
    home = tmp_path_factory.mktemp("data")
    data = {
        name: rows(count, negatives=1 if name == "imdb" else 24, seed=seed, words=40)
        for seed, (name, count) in enumerate(ROWS.items())
    }
    write_raw(home / "raw", data)
    prepare(home / "raw", tiny_release, home / "out", workers=1)
    return home / "out"


@pytest.fixture(scope="module")
def data(folder) -> TrainingData:
    return TrainingData(folder)


def source(folder: Path, kind: str, split: str = "train"):
    return tfds.builder_from_directory(folder / kind / "1.0.0").as_data_source(split)


def texts(rows_) -> list[tuple[int, ...]]:
    """The rows of a Batch without their padding."""
    return [tuple(row[:length].tolist()) for row, length in zip(rows_.tokens_bt, rows_.lengths_b, strict=True)]


def assert_same(one, other) -> None:
    assert (one.dataset, one.task, one.epoch, one.examples) == (other.dataset, other.task, other.epoch, other.examples)
    for a, b in zip(leaves(one.batch), leaves(other.batch), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def leaves(batch) -> list[np.ndarray]:
    parts = [part for part in (batch.query, batch.passage, batch.negatives) if part is not None]
    return [*itertools.chain.from_iterable(parts), batch.passage_ids_b]


def test_an_epoch_takes_every_example_once(folder, data):
    batches = TrainBatches(data, batch_size=BATCH, epochs=2)
    train = {name: count - -(-count // 100) for name, count in ROWS.items()}
    per_dataset = {name: -(-count // BATCH) for name, count in train.items()}
    assert batches.steps_per_epoch == sum(per_dataset.values()) == len(batches) // 2
    stored = Counter(tuple(record["query"].tolist()) for record in source(folder, "examples"))
    orders = []
    for epoch in (0, 1):
        items = [batches[epoch * batches.steps_per_epoch + step] for step in range(batches.steps_per_epoch)]
        assert {item.epoch for item in items} == {epoch}
        assert Counter(item.dataset for item in items) == per_dataset
        taken: dict[str, list] = {name: [] for name in ROWS}
        for item in items:
            queries = texts(item.batch.query)
            assert len(queries) == BATCH
            # The last batch of a dataset is filled up from the beginning of its order.
            assert queries[item.examples :] == taken[item.dataset][: BATCH - item.examples]
            taken[item.dataset] += queries[: item.examples]
        assert Counter(itertools.chain.from_iterable(taken.values())) == stored
        assert {name: len(queries) for name, queries in taken.items()} == train
        orders.append(taken)
    assert all(orders[0][name] != orders[1][name] for name in ROWS)


def test_batches_hold_the_documents_of_their_examples(folder, data):
    documents = source(folder, "documents")
    by_query = {tuple(record["query"].tolist()): record for record in source(folder, "examples")}
    batches = TrainBatches(data, batch_size=BATCH)
    positions = set()
    for step in range(len(batches)):
        item = batches[step]
        examples = [by_query[query] for query in texts(item.batch.query)]
        assert {example["dataset"].decode() for example in examples} == {item.dataset}
        passages = [int(example["passage"]) for example in examples]
        assert item.batch.passage_ids_b.tolist() == passages and item.batch.passage_ids_b.dtype == np.int32
        assert texts(item.batch.passage) == [tuple(documents[number]["tokens"].tolist()) for number in passages]
        negatives = texts(item.batch.negatives)
        count = {"retrieval": 7, "clustering": 9, "classification": 1}[item.task]
        assert len(negatives) == BATCH * count
        drawn = set()
        for row, example in enumerate(examples):
            own = [tuple(documents[int(number)]["tokens"].tolist()) for number in example["negatives"]]
            assert len(set(own)) == len(own)
            drawn.add(tuple(own.index(text) for text in negatives[row * count : (row + 1) * count]))
        assert len(drawn) == 1  # one set of positions for the whole batch
        assert len(set(*drawn)) == count
        positions |= drawn
    assert len({position for drawn in positions for position in drawn}) == 24
    assert len(positions) > 20


def test_shapes_are_the_least_of_few(data):
    queries, documents = row_lengths(1024, steps=1), row_lengths(1024, steps=2)
    assert [*queries] == [32, 64, 128, 256, 512, 1024]
    assert [*documents] == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert [*row_lengths(100, steps=2)] == [32, 48, 64, 96, 100] and [*row_lengths(20, steps=2)] == [20]
    batches = TrainBatches(data, batch_size=2)
    seen = set()
    for step in range(40):
        batch = batches[step].batch
        longest = max(batch.passage.lengths_b.max(), batch.negatives.lengths_b.max())
        assert batch.query.tokens_bt.shape[1] == next(n for n in queries if n >= batch.query.lengths_b.max())
        assert batch.passage.tokens_bt.shape[1] == batch.negatives.tokens_bt.shape[1]
        assert batch.passage.tokens_bt.shape[1] == next(n for n in documents if n >= longest)
        assert all(array.dtype == np.int32 for array in leaves(batch))
        seen.add(batch.passage.tokens_bt.shape[1])
    assert len(seen) > 1


def test_truncation_ends_with_the_eos(folder, data):
    short = TrainBatches(TrainingData(folder, max_length=20), batch_size=BATCH)
    whole = TrainBatches(data, batch_size=BATCH)
    eos_id = data.settings.eos_id
    cut = 0
    for step in range(6):
        for a, b in zip(short[step].batch[:3], whole[step].batch[:3], strict=True):
            assert a.tokens_bt.shape[1] <= 20
            for one, other in zip(texts(a), texts(b), strict=True):
                assert one == (other if len(other) <= 20 else (*other[:19], eos_id))
                cut += len(other) > 20
    assert cut > 100


def test_more_tokens_than_the_data_has_are_a_warning(folder, data):
    most = data.settings.max_length
    with pytest.warns(UserWarning, match=rf"max_length={most + 1}, but .* cut to {most} tokens") as said:
        longer = pickle.loads(pickle.dumps(TrainingData(folder, max_length=most + 1)))
    assert len(said) == 1 and longer.max_length == most


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_make_up_the_global_batch(data, processes):
    whole = TrainBatches(data, batch_size=BATCH, seed=3)
    parts = [TrainBatches(data, batch_size=BATCH, seed=3, share=Share(n, processes)) for n in range(processes)]
    for step in range(0, len(whole), 5):
        arrays = zip(*(leaves(part[step].batch) for part in parts), strict=True)
        for shares, full in zip(arrays, leaves(whole[step].batch), strict=True):
            np.testing.assert_array_equal(np.concatenate(shares), full)


def test_a_loader_goes_on_at_the_very_next_batch_also_with_more_processes(data):
    def loader(share: Share | None = None) -> DataLoader:
        return DataLoader(TrainBatches(data, batch_size=BATCH, epochs=2, seed=5, share=share))

    first = loader()
    items = list(itertools.islice(first, 4))
    state = first.get_state()
    assert state == {"step": 4, "data": data_digest(data.folder)}
    following = list(itertools.islice(first, 3))
    first.set_state(state)
    for item, again in zip(following, first, strict=False):
        assert_same(item, again)
    resumed = loader()
    resumed.set_state(state)
    for item in following:
        assert_same(next(resumed), item)
    shares = [loader(Share(n, 2)) for n in (0, 1)]
    for share in shares:
        share.set_state(state)
    for item in following:
        halves = [next(share) for share in shares]
        assert {half.dataset for half in halves} == {item.dataset}
        for *parts, full in zip(*(leaves(half.batch) for half in halves), leaves(item.batch), strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), full)
    assert_same(next(iter(loader())), items[0])


def test_a_loader_ends_after_its_epochs(data):
    batches = TrainBatches(data, batch_size=BATCH, epochs=2)
    loader = DataLoader(batches)
    assert loader.steps == len(batches) == 2 * batches.steps_per_epoch
    loader.set_state({**loader.get_state(), "step": loader.steps - 2})
    assert [item.epoch for item in loader] == [1, 1]
    assert loader.get_state()["step"] == loader.steps and list(loader) == []
    with pytest.raises(InputError, match="there is no step"):
        loader.set_state({**loader.get_state(), "step": loader.steps + 1})


class Drawn(TrainingData):
    """Gives the numbers of a batch's examples, and the positions of their negatives."""

    def batch(self, dataset, split, examples, negatives, share):
        return examples.tolist(), negatives.tolist()


def test_every_epoch_of_every_seed_is_drawn_anew(folder):
    datasets, examples, positions = [], [], []
    for seed in (0, 1):
        batches = TrainBatches(Drawn(folder), batch_size=BATCH, epochs=2, seed=seed)
        for epoch in (0, 1):
            first = epoch * batches.steps_per_epoch
            items = [batches[step] for step in range(first, first + batches.steps_per_epoch)]
            datasets.append([item.dataset for item in items])
            examples.append({name: [i.batch[0] for i in items if i.dataset == name] for name in ROWS})
            positions.append({tuple(item.batch[1][:7]) for item in items if item.dataset != "imdb"})
    for one, other in itertools.combinations(range(4), 2):
        assert datasets[one] != datasets[other]
        assert all(examples[one][name] != examples[other][name] for name in ROWS)
        assert not positions[one] & positions[other]


def test_datasets_are_drawn_in_proportion():
    counts = [600, 300, 90, 10]
    first = np.zeros(4)
    for seed in range(60):
        drawn, number = draw_datasets(counts, np.random.default_rng(seed))
        for dataset, count in enumerate(counts):
            assert number[drawn == dataset].tolist() == list(range(count))
        first += np.bincount(drawn[:100], minlength=4)
    # 6,000 draws: four standard deviations of a share p are 4 sqrt(p (1 - p) / 6000).
    shares = np.array(counts) / sum(counts)
    assert (np.abs(first / 6000 - shares) < 4 * np.sqrt(shares * (1 - shares) / 6000)).all()


def test_validation_goes_through_each_dataset(folder, data):
    loader = DataLoader(TrainBatches(data, batch_size=BATCH), multiple=2)
    stored = Counter(tuple(record["query"].tolist()) for record in source(folder, "examples", "validation"))
    passes = loader.validation()
    assert list(passes) == list(ROWS)
    taken: Counter = Counter()
    for name, items in passes.items():
        for item in items:
            assert item.dataset == name and item.batch.query.tokens_bt.shape[0] % 2 == 0
            queries = texts(item.batch.query)
            assert set(queries[item.examples :]) <= set(queries[: item.examples])
            taken.update(queries[: item.examples])
    assert taken == stored
    again = loader.validation()
    for one, other in zip(passes["aya"], again["aya"], strict=True):
        assert_same(one, other)


def test_validation_batches_are_shared_and_few_shapes(data):
    whole = ValidationBatches(data, "aya", batch_size=2)
    assert len(whole) == 2
    halves = [ValidationBatches(data, "aya", batch_size=4, share=Share(n, 2)) for n in (0, 1)]
    joined = [np.concatenate(parts) for parts in zip(*(leaves(half[0].batch) for half in halves), strict=True)]
    full = leaves(ValidationBatches(data, "aya", batch_size=4)[0].batch)
    for one, other in zip(joined, full, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(ValidationBatches(data, "aya", batch_size=64, multiple=8)[0].batch.query.lengths_b) == 8
    with pytest.raises(InputError, match="no dataset 'nothing'"):
        ValidationBatches(data, "nothing", batch_size=4)


def test_validation_is_over_the_examples_on_any_mesh(data):
    def evaluate(params, batch, example_mask_b, *, in_batch):
        return {"length": np.mean(np.asarray(batch.query.lengths_b)[np.asarray(example_mask_b)])}

    scores = []
    for devices, batch_size in ((1, 3), (8, 8)):
        mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
        loader = DataLoader(TrainBatches(data, batch_size=batch_size), multiple=devices)
        scores.append(validate({}, loader, evaluate, mesh))
        asked = [validate({}, loader, evaluate, mesh, stop=iter([False] * n + [True]).__next__) for n in range(3)]
        assert asked == [None] * 3 and loader.validation_batches == sum(
            len(list(items)) for items in loader.validation().values()
        )
    assert scores[0] == pytest.approx(scores[1]) and len(scores[0]) == len(ROWS) + 3
    stored = [len(r["query"]) for r in source(data.folder, "examples", "validation") if r["dataset"] == b"aya"]
    assert scores[0]["aya/valid_length"] == pytest.approx(np.mean(stored)) and len(set(stored)) > 1


READ_IN_PROCESSES = """
import multiprocessing, os, signal, sys, time
import numpy as np
from f2llm_jax.train.data import DataLoader, TrainBatches, TrainingData

if __name__ == "__main__":
    batches = TrainBatches(TrainingData(sys.argv[1]), batch_size=16)
    loader = DataLoader(batches, workers=1)
    loader.set_state({**loader.get_state(), "step": 3})
    for step in range(3, 12):
        item, expected = next(loader), batches[step]
        for reader in multiprocessing.active_children():
            os.kill(reader.pid, signal.SIGTERM)
        assert item.dataset == expected.dataset
        for part, other in zip(item.batch[:3], expected.batch[:3], strict=True):
            np.testing.assert_array_equal(part.tokens_bt, other.tokens_bt)
    assert loader.get_state()["step"] == 12
    time.sleep(1)  # it has read ahead as far as it may
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 10
"""


def test_a_loader_reads_in_processes_too(folder, tmp_path):
    """And goes on when all processes get a SIGTERM, as a job does that is to stop.

    In a process of its own: pickling looks into every imported module, and transformers' then import many more.
    """
    script = tmp_path / "script.py"
    script.write_text(READ_IN_PROCESSES)
    subprocess.run([sys.executable, script, folder], check=True, timeout=120)


def test_data_travels_to_another_process(data):
    copy = pickle.loads(pickle.dumps(TrainBatches(data, batch_size=BATCH)))
    assert_same(copy[2], TrainBatches(data, batch_size=BATCH)[2])


def test_a_dataset_without_negatives(tmp_path, tiny_release, data):
    write_raw(tmp_path / "raw", {"xquad_en": rows(20, negatives=0)})
    prepare(tmp_path / "raw", tiny_release, tmp_path / "out", workers=1)
    batches = TrainBatches(TrainingData(tmp_path / "out"), batch_size=4)
    assert batches[0].batch.negatives is None and batches[0].batch.passage.tokens_bt.shape[0] == 4
    # And a run does not go on with it that began with other data.
    with pytest.raises(InputError, match="out holds other data than the run began with: set "):
        DataLoader(batches).set_state(DataLoader(TrainBatches(data, batch_size=4)).get_state())


def test_wrong_arguments_are_errors(data, tmp_path):
    with pytest.raises(InputError, match="batch of 10 cannot be shared by 4 processes"):
        TrainBatches(data, batch_size=10, share=Share(0, 4))
    with pytest.raises(InputError, match="f2llm prepare"):
        TrainingData(tmp_path)
    (tmp_path / "prepared.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        TrainingData(tmp_path)
    for number in (1, 99):
        (tmp_path / "prepared.json").write_text(json.dumps({"format": number}))
        with pytest.raises(InputError, match=f"has format {number}, .*; prepare the data again"):
            TrainingData(tmp_path)
