"""Makes `zili/diagnosis/goldens`: tiny models in published layouts, and what they compute by code that is not ours.

    python tests/release/make_goldens.py [--check FOLDER]

`llama` and `deepseek` are transformers' own models, in fp32 on the CPU. TeleChat2's code is in no package: `TeleChat2`
below is written in fp64 from Tele-AI/TeleChat2 model/115B/modeling_telechat.py, and shares no line with Zili. `--check`
shows that it is the publisher's: it is compared with a golden folder of theirs (shared/golden/telechat2-ntk).

Each folder has config.json, model.safetensors (bf16; an expert's bias is fp32) and golden.safetensors:
`input_ids [B, T]`, `logits [B, T, V]`, `loss` (mean next-token cross entropy, shifted by one), `generated_ids [B, 16]`
(greedy, the whole sequence again at each step), `grad.NAME` of that loss, and `gradient_norm` over all weights. Weights
are drawn anew until no choice is a near tie (`_GAP`, `_EXPERT_GAP`), so that rounding cannot change one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OUT = Path(__file__).resolve().parents[2] / "zili" / "diagnosis" / "goldens"
_ROWS, _LENGTH, _STEPS = 2, 24, 16
_GAP, _EXPERT_GAP = 0.02, 1e-3
_SPREAD = 0.15
"""Of matrices: large enough that a model of two layers has opinions."""
_SIZES = {"vocab_size": 72, "hidden_size": 32}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

TELECHAT2 = {
    "architectures": ["TelechatForCausalLM"],
    "model_type": "telechat",
    **_SIZES,
    **_TOKENS,
    "n_layer": 2,
    "n_head": 4,
    "num_key_value_heads": 2,
    "ffn_hidden_size": 48,
    "layer_norm_epsilon": 1e-05,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
    # Shorter than the sequence, so that the rule for longer ones is at work: alpha 3, and 7 from token 33 on.
    "training_seqlen": 16,
    "base_seqlen": 16,
    "seq_length": 64,
    "torch_dtype": "bfloat16",
}
LLAMA = {**_SIZES, **_TOKENS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "rms_norm_eps": 1e-05}
LLAMA |= {"rope_theta": 10000.0, "tie_word_embeddings": False}
# In transformers the norms of low rank have 1e-6 whatever the configuration says; so the configuration says it too.
DEEPSEEK = {**_SIZES, **_TOKENS, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
DEEPSEEK |= {"routed_scaling_factor": 2.8, "max_position_embeddings": 64, "rms_norm_eps": 1e-06}
DEEPSEEK |= {"rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False}


class TeleChat2(nn.Module):
    """Logits of published TeleChat2 weights, in fp64."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.tensors = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}

    def forward(self, ids: Tensor) -> Tensor:
        """`ids [B, T]` -> `[B, T, V]`."""
        x = self.tensors["transformer.word_embeddings.weight"][ids]
        for layer in range(self.config["n_layer"]):
            name = f"transformer.h.{layer}"
            x = x + self._attention(f"{name}.self_attention", self._norm(f"{name}.input_layernorm", x))
            x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", x))
        return self._norm("transformer.ln_f", x) @ self.tensors["lm_head.weight"].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return self.tensors[f"{name}.weight"] * x / (mean_square + self.config["layer_norm_epsilon"]).sqrt()

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = (x @ self.tensors[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        down = (F.silu(gate) * up) @ self.tensors[f"{name}.down_proj.weight"].T
        return down + self.tensors[f"{name}.down_proj.bias"]

    def _attention(self, name: str, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads, groups = self.config["n_head"], self.config["num_key_value_heads"]
        size = width // heads
        query = (x @ self.tensors[f"{name}.query.weight"].T).view(batch, length, heads, size)
        mixed = (x @ self.tensors[f"{name}.key_value.weight"].T).view(batch, length, groups, 2 * size)
        key, value = mixed.split(size, dim=-1)  # rows are K_0, V_0, K_1, V_1, ...
        cos, sin = self._tables(length, size)
        query, key = (each * cos + _half_turned(each) * sin for each in (query, key))
        key, value = (each.repeat_interleave(heads // groups, dim=2) for each in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        joined = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
        return joined @ self.tensors[f"{name}.dense.weight"].T + self.tensors[f"{name}.dense.bias"]

    def _tables(self, length: int, size: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, 1, d]`, rounded to fp16 as the published code does whatever the weights are in."""
        trained, base = self.config["training_seqlen"], self.config["base_seqlen"]
        longest = max(length, trained)
        alpha = max(2 ** math.ceil(math.log2(longest / base) + 1) - 1, 1)
        stretched = 10000.0 * alpha ** (size / (size - 2))
        magnitude = 0.1 * math.log(longest / trained) + 1
        turns = 1.0 / stretched ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(length).float(), turns)
        both = torch.cat((angles, angles), -1)[:, None]
        cos, sin = (magnitude * table.half() for table in (both.cos(), both.sin()))
        return cos.double(), sin.double()


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), -1)


def telechat2_tensors(config: dict[str, Any], draw: torch.Generator) -> dict[str, Tensor]:
    """Published tensors, drawn."""
    width, ffn, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["vocab_size"]
    both = 2 * config["num_key_value_heads"] * width // config["n_head"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (vocabulary, width)}
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        shapes |= {f"{name}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}.self_attention.query.weight": (width, width)}
        shapes |= {f"{name}.self_attention.key_value.weight": (both, width)}
        shapes |= {f"{name}.self_attention.dense.weight": (width, width), f"{name}.self_attention.dense.bias": (width,)}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (ffn, width) for part in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (width, ffn), f"{name}.mlp.down_proj.bias": (width,)}
    shapes |= {"transformer.ln_f.weight": (width,), "lm_head.weight": (vocabulary, width)}
    return {name: _drawn(name, shape, draw) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """In bf16: what is published is what is computed with."""
    noise = torch.randn(shape, generator=draw) * _SPREAD
    return (noise + ("norm" in name or "ln_f" in name)).bfloat16()


def telechat2(folder: Path, draw: torch.Generator) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor], list[str]]:
    tensors = telechat2_tensors(TELECHAT2, draw)
    _write(folder, TELECHAT2, tensors)
    model = TeleChat2(TELECHAT2, tensors)
    graded = ["transformer.word_embeddings.weight", "transformer.h.1.self_attention.key_value.weight"]
    return model, model.tensors, graded


def _of_transformers(
    kind: str, fields: dict[str, Any], folder: Path, draw: torch.Generator, graded: list[str]
) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor], list[str]]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, f"{kind}Config")(**fields, use_cache=False, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
            elif "rotary" not in name:
                tensor.copy_(_drawn(name, tuple(tensor.shape), draw))
    model.save_pretrained(folder)  # under published names, whatever the module calls them
    tensors = load_file(folder / "model.safetensors")
    rounded = {n: t if n.endswith("correction_bias") else t.bfloat16() for n, t in tensors.items()}
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    published.pop("dtype")  # that of this process: what is stored is bf16
    # transformers 5 nests it; what is published has it flat, and 4 reads no other.
    flat = {key: fields[key] for key in ("rope_theta", "rope_scaling") if key in fields}
    _write(folder, {**published, **flat, "torch_dtype": "bfloat16"}, rounded)
    return lambda ids: model(ids).logits, dict(model.named_parameters()), graded


def llama(folder: Path, draw: torch.Generator) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor], list[str]]:
    graded = ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"]
    return _of_transformers("Llama", LLAMA, folder, draw, graded)


def deepseek(folder: Path, draw: torch.Generator) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor], list[str]]:
    layer = "model.layers.1"
    graded = ["model.embed_tokens.weight", f"{layer}.self_attn.kv_b_proj.weight", f"{layer}.mlp.gate.weight"]
    return _of_transformers("DeepseekV3", DEEPSEEK, folder, draw, graded)


MODELS = {"telechat2": telechat2, "llama": llama, "deepseek": deepseek}


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def continued(model: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[Tensor, float]:
    """`[B, 16]` greedy ids after `ids`, and the smallest gap between the best and the next best."""
    sequence, smallest = ids, math.inf
    for _ in range(_STEPS):
        best = model(sequence)[:, -1].topk(2)
        smallest = min(smallest, float((best.values[:, 0] - best.values[:, 1]).min()))
        sequence = torch.cat((sequence, best.indices[:, :1]), dim=1)
    return sequence[:, ids.shape[1] :], smallest


def expert_gap(folder: Path, model: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Smallest distance of a chosen expert's score from the best that was not chosen, with the bias."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "n_routed_experts" not in config:
        return math.inf
    gaps = []

    def note(module: nn.Module, inputs: Any, out: Any) -> None:
        scores = (
            inputs[0].detach().flatten(0, -2).float() @ module.weight.T
        ).sigmoid() + module.e_score_correction_bias
        ranked = scores.sort(-1, descending=True).values
        gaps.append(
            float((ranked[:, config["num_experts_per_tok"] - 1] - ranked[:, config["num_experts_per_tok"]]).min())
        )

    hooks = [
        module.register_forward_hook(note)
        for module in _modules(model)
        if type(module).__name__ == "DeepseekV3TopkRouter"
    ]
    assert hooks, "transformers has renamed its router"
    continued(model, ids)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def _modules(model: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
    (whole,) = (cell.cell_contents for cell in model.__closure__ or () if isinstance(cell.cell_contents, nn.Module))
    return whole.modules()


def make(name: str) -> None:
    for seed in range(1000):
        draw = torch.Generator().manual_seed(seed)
        folder = OUT / name
        model, weights, graded = MODELS[name](folder, draw)
        ids = torch.randint(4, _SIZES["vocab_size"], (_ROWS, _LENGTH), generator=draw)
        generated, gap = continued(model, ids)
        chosen = expert_gap(folder, model, ids)
        if gap >= _GAP and chosen >= _EXPERT_GAP:
            break
    logits = model(ids)
    loss = mean_loss(logits, ids)
    loss.backward()
    squares = [weight.grad.double().square().sum() for weight in weights.values() if weight.grad is not None]
    found = {
        "input_ids": ids,
        "logits": logits.detach().float(),
        "loss": loss.detach().float(),
        "generated_ids": generated,
        "gradient_norm": torch.stack(squares).sum().sqrt().float(),
        **{f"grad.{of}": weights[of].grad.float() for of in graded},
    }
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "golden.safetensors")
    print(f"{name}: seed {seed}, loss {float(loss):.6f}, gap of tokens {gap:.3f}, of experts {chosen:.1e}")


def check(folder: Path) -> None:
    """`TeleChat2` beside logits, loss and gradients that the publisher's own code gave."""
    expected = load_file(folder / "golden.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    model = TeleChat2(config, tensors)
    logits = model(expected["input_ids"])
    loss = mean_loss(logits, expected["input_ids"])
    loss.backward()
    apart = {
        key: float((own.detach() - expected[key]).abs().max()) for key, own in (("logits", logits), ("loss", loss))
    }
    for key, gradient in expected.items():
        if key.startswith("grad."):
            own = model.tensors[key.removeprefix("grad.")].grad
            apart[key] = float((own - gradient).abs().max() / gradient.abs().max())
    print(f"{folder.name}: " + ", ".join(f"{key} {value:.1e} apart" for key, value in apart.items()))
    assert max(apart.values()) < 1e-4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, help="compare TeleChat2 with this golden folder, and make nothing")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
    else:
        for name in MODELS:
            make(name)
