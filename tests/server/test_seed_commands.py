"""`minillm serve` on a folder as the hub publishes `facebook/opt-125m`: a pickle of `decoder.` names, no template."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from minillm import LLM
from tests.helpers import SHARED, randomise
from tests.server.conftest import SMALL, running

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "template_chatml.jinja"
PUBLISHED = SHARED / "tokenizers" / "opt"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
PROMPTS = ["Hello, my name is", "The capital of France is", " the the"]
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
CHATML = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


def write_opt(folder: Path, vocabulary: Path | None) -> Path:
    """A tiny random OPT with the files and names of the hub's.

    Args:
        vocabulary: a folder with OPT's vocab.json and merges.txt; a small vocabulary is made when None.
    """
    if vocabulary is None:
        tokenizer = ByteLevelBPETokenizer()
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        tokenizer.train_from_iterator([text], vocab_size=1000, special_tokens=SPECIAL, show_progress=False)
        tokenizer.save_model(str(folder))
    else:
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(vocabulary / file, folder / file)
    config = OPTConfig(
        vocab_size=len(json.loads((folder / "vocab.json").read_text())) + 7,  # the hub's has 7 rows without a token
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = OPTForCausalLM(config).eval()
    randomise(model)
    weights = {name.removeprefix("model."): tensor.half() for name, tensor in model.state_dict().items()}
    assert {name.partition(".")[0] for name in weights} == {"decoder", "lm_head"}
    torch.save(weights, folder / "pytorch_model.bin")
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    special = {f"{role}_token": token | {"content": "</s>"} for role in ("bos", "eos", "unk")}
    special["pad_token"] = token | {"content": "<pad>"}
    options = {
        "errors": "replace",
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    said = {"architectures": ["OPTForCausalLM"], "torch_dtype": "float16", "prefix": "</s>"}
    for file, content in {
        "config": config.to_diff_dict() | said,
        "generation_config": {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
        "tokenizer_config": special | options,
        "special_tokens_map": special,
    }.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """`minillm serve FOLDER`; the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minillm", "serve", str(folder), "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--enforce-eager", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_serves(process, url)
        yield url
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.stdout.close()


def wait_until_it_serves(process: subprocess.Popen[str], url: str) -> None:
    for _ in range(1200):
        assert process.poll() is None, process.stdout.read()
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{url}/health").raise_for_status()
            return
        time.sleep(0.05)
    raise AssertionError("the server does not start")


def greedy(folder: Path, prompt: str, count: int) -> str:
    """transformers' continuation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    (row,) = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(row[ids.input_ids.shape[1] :], skip_special_tokens=True)


def check_completions(client: openai.OpenAI, model: str, folder: Path) -> None:
    """The client's completions are transformers', whole and streamed."""
    expected = [greedy(folder, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    asked = {"model": model, "temperature": 0, "max_tokens": 12}
    assert [choice.text for choice in client.completions.create(prompt=PROMPTS, **asked).choices] == expected
    stream = client.completions.create(prompt=PROMPTS[0], stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


def test_serve_facebook_opt(tmp_path):
    folder = write_opt(tmp_path, None)
    with serving(folder) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [str(folder)]
        check_completions(client, str(folder), folder)
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*--chat-template"):
            client.chat.completions.create(model=str(folder), messages=MESSAGES)
        assert httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).status_code == 400


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no shared/tokenizers beside the checkout")
def test_with_the_published_vocabulary(tmp_path):
    folder = write_opt(tmp_path, PUBLISHED)
    with LLM(folder, **SMALL) as llm, running(llm, served_names=["opt"]) as server:
        check_completions(server.openai, "opt", folder)


INLINE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.mark.parametrize(
    ("template", "expected"),
    [(str(EXAMPLE.relative_to(ROOT)), CHATML), (INLINE, "system: Be short.\nuser: Who are you?\nassistant:")],
    ids=["file", "inline"],
)
def test_serve_facebook_opt_with_a_chat_template(tmp_path, template, expected):
    folder = write_opt(tmp_path, None)
    options = ("--chat-template", template, "--served-model-name", "opt", "--api-key", "secret")
    with serving(folder, *options) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
        assert [model.id for model in client.models.list()] == ["opt"]
        assert httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).status_code == 401
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=str(folder), messages=MESSAGES)
        headers = {"authorization": "Bearer secret"}
        tokens = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}, headers=headers).json()["tokens"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokens == tokenizer(expected, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == expected
        chat = client.chat.completions.create(model="opt", messages=MESSAGES, temperature=0, max_tokens=8)
        assert chat.usage.prompt_tokens == len(tokens)
        continued = client.completions.create(model="opt", prompt=tokens, temperature=0, max_tokens=8)
        assert chat.choices[0].message.content == continued.choices[0].text
