"""Small random models whose every weight matters, released in each layout: what other engines are asked."""

from __future__ import annotations

from pathlib import Path

import torch

from zili.config.model import ModelConfig, RotaryConfig
from zili.data.tokenizer import Tokenizer
from zili.models.decoder import Decoder
from zili.objectives import learner
from zili.release.native import write_native
from zili.release.tensors import HeldTensors
from zili.serving.generate.generation import Sampling, generate

STEPS = 24
TEXT = "The model 模型 trains for 12345 steps.\n\n    return self.x  # 你好, don't stop"
# vLLM's CPU attention takes heads of 32 and more.
SMALL = {"vocab_size": 384, "hidden_size": 128, "layers": 3, "heads": 4, "head_dim": 32, "ffn_hidden_size": 160}
SMALL |= {"max_length": 128, "init_std": 0.15}
BIASED = {"attention_output_bias": True, "ffn_down_bias": True}
NTK = {"rule": "telechat_ntk", "training_length": 128, "half_tables": False}
MODELS = {
    "telechat2": ModelConfig(**SMALL, **BIASED, kv_heads=2, rotary=RotaryConfig(**NTK, original_length=128)),
    # Its base is another than its rotary.base from the first token on.
    "telechat2-long": ModelConfig(**SMALL, **BIASED, kv_heads=4, rotary=RotaryConfig(**NTK, original_length=32)),
    "telechat3": ModelConfig(
        **SMALL, kv_heads=2, rotary=RotaryConfig(rule="telechat3_yarn", base=1e4, factor=4.0, original_length=32)
    ),
    "mup": ModelConfig(
        **SMALL,
        kv_heads=4,
        embedding_multiplier=2.0,
        logit_multiplier=0.25,
        rotary=RotaryConfig(rule="tele_flm_ntk", original_length=128),
    ),
    "tied": ModelConfig(**SMALL, kv_heads=1, tied_embeddings=True),
}


def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT, "you don't 123 \t\t y = x ** 2\n\n\n end  of  line"] * 12, 360)


def made(folder: Path, name: str) -> Decoder:
    """A Zili model folder, and its decoder."""
    torch.manual_seed(3)
    decoder = learner(MODELS[name]).eval()
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0, 0.3).add_("norm" in parameter_name)
    folder.mkdir()
    write_native(folder, MODELS[name], None, HeldTensors(decoder.state_dict()), 10**9)
    tokenizer().save(folder)
    return decoder


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(7, 360, (length,), generator=draw).tolist() for length in (1, 17, 60)]


@torch.no_grad()
def answers(decoder: Decoder, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy ids that follow, and the log-probability of each of prompt and answer after the first."""
    ids = list(generate(decoder, prompt, max_new_tokens=STEPS, sampling=Sampling(temperature=0)))
    whole = torch.tensor([*prompt, *ids])
    log_probs = decoder(whole[None])[0, :-1].log_softmax(-1).gather(1, whole[1:, None])[:, 0]
    return ids, log_probs.tolist()
