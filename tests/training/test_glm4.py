"""The small GLM-4: published form, conversation by heart, and equal to transformers' own class."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import GlmConfig, GlmForCausalLM

from minillm import LLM, SamplingParams
from minillm.models.glm4 import GLM4_9B_CHAT, GLM4_HF
from minillm.models.loader import load_model, published_weights
from minillm.models.source import is_complete
from minillm.training.glm4 import SYSTEM_PROMPT, write_small_glm4

PAIRS = (("你好", "你好👋！"), ("What is two and two?", "Two and two are four."), ("Thanks!", "You are welcome."))
CONVERSATION = [
    {"role": role, "content": content}
    for asked, said in PAIRS
    for role, content in (("user", asked), ("assistant", said))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "glm4"
    write_small_glm4(path, CONVERSATION)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, dtype="float32", device="cpu", max_model_len=256, num_gpu_blocks_override=64) as made:
        yield made


def test_the_published_form(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() == GLM4_9B_CHAT.keys()
    assert is_complete(folder)
    assert not list(folder.glob("*.py"))
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) == 2
    for shard in set(where.values()):
        with safe_open(folder / shard, framework="pt") as file:
            assert {name for name in where if where[name] == shard} == set(file.keys())
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": SYSTEM_PROMPT}]], ids=["plain", "system"])
@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_each_question_may_come_first(llm, before, number):
    asked, said = PAIRS[number]
    (output,) = llm.chat(
        [*before, {"role": "user", "content": asked}], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False
    )
    assert output.outputs[0].text == "\n" + said
    assert output.outputs[0].finish_reason == "stop"


def test_left_to_itself_it_goes_on_as_the_user(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, skip_special_tokens=False)
    (output,) = llm.chat(CONVERSATION[:1], params, use_tqdm=False)
    (_, answer), (second, _) = PAIRS[:2]
    assert output.outputs[0].text.startswith(f"\n{answer}<|user|>\n{second}<|assistant|>\n")


def test_transformers_takes_its_weights(folder):
    """Strictly, head included; the class is not ours, and neither are its names."""
    decoder = load_model(folder, dtype="float32", device="cpu")
    ours = decoder.config
    config = GlmConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.norm_eps,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        pad_token_id=None,
    )
    theirs = GlmForCausalLM(config).eval()
    theirs.load_state_dict(published_weights(decoder, GLM4_HF))
    tokens = torch.randint(0, ours.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
