"""What the release tests read: the golden folders, and shapes and configurations of tiny published ones."""

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

import zili

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
OWN = Path(zili.__file__).parent / "diagnosis" / "goldens"
"""Made by make_goldens.py, and here in every clone."""
DENSE = ["telechat1-7b", "telechat2-gqa", "telechat2-mha", "telechat2-ntk", "telechat3-36b", "telechat2", "llama"]


def golden_folder(name):
    folder = OWN / name if (OWN / name).is_dir() else GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: golden files are kept outside the repository")
    return folder


def random_tensors(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.3 + ("norm" in name or "ln_" in name)).to(dtype)
        for name, shape in shapes.items()
    }


TELECHAT52 = {
    "activation_function": "silu",
    "add_bias_linear": False,
    "attn_pdrop": 0.0,
    "initializer_range": 0.02,
    "input_mult": 2.0,
    "layer_norm_epsilon": 1e-05,
    "model_type": "telechat",
    "mup_base_width": 256,
    "mup_scale_factor": 8.0,
    "n_embd": 32,
    "n_head": 4,
    "n_inner": 40,
    "n_layer": 2,
    "n_positions": 4096,
    "output_mult": 2.0,
    "relative_encoding": "rotary",
    "resid_pdrop": 0.0,
    "rotary_theta": 10000,
    "rotary_use_xpos": False,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": True,
    "summary_type": "cls_index",
    "tie_word_embeddings": False,
    "use_RMSNorm": True,
    "use_mup": True,
    "vocab_size": 72,
}


def telechat52_shapes():
    shapes = {"transformer.wte.weight": (72, 32)}
    for i in range(2):
        h = f"transformer.h.{i}"
        shapes |= {
            f"{h}.ln_1.weight": (32,),
            f"{h}.attn.c_attn.weight": (32, 96),
            f"{h}.attn.c_proj.weight": (32, 32),
            f"{h}.ln_2.weight": (32,),
            f"{h}.mlp.c_fc.weight": (32, 80),
            f"{h}.mlp.c_proj.weight": (40, 32),
        }
    return shapes | {"transformer.ln_f.weight": (32,), "lm_head.weight": (72, 32)}


TELE_FLM = {
    "architectures": ["TeleFLMForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 32,
    "input_mult": 1.0,
    "intermediate_size": 40,
    "max_position_embeddings": 4096,
    "model_type": "TeleFLM",
    "mup_scale_factor": 16.0,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "output_mult": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_mup": True,
    "vocab_size": 72,
}


def llama_shapes():
    shapes = {"model.embed_tokens.weight": (72, 32)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (32, 32) for part in "qkvo"}
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (40, 32),
            f"{layer}.mlp.up_proj.weight": (40, 32),
            f"{layer}.mlp.down_proj.weight": (32, 40),
            f"{layer}.input_layernorm.weight": (32,),
            f"{layer}.post_attention_layernorm.weight": (32,),
        }
    return shapes | {"model.norm.weight": (32,), "lm_head.weight": (72, 32)}


def telechat2_shapes():
    shapes = {"transformer.word_embeddings.weight": (72, 32)}
    for i in range(2):
        h = f"transformer.h.{i}"
        shapes |= {
            f"{h}.input_layernorm.weight": (32,),
            f"{h}.self_attention.query.weight": (32, 32),
            f"{h}.self_attention.key_value.weight": (32, 32),
            f"{h}.self_attention.dense.weight": (32, 32),
            f"{h}.self_attention.dense.bias": (32,),
            f"{h}.post_attention_layernorm.weight": (32,),
            f"{h}.mlp.gate_proj.weight": (40, 32),
            f"{h}.mlp.up_proj.weight": (40, 32),
            f"{h}.mlp.down_proj.weight": (32, 40),
            f"{h}.mlp.down_proj.bias": (32,),
        }
    return shapes | {"transformer.ln_f.weight": (32,), "lm_head.weight": (72, 32)}


TELECHAT2 = {
    "base_seqlen": 8192,
    "ffn_hidden_size": 40,
    "hidden_size": 32,
    "layer_norm_epsilon": 1e-05,
    "logn": False,
    "model_type": "telechat",
    "n_head": 4,
    "n_layer": 2,
    "num_key_value_heads": 2,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "training_seqlen": 8192,
    "vocab_size": 72,
}


def swiglu_shapes(prefix, width):
    return {f"{prefix}.{part}_proj.weight": (width, 32) for part in ("gate", "up")} | {
        f"{prefix}.down_proj.weight": (32, width)
    }


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "kv_lora_rank": 12,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.8,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 6,
    "vocab_size": 72,
}


def deepseek_layer(number):
    layer = f"model.layers.{number}"
    shapes = {
        f"{layer}.input_layernorm.weight": (32,),
        f"{layer}.self_attn.q_a_proj.weight": (20, 32),
        f"{layer}.self_attn.q_a_layernorm.weight": (20,),
        f"{layer}.self_attn.q_b_proj.weight": (48, 20),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (16, 32),
        f"{layer}.self_attn.kv_a_layernorm.weight": (12,),
        f"{layer}.self_attn.kv_b_proj.weight": (56, 12),
        f"{layer}.self_attn.o_proj.weight": (32, 24),
        f"{layer}.post_attention_layernorm.weight": (32,),
    }
    if number == 0:
        return shapes | swiglu_shapes(f"{layer}.mlp", 40)
    shapes |= {f"{layer}.mlp.gate.weight": (4, 32), f"{layer}.mlp.gate.e_score_correction_bias": (4,)}
    for expert in range(4):
        shapes |= swiglu_shapes(f"{layer}.mlp.experts.{expert}", 24)
    return shapes | swiglu_shapes(f"{layer}.mlp.shared_experts", 24)


def deepseek_shapes():
    shapes = {"model.embed_tokens.weight": (72, 32), "model.norm.weight": (32,), "lm_head.weight": (72, 32)}
    for i in range(3):
        shapes |= deepseek_layer(i)
    norms = {f"model.layers.2.{name}.weight": (32,) for name in ("enorm", "hnorm", "shared_head.norm")}
    return shapes | norms | {"model.layers.2.eh_proj.weight": (32, 64)}


def telechat2_expert_shapes():
    shapes = {name: shape for name, shape in telechat2_shapes().items() if ".mlp." not in name}
    for i in range(2):
        mlp = f"transformer.h.{i}.mlp"
        shapes |= {f"{mlp}.router.weight": (4, 32)}
        for expert in range(4):
            shapes |= swiglu_shapes(f"{mlp}.local_experts.{expert}", 24)
    return shapes


PUBLISHED = {
    "telechat2": (TELECHAT2, telechat2_shapes()),
    "telechat52": (TELECHAT52, telechat52_shapes()),
    "llama": (TELE_FLM, llama_shapes()),
    "deepseek": (DEEPSEEK, deepseek_shapes()),
    "telechat2 with experts": (
        {**TELECHAT2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        telechat2_expert_shapes(),
    ),
}


def write_checkpoint(folder, decoder, shards=3):
    """A checkpoint as processes write it that each have some rows of every matrix, and the first all of the rest."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        pieces, places = {}, {}
        for name, tensor in decoder.named_tensors():
            rows = -(-len(tensor) // shards) if tensor.ndim > 1 else len(tensor)
            piece = tensor.detach()[shard * rows : (shard + 1) * rows]
            if len(piece):
                start = [shard * rows] + [0] * (tensor.ndim - 1)
                pieces[f"model.{name}"], places[f"model.{name}"] = piece.clone(), {SAVED_OFFSETS_KEY: start}
        save_file(
            pieces, folder / f"shard-{shard + 1:05d}-model.safetensors", {CUSTOM_METADATA_KEY: json.dumps(places)}
        )
    config = {"model": decoder.config.model_dump()}
    state = {"step": 3, "samples": 0, "config": config, "data_fingerprint": "", "format": 1}
    (folder / "run.json").write_text(json.dumps(state))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))


def write_tokenizer(folder):
    """A tokenizer that fits the smallest vocabulary: every unknown character is one token."""
    letters = {
        letter: number
        for number, letter in enumerate(["<_end>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"])
    }
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<_end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    (folder / "tokenizer.json").write_text(inner.to_str())
