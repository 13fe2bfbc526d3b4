"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, one fused q/k/v, matrices stored as [in, out]."""

from __future__ import annotations

from minillm.models.family import Family, Json, activation, need, refuse
from minillm.transformer.decoder import DecoderConfig, LayerConfig


def translate(config: Json) -> DecoderConfig:
    """config.json of GPT-2."""
    refuse(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hidden_size, heads = need(config, "n_embd"), need(config, "n_head")
    return DecoderConfig(
        vocab_size=need(config, "vocab_size"),
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        intermediate_size=config.get("n_inner") or 4 * hidden_size,
        max_position_embeddings=need(config, "n_positions"),
        layers=(LayerConfig(),) * need(config, "n_layer"),
        positions="learned",
        qkv_bias=True,
        attention_out_bias=True,
        activation=activation(config, "activation_function", "gelu_new"),
        gated=False,
        feed_forward_bias=True,
        norm="layer_norm",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied_head=config.get("tie_word_embeddings", True),
    )


GPT2 = Family(
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    translate=translate,
    prefix="transformer.",
    weights={
        "wte": "embedding",
        "wpe": "position_embedding",
        "h.*.ln_1": "layers.*.attention_norm.norm",
        "h.*.attn.c_attn": "layers.*.attention.qkv",
        "h.*.attn.c_proj": "layers.*.attention.out",
        "h.*.ln_2": "layers.*.feed_forward_norm.norm",
        "h.*.mlp.c_fc": "layers.*.feed_forward.up",
        "h.*.mlp.c_proj": "layers.*.feed_forward.down",
        "ln_f": "final_norm",
        "lm_head": "head",
    },
    transposed=frozenset({"h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.mlp.c_fc", "h.*.mlp.c_proj"}),
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    gguf=("gpt2",),
)
