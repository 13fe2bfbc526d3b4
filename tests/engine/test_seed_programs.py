"""Two programs written for vLLM run as they stand, but for the import, the model and the tokenizer's loader."""

from __future__ import annotations

import pytest
import torch
import transformers

from minillm import LLM, SamplingParams, get_tokenizer
from tests.helpers import TokenComparison, randomise, reference_greedy
from tests.models.families import SMALL, write_chatglm
from tests.tokenizers.test_tiktoken import write as write_tokenizer

TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def reference():
    """transformers' GLM, small and random, with GLM-4's vocabulary size."""
    config = transformers.GlmConfig(
        **(SMALL | {"vocab_size": 151_552, "max_position_embeddings": 131_072}),
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    )
    model = transformers.GlmForCausalLM(config).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
    """The model in GLM-4's published layout, with a tokenizer of its form."""
    folder = tmp_path_factory.mktemp("glm4")
    write_tokenizer(folder, config={"chat_template": TEMPLATE})
    write_chatglm(reference, folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first(path):
    llm = LLM(model=path, trust_remote_code=True, tensor_parallel_size=1, dtype=torch.float16)
    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    outputs = llm.generate(prompts, sampling_params)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.prompt == prompt
        assert isinstance(output.outputs[0].text, str)
        assert 1 <= len(output.outputs[0].token_ids) <= 16
        assert output.prompt_token_ids[:2] == get_tokenizer(path)("").input_ids
    llm.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_second(path, reference, tp_size):
    model = path
    tokenizer = get_tokenizer(model)
    llm = LLM(
        model=model, tensor_parallel_size=tp_size, max_model_len=32768, trust_remote_code=True, enforce_eager=True
    )
    stop_token_ids = [151329, 151336, 151338]
    sampling_params = SamplingParams(temperature=0.95, max_tokens=1024, stop_token_ids=stop_token_ids)
    prompt = [{"role": "user", "content": "你好"}]
    inputs = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    outputs = llm.generate(prompts=inputs, sampling_params=sampling_params)
    assert isinstance(outputs[0].outputs[0].text, str)
    # The template writes [gMASK]<sop>, and so would the tokenizer: once is enough, and nothing is lost.
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert outputs[0].prompt_token_ids == ids
    assert ids.count(ids[0]) == 1
    # What it writes is drawn; what it would write at temperature 0 is transformers'.
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (output,) = llm.generate(prompts=inputs, sampling_params=greedy)
    TokenComparison().add(output.outputs[0].token_ids, *reference_greedy(reference, ids, 16))
    llm.close()
