# Copyright the Zili authors. Apache License 2.0.
"""Configuration of TeleChat2 models, for transformers and vLLM (`trust_remote_code`)."""

from transformers import PretrainedConfig


class TeleChat2Config(PretrainedConfig):
    """Keys as in TeleChat2's published config.json.

    `rope_theta` is the base that holds up to `training_seqlen` tokens. A longer sequence takes
    `rope_theta * a ** (d / (d - 2))` with `a = max(2 ** ceil(log2(length / base_seqlen) + 1) - 1, 1)`.
    `rotary_table_dtype` "float16" rounds cos and sin, as the published code does; "float32" does not.
    """

    model_type = "telechat"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
    }

    def __init__(
        self,
        vocab_size=131072,
        hidden_size=4096,
        n_layer=30,
        n_head=32,
        num_key_value_heads=None,
        ffn_hidden_size=12288,
        layer_norm_epsilon=1e-5,
        seq_length=8192,
        training_seqlen=8192,
        base_seqlen=8192,
        max_position_embeddings=None,
        rope_theta=10000.0,
        rotary_table_dtype="float16",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.02,
        num_experts=None,
        num_experts_per_tok=None,
        moe_intermediate_size=None,
        norm_topk_prob=True,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.num_key_value_heads = num_key_value_heads or n_head
        self.head_dim = hidden_size // n_head
        self.ffn_hidden_size = ffn_hidden_size
        self.hidden_act = "silu"
        self.layer_norm_epsilon = layer_norm_epsilon
        self.seq_length = seq_length
        self.training_seqlen = training_seqlen
        self.base_seqlen = base_seqlen
        self.max_position_embeddings = max_position_embeddings or training_seqlen
        self.rope_theta = rope_theta
        self.rotary_table_dtype = rotary_table_dtype
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.use_cache = use_cache
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
