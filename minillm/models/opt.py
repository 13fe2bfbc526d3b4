"""OPT (Zhang et al. 2022): learned positions that start at row 2; 350m is post-norm with a narrower embedding."""

from __future__ import annotations

from minillm.models.family import Family, Json, activation, need, refuse
from minillm.transformer.decoder import DecoderConfig, LayerConfig


def translate(config: Json) -> DecoderConfig:
    """config.json of OPT."""
    refuse(config, layer_norm_elementwise_affine=True)
    hidden_size, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    pre_norm = config.get("do_layer_norm_before", True)
    bias = config.get("enable_bias", True)
    return DecoderConfig(
        vocab_size=need(config, "vocab_size"),
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        intermediate_size=need(config, "ffn_dim"),
        max_position_embeddings=need(config, "max_position_embeddings"),
        layers=(LayerConfig(),) * need(config, "num_hidden_layers"),
        embedding_size=config.get("word_embed_proj_dim"),
        positions="learned",
        position_offset=2,
        qkv_bias=bias,
        attention_out_bias=bias,
        activation=activation(config, "activation_function", "relu"),
        gated=False,
        feed_forward_bias=bias,
        norm="layer_norm",
        norm_eps=1e-5,
        norm_placement="pre" if pre_norm else "post",
        final_norm=pre_norm and not config.get("_remove_final_layer_norm", False),
        tied_head=config.get("tie_word_embeddings", True),
    )


OPT = Family(
    architectures=("OPTForCausalLM",),
    model_types=("opt",),
    translate=translate,
    prefix="model.decoder.",
    more_prefixes=("decoder.",),
    weights={
        "embed_tokens": "embedding",
        "embed_positions": "position_embedding",
        "project_in": "project_in",
        "project_out": "project_out",
        "layers.*.self_attn_layer_norm": "layers.*.attention_norm.norm",
        "layers.*.self_attn.q_proj": "layers.*.attention.qkv[q]",
        "layers.*.self_attn.k_proj": "layers.*.attention.qkv[k]",
        "layers.*.self_attn.v_proj": "layers.*.attention.qkv[v]",
        "layers.*.self_attn.out_proj": "layers.*.attention.out",
        "layers.*.final_layer_norm": "layers.*.feed_forward_norm.norm",
        "layers.*.fc1": "layers.*.feed_forward.up",
        "layers.*.fc2": "layers.*.feed_forward.down",
        "final_layer_norm": "final_norm",
        "lm_head": "head",
    },
)
