"""The loader against a slow and obvious second one that shares only `permutation` and `Mixture` with it."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from zili.data import Document, Tokenizer, TokenStore, build_store
from zili.data.loader import Batch, Loader
from zili.data.order import DOCUMENTS, WINDOWS, Mixture, permutation
from zili.errors import DataError

S, B, SEED = 24, 6, 11


@pytest.fixture
def loader(stores: list[TokenStore]) -> Loader:
    return Loader([(stores[0], 1.0), (stores[1], 3.0)], sequence_length=S, global_batch=B, seed=SEED)


def slow_row(stores: list[TokenStore], weights: list[float], sample: int) -> tuple[list, list, list]:
    """One row by walking lists: the epoch's whole line of (token, document) pairs is laid out."""
    source, position = (int(x[0]) for x in Mixture(weights, SEED).locate(np.array([sample])))
    store = stores[source]
    count = (sum(map(len, store.iter_documents())) - 1) // S
    epoch, number = divmod(position, count)
    line = []
    for document in permutation(len(store), SEED, DOCUMENTS, source, epoch):
        line += [(int(token), int(document)) for token in store.document(document)]
    start = int(permutation(count, SEED, WINDOWS, source, epoch)[number]) * S
    window = line[start : start + S + 1]
    inputs = [token for token, _ in window[:-1]]
    labels = [token for token, _ in window[1:]]
    order = list(dict.fromkeys(document for _, document in window[1:]))
    return inputs, labels, [order.index(document) for _, document in window[1:]]


@pytest.mark.parametrize("step", [0, 1, 37, 400])
def test_equals_the_slow_loader(loader: Loader, stores: list[TokenStore], step: int) -> None:
    batch = loader.batch(step)
    for row in range(B):
        inputs, labels, documents = slow_row(stores, [1.0, 3.0], step * B + row)
        assert batch.input_ids[row].tolist() == inputs
        assert batch.labels[row].tolist() == labels
        assert batch.document_ids[row].tolist() == documents


def test_shapes_and_types(loader: Loader) -> None:
    batch = loader.batch(0)
    assert all(part.shape == (B, S) and part.is_contiguous() for part in batch[:3])
    assert batch.reference is None
    assert [part.dtype for part in batch[:3]] == [torch.int64, torch.int64, torch.int32]
    assert (batch.document_ids[:, 0] == 0).all()


def test_an_end_token_opens_the_next_document_and_every_token_is_a_target(loader: Loader, tokenizer: Tokenizer) -> None:
    for step in range(30):
        batch = loader.batch(step)
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        opens = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
        assert torch.equal(opens, batch.input_ids[:, 1:] == tokenizer.end_id)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_a_batch_depends_on_seed_and_step_alone(loader: Loader, stores: list[TokenStore]) -> None:
    """Whatever was read before, and by whichever object: so a run resumes at any step."""
    steps = [*range(40), 5000, 12]
    first = {step: loader.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    for step in steps:
        sources = [(TokenStore.open(store.prefix), weight) for store, weight in loader.sources]
        fresh = Loader(sources, sequence_length=S, global_batch=B, seed=SEED)
        assert equal(fresh.batch(step), first[step])
    other = Loader(loader.sources, sequence_length=S, global_batch=B, seed=SEED + 1)
    assert not equal(other.batch(0), first[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_together_read_the_whole_batch(loader: Loader, ranks: int) -> None:
    share = B // ranks
    parts = [loader.batch(9, slice(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    joined = Batch(*(torch.cat(tensors) for tensors in zip(*(part[:3] for part in parts), strict=True)))
    assert equal(joined, loader.batch(9))
    strided = [loader.batch(9, slice(rank, None, ranks)) for rank in range(ranks)]
    assert torch.equal(torch.stack([part.input_ids for part in strided], 1).flatten(0, 1), loader.batch(9)[0])


def test_the_position_is_a_number_of_samples(loader: Loader) -> None:
    """Another global batch reads the same samples."""
    wide = Loader(loader.sources, sequence_length=S, global_batch=3 * B, seed=SEED)
    rows = [loader.batch(step).input_ids for step in range(6, 9)]
    assert torch.equal(torch.cat(rows), wide.batch(2).input_ids)
    assert wide.fingerprint() == loader.fingerprint()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_predicts_every_token_once(stores: list[TokenStore], tokenizer: Tokenizer, epoch: int) -> None:
    store = stores[0]
    loader = Loader([(store, 1.0)], sequence_length=S, global_batch=1, seed=3)
    count = (store.manifest.tokens - 1) // S
    first = epoch * count
    batch = loader.samples(np.arange(first, first + count))
    shown = torch.bincount(batch.input_ids.flatten(), minlength=tokenizer.vocab_size)
    stored = torch.bincount(torch.from_numpy(store.tokens.astype(np.int64)), minlength=tokenizer.vocab_size)
    assert (shown <= stored).all() and (stored - shown).sum() == store.manifest.tokens - count * S <= S + 1
    assert loader.epochs(count) == [1.0]


def test_windows_of_an_epoch_differ_and_epochs_differ(stores: list[TokenStore]) -> None:
    loader = Loader([(stores[1], 1.0)], sequence_length=S, global_batch=4, seed=3)
    count = (stores[1].manifest.tokens - 1) // S
    rows = loader.samples(np.arange(2 * count)).input_ids
    assert len({tuple(row.tolist()) for row in rows[:count]}) == count
    assert not torch.equal(rows[:count], rows[count:])


def test_rows_longer_than_any_document(stores: list[TokenStore]) -> None:
    store = stores[0]
    loader = Loader([(store, 1.0)], sequence_length=store.manifest.tokens - 1, global_batch=1, seed=0)
    batch = loader.batch(5)
    assert batch.document_ids.max() == len(store) - 1
    with pytest.raises(DataError, match=rf"fill no row of {store.manifest.tokens} \+ 1.*shorter sequence"):
        Loader([(store, 1.0)], sequence_length=store.manifest.tokens, global_batch=1, seed=0)


def test_epochs_of_a_mixture(loader: Loader, stores: list[TokenStore]) -> None:
    windows = [(store.manifest.tokens - 1) // S for store in stores]
    assert loader.epochs(100) == pytest.approx([150 / windows[0], 450 / windows[1]])


def test_fingerprint_tells_data_apart(
    loader: Loader, stores: list[TokenStore], tokenizer: Tokenizer, tmp_path: Path, make_texts: Callable
) -> None:
    texts = make_texts(120, seed=99, longest=12)
    build_store([Document(text, "") for text in texts], tokenizer, tmp_path / "changed")
    changed = TokenStore.open(tmp_path / "changed")
    short, long = stores

    def of(sources: list, length: int = S, seed: int = SEED) -> str:
        return Loader(sources, sequence_length=length, global_batch=B, seed=seed).fingerprint()

    same = of([(short, 1.0), (long, 3.0)])
    assert same == loader.fingerprint() == of([(short, 2), (long, 6)])
    others = [
        of([(short, 1.0), (long, 2.0)]),
        of([(long, 3.0), (short, 1.0)]),
        of([(changed, 1.0), (long, 3.0)]),
        of([(short, 1.0), (long, 3.0)], length=S + 1),
        of([(short, 1.0), (long, 3.0)], seed=0),
    ]
    assert len({same, *others}) == 6


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weights(stores: list[TokenStore], weight: float) -> None:
    with pytest.raises(DataError, match="positive numbers"):
        Loader([(stores[0], weight)], sequence_length=S, global_batch=B, seed=0)


def test_bad_sizes(stores: list[TokenStore]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        Loader([(stores[0], 1.0)], sequence_length=0, global_batch=B, seed=0)
    with pytest.raises(DataError, match="positive numbers"):
        Loader([], sequence_length=S, global_batch=B, seed=0)
