"""One tiny random model of transformers' own class for every form in which a family is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from minillm.models.glm4 import GLM4_9B_CHAT
from tests.helpers import randomise

SMALL = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPT_SMALL = {key: SMALL[key] for key in SMALL if key not in ("intermediate_size", "num_key_value_heads")}


def _hf(config: Any, model: type) -> Callable[[Path], nn.Module]:
    def build(folder: Path) -> nn.Module:
        made = model(config()).eval()
        randomise(made)
        made.save_pretrained(folder)
        return made

    return build


def _chatglm(folder: Path) -> nn.Module:
    """A `GlmForCausalLM` written under the names and configuration keys of ``THUDM/glm-4-9b-chat``."""
    config = transformers.GlmConfig(
        **SMALL, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    )
    model = transformers.GlmForCausalLM(config).eval()
    randomise(model)
    write_chatglm(model, folder)
    return model


def write_chatglm(model: nn.Module, folder: Path) -> None:
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            ("model.embed_tokens", "transformer.embedding.word_embeddings"),
            ("lm_head", "transformer.output_layer"),
            ("model.norm", "transformer.encoder.final_layernorm"),
            ("model.layers", "transformer.encoder.layers"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("self_attn", "self_attention"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ):
            name = name.replace(old, new)
        weights[name] = tensor
    for layer in range(config.num_hidden_layers):
        for end in ("weight", "bias"):
            base = f"transformer.encoder.layers.{layer}.self_attention."
            parts = [weights.pop(f"{base}{part}_proj.{end}") for part in "qkv"]
            weights[f"{base}query_key_value.{end}"] = torch.cat(parts)
    weights["transformer.rotary_pos_emb.inv_freq"] = weights["transformer.encoder.final_layernorm.weight"][:2].clone()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    published = {
        **GLM4_9B_CHAT,
        "ffn_hidden_size": config.intermediate_size,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "padded_vocab_size": config.vocab_size,
        "seq_length": config.max_position_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(published))


T = transformers
FAMILIES: dict[str, Callable[[Path], nn.Module]] = {
    "gpt2": _hf(
        lambda: T.GPT2Config(vocab_size=160, n_embd=48, n_layer=3, n_head=6, n_positions=128, eos_token_id=None),
        T.GPT2LMHeadModel,
    ),
    "opt": _hf(lambda: T.OPTConfig(**OPT_SMALL, ffn_dim=80, word_embed_proj_dim=48), T.OPTForCausalLM),
    "opt-350m (post-norm, projected)": _hf(
        lambda: T.OPTConfig(**OPT_SMALL, ffn_dim=80, word_embed_proj_dim=32, do_layer_norm_before=False),
        T.OPTForCausalLM,
    ),
    "llama": _hf(lambda: T.LlamaConfig(**SMALL), T.LlamaForCausalLM),
    "llama (tied, biases)": _hf(
        lambda: T.LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True), T.LlamaForCausalLM
    ),
    "llama (llama3 rope)": _hf(lambda: T.LlamaConfig(**SMALL, rope_parameters=LLAMA3), T.LlamaForCausalLM),
    "llama (linear rope)": _hf(
        lambda: T.LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        T.LlamaForCausalLM,
    ),
    "mistral (window)": _hf(lambda: T.MistralConfig(**SMALL, head_dim=16, sliding_window=8), T.MistralForCausalLM),
    "mistral (no window)": _hf(lambda: T.MistralConfig(**SMALL, sliding_window=None), T.MistralForCausalLM),
    "qwen2": _hf(lambda: T.Qwen2Config(**SMALL), T.Qwen2ForCausalLM),
    "qwen2 (yarn, windows)": _hf(
        lambda: T.Qwen2Config(
            **SMALL, rope_parameters=YARN, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        T.Qwen2ForCausalLM,
    ),
    "qwen3": _hf(lambda: T.Qwen3Config(**SMALL, head_dim=16), T.Qwen3ForCausalLM),
    "glm-4 (remote-code form)": _chatglm,
    "glm-4 (hf)": _hf(lambda: T.GlmConfig(**SMALL, head_dim=16), T.GlmForCausalLM),
    "glm-4-0414": _hf(lambda: T.Glm4Config(**SMALL, head_dim=16), T.Glm4ForCausalLM),
    "gemma3": _hf(
        lambda: T.Gemma3TextConfig(
            **SMALL | {"num_hidden_layers": 7},
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=24,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        ),
        T.Gemma3ForCausalLM,
    ),
    "gemma3 (soft-capped logits)": _hf(
        lambda: T.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8, final_logit_softcapping=20.0),
        T.Gemma3ForCausalLM,
    ),
}
