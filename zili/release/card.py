"""The model card of a release, README.md, in Chinese and English: only what its record says."""

from __future__ import annotations

import json
from typing import Any

from zili.models.arithmetic import count_parameters
from zili.release.record import Evaluation, Release

_HUB_NAMES = {"telechat2": "transformers", "gguf": "gguf"}


def card(release: Release, name: str, license_name: str) -> str:
    """Markdown with the front matter that model hubs read."""
    parts = [
        _front_matter(release, name, license_name),
        f"# {name}",
        _opening(release),
        "## 模型 Model\n\n" + _table(("", ""), _shape(release)),
        "## 来源 Provenance\n\n" + _table(("", ""), _origin(release)),
        _evaluations(release.evaluations),
        _notes(release),
        "## 使用 Use\n\n" + _use(release, name),
        _check(name),
        _LIMITS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_LIMITS = """## 局限 Limits

模型只学习了其训练文本,可能给出错误、过时或有害的内容;除上表所列之外未做任何安全或能力评测。使用者须自行评估。

The model has learned from its training text and may say what is false, out of date or harmful. Beyond the table above
nothing was evaluated, safety included: whoever uses it must."""


def _front_matter(release: Release, name: str, license_name: str) -> str:
    lines = [
        "---",
        "language:\n- zh\n- en",
        f"license: {json.dumps(license_name)}",
        f"library_name: {_HUB_NAMES.get(release.layout, 'transformers')}",
        "pipeline_tag: text-generation",
        f"tags:\n- zili\n- {release.layout}",
    ]
    if release.evaluations:
        lines.append("model-index:\n- name: " + json.dumps(name) + "\n  results:")
        lines += [_index_entry(one) for one in release.evaluations]
    return "\n".join([*lines, "---"])


def _index_entry(one: Evaluation) -> str:
    task, metric = json.dumps(one.task, ensure_ascii=False), json.dumps(one.metric)
    return (
        f"  - task:\n      type: text-generation\n    dataset:\n      name: {task}\n      type: {task}\n"
        f"    metrics:\n    - type: {metric}\n      value: {one.value:.6g}"
    )


def _opening(release: Release) -> str:
    count = count_parameters(release.model).total
    return (
        f"由 Zili 导出的 {count / 1e6:,.1f} M 参数语言模型,{release.layout} 格式,权重为 {release.dtype}。\n\n"
        f"A language model of {count / 1e6:,.1f} M parameters in the {release.layout} layout, weights in "
        f"{release.dtype}, exported by Zili."
    )


def _shape(release: Release) -> list[tuple[str, str]]:
    model = release.model
    rows = [
        ("参数 parameters", f"{count_parameters(model).total:,}"),
        ("层 layers", f"{model.layers}"),
        ("隐藏维度 hidden size", f"{model.hidden_size:,}"),
        ("注意力头 heads, key/value heads", f"{model.heads}, {model.kv_heads}"),
        ("前馈维度 feed-forward size", f"{model.ffn_hidden_size:,}"),
        ("词表 vocabulary", f"{model.vocab_size:,}"),
        ("上下文 context, tokens", f"{model.max_length:,}"),
        ("旋转位置 rotary", f"{model.rotary.rule}, base {model.rotary.base:.10g}"),
    ]
    if model.mixture:
        rows.append(("专家 experts, of which a token takes", f"{model.mixture.experts}, {model.mixture.top_k}"))
    return rows


def _origin(release: Release) -> list[tuple[str, str]]:
    known = dict(release.provenance)
    if known.get("kind") != "run":
        return [(key, _said(value)) for key, value in known.items()]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    training, chip = known["recipe"]["training"], known["chip"]
    rows = [
        ("训练 run", f"{known['name']}, step {known['step']:,}"),
        ("训练词元 tokens seen", f"{known['tokens']:,}"),
        ("数据指纹 data fingerprint", f"`{known['data_fingerprint'][:16]}`"),
        ("批 batch", f"{training.get('global_batch')} x {training.get('sequence_length')} tokens"),
        ("优化器 optimizer", _said(known["recipe"].get("optimizer", {}).get("name"))),
        ("芯片 chip", f"{chip.get('name')}, {chip.get('precision')}"),
        ("版本 versions", versions),
    ]
    if known.get("started_from"):
        rows.append(("起点 started from", _said(known["started_from"])))
    return rows


def _evaluations(rows: tuple[Evaluation, ...]) -> str:
    head = "## 评测 Evaluation\n\n"
    if not rows:
        return head + "未附评测。None was given.\n\n"
    table = _table(
        ("任务 task", "指标 metric", "值 value", "n", "few-shot"),
        [
            (
                one.task + (" *" if one.generated else ""),
                one.metric,
                f"{one.value:.4f}" + ("" if one.error is None else f" ± {one.error:.4f}"),
                _said(one.samples),
                _said(one.few_shot),
            )
            for one in rows
        ],
    )
    commands = sorted({one.command for one in rows if one.command})
    made = "".join(f"\n\n    {command}" for command in commands)
    star = "\n\n\\* 自动生成的题目,不是公开基准。Generated questions, not a published benchmark."
    return head + table + (star if any(one.generated for one in rows) else "") + made


def _notes(release: Release) -> str:
    said = "".join(f"\n- {note}" for note in release.notes)
    return (
        "## 与来源的差别 Against its source\n\n"
        f"对数概率与来源最多相差 Log-probabilities differ from the source's by at most "
        f"{release.difference:.2g} nats (fp32, CPU)." + (f"\n{said}" if said else "")
    )


def _use(release: Release, name: str) -> str:
    if release.layout == "gguf":
        return f'    llama-cli -m {name}/model.gguf -p "..."\n    zili chat {name}'
    trust = ", trust_remote_code=True" if release.layout in ("telechat2", "telechat3") else ""
    flag = " --trust-remote-code" if trust else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        'ids = tokenizer("自立", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))\n```\n\n"
        f"    vllm serve {name}{flag}        # vllm-ascend: 同一命令 the same command\n    zili chat {name}"
    )


def _check(name: str) -> str:
    return f"## 校验 Check\n\n    sha256sum -c SHA256SUMS\n    zili verify {name}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(
        [*lines, *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)]
    )


def _said(value: Any) -> str:
    if value is None:
        return "-"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
