"""One rule that makes a small twin of any shape, to try its layout and its recipe on one machine."""

from __future__ import annotations

from zili.config.model import ModelConfig

_HEADS, _LAYERS, _EXPERTS, _TOP_K, _VOCABULARY = 8, 4, 8, 2, 8192


def scaled_down(model: ModelConfig, hidden_size: int) -> ModelConfig:
    """A model of `hidden_size` (a multiple of 16) with everything of `model` that is not a size.

    Kept: rules, switches, biases, multipliers, and the proportions of hidden size, feed-forward layers and low ranks.
    Cut to what 8 processes can share: 8 heads, and of key/value heads at least 2; 8 experts, 2 a token; a vocabulary of
    8192. There are 4 layers, of which the first is dense if any was.
    """
    factor = hidden_size / model.hidden_size

    def shrunk(size: int) -> int:
        return max(16, 16 * round(size * factor / 16))

    head = max(4, hidden_size // _HEADS)
    changes: dict[str, object] = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": shrunk(model.ffn_hidden_size),
        "layers": min(model.layers, _LAYERS),
        "heads": _HEADS,
        "kv_heads": max(2, _HEADS * model.kv_heads // model.heads),
        "head_dim": head,
        "vocab_size": min(model.vocab_size, _VOCABULARY),
    }
    if model.latent is not None:
        turned = max(2, head // 4 * 2)
        ranks = {"query_rank": shrunk(model.latent.query_rank), "key_value_rank": shrunk(model.latent.key_value_rank)}
        changes["head_dim"] = head + turned
        changes["latent"] = {**ranks, "rope_head_dim": turned, "value_head_dim": head}
    if model.mixture is not None:
        mixture = model.mixture
        cut = {"experts": min(mixture.experts, _EXPERTS), "top_k": min(mixture.top_k, _TOP_K)}
        sizes = {"ffn_hidden_size": shrunk(mixture.ffn_hidden_size), "dense_layers": min(mixture.dense_layers, 1)}
        changes["mixture"] = {**cut, **sizes}
    return model.changed(**changes)
