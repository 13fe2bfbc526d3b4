"""GLM-4 (GLM Team 2024) in its three published forms.

- ``glm-4-9b-chat``: names of the repository's own code (which is never executed), fused q/k/v and gate/up.
- ``glm-4-9b-chat-hf``: the same model under Llama's names.
- GLM-4-9B-0414: sandwich norms.

All rotate the first half of each head, in interleaved pairs, and share two groups of keys and values.
"""

from __future__ import annotations

from dataclasses import replace

from minillm.models.family import (
    LLAMA_IGNORED,
    LLAMA_WEIGHTS,
    Family,
    Json,
    llama_like,
    need,
    refuse,
    rotary,
    same_layers,
)
from minillm.transformer.decoder import DecoderConfig, LayerConfig
from minillm.transformer.positions import RotaryConfig

EPS = 1.5625e-07

GLM4_9B_CHAT: Json = {
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"},
    "num_layers": 40,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 151552,
    "seq_length": 131072,
    "rope_ratio": 500,
    "original_rope": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "layernorm_epsilon": EPS,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
"""config.json of glm-4-9b-chat in its remote-code form, without the options of training."""


def translate_hf(config: Json) -> DecoderConfig:
    """config.json of glm-4-9b-chat-hf."""
    size = config.get("head_dim") or 128
    angles = rotary(config, partial=0.5, interleaved=True, default_head_dim=size)
    return llama_like(
        config,
        layers=same_layers(config, LayerConfig(rotary=angles)),
        head_dim=size,
        qkv_bias=config.get("attention_bias", True),
        attention_out_bias=False,
        norm_eps=config.get("rms_norm_eps", EPS),
    )


def translate_0414(config: Json) -> DecoderConfig:
    """config.json of GLM-4-9B-0414."""
    return replace(translate_hf(config), norm_placement="sandwich")


def translate_chatglm(config: Json) -> DecoderConfig:
    """config.json of the remote-code repositories."""
    refuse(
        config,
        rmsnorm=True,
        post_layer_norm=True,
        apply_residual_connection_post_layernorm=False,
        add_bias_linear=False,
        original_rope=True,
    )
    heads, size = need(config, "num_attention_heads"), need(config, "kv_channels")
    rotary_base = 10000.0 * config.get("rope_ratio", 1)
    angles = RotaryConfig(dim=size // 2, base=rotary_base, interleaved=True)
    return DecoderConfig(
        vocab_size=need(config, "padded_vocab_size"),
        hidden_size=need(config, "hidden_size"),
        num_heads=heads,
        num_kv_heads=need(config, "multi_query_group_num") if config.get("multi_query_attention") else heads,
        head_dim=size,
        intermediate_size=need(config, "ffn_hidden_size"),
        max_position_embeddings=need(config, "seq_length"),
        layers=(LayerConfig(rotary=angles),) * need(config, "num_layers"),
        qkv_bias=config.get("add_qkv_bias", False),
        norm_eps=config.get("layernorm_epsilon", EPS),
        tied_head=config.get("tie_word_embeddings", False),
    )


_SEPARATE = ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj")
_HF_WEIGHTS = {name: ours for name, ours in LLAMA_WEIGHTS.items() if name not in _SEPARATE} | {
    "layers.*.mlp.gate_up_proj": "layers.*.feed_forward.gate_up",
}

GLM4_HF = Family(
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    translate=translate_hf,
    prefix="model.",
    weights=_HF_WEIGHTS,
    ignored=LLAMA_IGNORED,
    gguf=("chatglm",),
)

GLM4_0414 = Family(
    architectures=("Glm4ForCausalLM",),
    model_types=("glm4",),
    translate=translate_0414,
    prefix="model.",
    weights=_HF_WEIGHTS
    | {
        "layers.*.post_self_attn_layernorm": "layers.*.attention_norm.out_norm",
        "layers.*.post_mlp_layernorm": "layers.*.feed_forward_norm.out_norm",
    },
    ignored=LLAMA_IGNORED,
    gguf=("glm4",),
)

CHATGLM = Family(
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    model_types=("chatglm",),
    translate=translate_chatglm,
    prefix="transformer.",
    weights={
        "embedding.word_embeddings": "embedding",
        "encoder.layers.*.input_layernorm": "layers.*.attention_norm.norm",
        "encoder.layers.*.self_attention.query_key_value": "layers.*.attention.qkv",
        "encoder.layers.*.self_attention.dense": "layers.*.attention.out",
        "encoder.layers.*.post_attention_layernorm": "layers.*.feed_forward_norm.norm",
        "encoder.layers.*.mlp.dense_h_to_4h": "layers.*.feed_forward.gate_up",
        "encoder.layers.*.mlp.dense_4h_to_h": "layers.*.feed_forward.down",
        "encoder.final_layernorm": "final_norm",
        "output_layer": "head",
    },
    ignored=(r"rotary_pos_emb\.inv_freq",),
)
