# Copyright the Zili authors. Apache License 2.0.
"""TeleChat2 for transformers (`trust_remote_code`): plain PyTorch, any device, no flash-attn needed.

Tensor names are those of the published checkpoints. Shapes: B batch, S new tokens, T tokens in all, D hidden size,
H heads, K key/value heads, d = D / H.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_telechat2 import TeleChat2Config

# transformers 5.2x calls it `cache`; before, it was `past_key_values`. Both are taken, and the output has its own name.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class TeleChat2RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(config, positions, length):
    """cos and sin `[B, S, d]` for `positions [B, S]` of sequences of `length` tokens."""
    size = config.hidden_size // config.n_head
    reach = max(length, config.training_seqlen)
    alpha = max(2.0 ** math.ceil(math.log2(reach / config.base_seqlen) + 1) - 1, 1.0)
    base = _rope_theta(config) * alpha ** (size / (size - 2))
    magnitude = 0.1 * math.log(reach / config.training_seqlen) + 1.0
    # On the CPU, as powers differ by an ulp between devices.
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    angles = positions[..., None].float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if config.rotary_table_dtype == "float16":
        cos, sin = cos.half(), sin.half()
    return (cos * magnitude).float(), (sin * magnitude).float()


def _rope_theta(config):
    """Some versions of transformers move the key into a table."""
    table = getattr(config, "rope_parameters", None) or {}
    return float(table.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def rotated(x, cos, sin):
    """`x [B, heads, S, d]` turned by `cos, sin [B, S, d]`, pairs being i and i + d / 2."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class TeleChat2Attention(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number = number
        self.heads, self.kv_heads = config.n_head, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.n_head
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        # Rows are key and value of one head after another.
        self.key_value = nn.Linear(config.hidden_size, 2 * self.kv_heads * self.head_dim, bias=False)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=True)

    def forward(self, x, cos, sin, mask, cache):
        batch, new, _ = x.shape
        query = self.query(x).view(batch, new, self.heads, self.head_dim).transpose(1, 2)
        pairs = self.key_value(x).view(batch, new, self.kv_heads, 2, self.head_dim)
        key, value = pairs[..., 0, :].transpose(1, 2), pairs[..., 1, :].transpose(1, 2)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and new > 1
        )
        return self.dense(out.transpose(1, 2).reshape(batch, new, -1))


class TeleChat2MLP(nn.Module):
    def __init__(self, config, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TeleChat2Experts(nn.Module):
    """A softmax over all experts, the likeliest few chosen, their weights made to add up to one."""

    def __init__(self, config):
        super().__init__()
        inner = config.moe_intermediate_size or config.ffn_hidden_size
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.local_experts = nn.ModuleList(TeleChat2MLP(config, inner, False) for _ in range(config.num_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        scores = F.linear(tokens.float(), self.router.weight.float()).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.local_experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if row.numel():
                out.index_add_(0, row, expert(tokens[row]).float() * weights[row, place, None])
        return out.to(x.dtype).view_as(x)


class TeleChat2Block(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = TeleChat2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = TeleChat2Attention(config, number)
        self.post_attention_layernorm = TeleChat2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        dense = not config.num_experts
        self.mlp = TeleChat2MLP(config, config.ffn_hidden_size, True) if dense else TeleChat2Experts(config)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self._drop(self.self_attention(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, branch):
        return F.dropout(branch, self.dropout, self.training)


class TeleChat2PreTrainedModel(PreTrainedModel):
    config_class = TeleChat2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["TeleChat2Block"]
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
        elif isinstance(module, TeleChat2RMSNorm):
            module.weight.data.fill_(1.0)


class TeleChat2Model(TeleChat2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(TeleChat2Block(config, number) for number in range(config.n_layer))
        self.ln_f = TeleChat2RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        """`input_ids [B, S]`, `attention_mask [B, T]` with 0 where there is padding -> hidden states `[B, S, D]`.

        Keys stay as they were first turned: where a sequence outgrows `training_seqlen` while it is cached, the
        continuation is that of the published code's cached loop, not that of a pass over the whole.
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        length = seen + x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seen, length, device=x.device)[None]
        cos, sin = rotary_tables(self.config, position_ids, length)
        mask = _allowed(attention_mask, x, seen)
        for block in self.h:
            x = block(x, cos, sin, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), **{_CACHE: cache})


def _allowed(attention_mask, x, seen):
    """`[B, 1, S, T]`: which keys a query sees; None where the causal rule alone says it."""
    new, length = x.shape[1], seen + x.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    padded = attention_mask is not None and not bool(attention_mask.bool().all())
    if not padded and (seen == 0 or new == 1):
        return None
    queries = torch.arange(seen, length, device=x.device)[:, None]
    allowed = (torch.arange(length, device=x.device)[None] <= queries)[None, None]
    if padded:
        # A query that is padding sees itself: a row without a key would give NaN.
        own = torch.arange(length, device=x.device)[None] == queries
        allowed = allowed & (attention_mask[:, None, None, :length].bool() | own[None, None])
    return allowed


class TeleChat2ForCausalLM(TeleChat2PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = TeleChat2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value):
        self.transformer.word_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """As `TeleChat2Model`; logits `[B, S, V]` in fp32, of the last `logits_to_keep` tokens if that is not 0."""
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: out.get(_CACHE)})
