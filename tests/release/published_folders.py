"""What the release tests read: the golden folders, and shapes and configurations of tiny published ones."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
DENSE = ["telechat1-7b", "telechat2-gqa", "telechat2-mha", "telechat2-ntk", "telechat3-36b"]


def golden_folder(name):
    folder = GOLDEN / name
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

PUBLISHED = {
    "telechat2": (TELECHAT2, telechat2_shapes()),
    "telechat52": (TELECHAT52, telechat52_shapes()),
    "llama": (TELE_FLM, llama_shapes()),
}
