"""How fast text becomes a token store, beside plain `tokenizers` on the same text in the same run.

    python benchmarks/encode.py [--text PATH ...] [--rounds 5] [--vocab-size 8192]

The store builds are end to end: files are read, decoded, encoded, hashed, written, synced. The plain rows
only encode strings already in memory. Every round starts each contender from a fresh tokenizer, so none
profits from the cache of the round before. Rounds are interleaved; a ratio is the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import tokenizers

from zili.data import Tokenizer, build_store, prepare, read_documents, standard_library_files
from zili.data.encoding import choose_encoder
from zili.data.sources import Source

BASE = "tokenizers, one text at a time"


def contenders(files: list[Source], texts: list[str], definition: str, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    def plain() -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(definition)

    def one_by_one() -> None:
        inner = plain()
        for text in texts:
            inner.encode(text, add_special_tokens=False)

    def engine_alone() -> None:
        choose_encoder(Tokenizer(definition), texts).encode(texts)

    def store(engine: str) -> None:
        documents = read_documents(files, on_error="skip")
        build_store(documents, Tokenizer(definition), folder / engine, engine=engine)  # type: ignore[arg-type]

    return {
        BASE: one_by_one,
        "tokenizers, encode_batch": lambda: plain().encode_batch(texts, add_special_tokens=False),
        "tokenizers, encode_batch_fast": lambda: plain().encode_batch_fast(texts, add_special_tokens=False),
        "chosen engine, strings in memory": engine_alone,
        "store build, engine tokenizers": lambda: store("tokenizers"),
        "store build, engine auto": lambda: store("auto"),
    }


def measure(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round, after one round not counted of the job that is compared against."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    jobs[BASE]()
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, help="files and folders; default: the standard library")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    files: list[Source] = list(arguments.text or standard_library_files())

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        prepared = prepare(files, Path(scratch, "data"), vocab_size=arguments.vocab_size, on_error="skip")
        whole = time.perf_counter() - started
        texts = [document.text for document in read_documents(files, on_error="skip")]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        jobs = contenders(files, texts, prepared.tokenizer.definition, Path(scratch))
        seconds = measure(jobs, arguments.rounds)

    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {os.cpu_count()} cores, {arguments.rounds} rounds")
    print(choose_encoder(prepared.tokenizer, texts))
    print(f"{'':36}{'MB/s':>8}{'x one by one':>14}{'x encode_batch':>16}")
    for name, times in seconds.items():
        ratios = [
            median(base / own for base, own in zip(seconds[other], times, strict=True))
            for other in (BASE, "tokenizers, encode_batch")
        ]
        print(f"{name:36}{megabytes / median(times):8.1f}{ratios[0]:14.2f}{ratios[1]:16.2f}")
    print(f"prepare (tokenizer trained, both stores built): {whole:.1f} s, {megabytes / whole:.1f} MB/s")


if __name__ == "__main__":
    main()
