"""The TeleChat-52B layout against its maths written out here: Conv1D, q|k|v and gate|up by columns, muP."""

import pytest
import torch
from published_folders import PUBLISHED, random_tensors

import zili


def written_out(tensors, config, ids):
    """Logits `[B, S, V]`, one head and one position at a time, in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    heads, size = config["n_head"], config["n_embd"] // config["n_head"]
    length = ids.shape[1]
    frequency = 1 / config["rotary_theta"] ** (torch.arange(0, size, 2).double() / size)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt() * weight

    def turn(vector, position):
        a, b = vector[..., : size // 2], vector[..., size // 2 :]
        cos, sin = (position * frequency).cos(), (position * frequency).sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = t["transformer.wte.weight"][ids] * config["input_mult"]
    for i in range(config["n_layer"]):
        h = f"transformer.h.{i}"
        mixed = norm(x, t[f"{h}.ln_1.weight"]) @ t[f"{h}.attn.c_attn.weight"]
        query, key, value = mixed.split(config["n_embd"], dim=-1)
        out = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for now in range(length):
                q = turn(query[:, now, part], now)
                keys = torch.stack([turn(key[:, then, part], then) for then in range(now + 1)], dim=1)
                weights = ((keys * q[:, None]).sum(-1) / size**0.5).softmax(-1)
                out[:, now, part] = (weights[..., None] * value[:, : now + 1, part]).sum(1)
        x = x + out @ t[f"{h}.attn.c_proj.weight"]
        gate, up = (norm(x, t[f"{h}.ln_2.weight"]) @ t[f"{h}.mlp.c_fc.weight"]).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ t[f"{h}.mlp.c_proj.weight"]
    logits = norm(x, t["transformer.ln_f.weight"]) @ t["lm_head.weight"].T
    return logits * config["output_mult"] / config["mup_scale_factor"]


@torch.no_grad()
def test_logits_are_the_written_out_ones(publish):
    config, shapes = PUBLISHED["telechat52"]
    tensors = random_tensors(shapes, torch.float32)

    def with_masks(saved):
        # The published files carry this scalar in every layer; it means nothing.
        saved |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}

    model = zili.load(publish("telechat52", torch.float32, edit=with_masks))
    ids = torch.randint(72, (2, 9), generator=torch.Generator().manual_seed(4))
    expected = written_out(tensors, config, ids)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(ids).double(), expected, atol=1e-5, rtol=0)


def test_gpt2_is_not_mistaken_for_it(publish):
    folder = publish("telechat52", changes={"use_RMSNorm": False})
    with pytest.raises(zili.errors.CheckpointError, match=r"config.json: use_RMSNorm = False is not supported"):
        zili.load(folder)
