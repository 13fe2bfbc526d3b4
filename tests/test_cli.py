"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import minillm
from minillm.models.source import BUNDLED
from tests.helpers import randomise
from tests.models.families import SMALL

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model with a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "你好，世界"], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE)
    fast.save_pretrained(path)
    sizes = SMALL | {"vocab_size": len(fast), "max_position_embeddings": 4096}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    randomise(model)
    model.save_pretrained(path)
    return path


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minillm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_generate_writes_what_transformers_writes(folder):
    done = run("generate", "the cat", "-m", folder, "--max-tokens", 20, "--dtype", "float32", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**tokens, max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=0)
    expected = tokenizer.decode(written[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
    assert done.stdout == expected + "\n"
    for column in ("prompt tokens", "new tokens", "tokens/s", "KV memory", "float32"):
        assert column in done.stderr
    per_token = minillm.load_model(folder).config.kv_bytes_per_token(torch.float32)
    count = tokens.input_ids.shape[1] + 20
    assert f"{count * per_token / 2**20:.1f} MiB" in done.stderr


def test_without_a_model_it_is_tiny_and_needs_no_network():
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("generate", "Once upon a time", "--max-tokens", 30, "--dtype", "float32", "--device", "cpu", env=offline)
    assert done.returncode == 0, done.stderr
    folder = BUNDLED["tiny"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    written = model.float().generate(**tokens, max_new_tokens=30, do_sample=False)
    expected = tokenizer.decode(written[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
    assert done.stdout == expected + "\n"
    story = "Ben had a red kite. One windy day the kite got stuck in a tall tree."
    answered = run("chat", "-q", f"{story}\n\nWhat colour was the kite?", env=offline)
    assert "red" in answered.stdout


def test_seeded_sampling_repeats(folder):
    options = ["-m", folder, "--max-tokens", "12", "--temperature", "1.5", "--top-k", "50", "--no-stats"]
    outs = [run("generate", "the", *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    assert run("generate", "the", *options).stderr == ""


def test_quick_chat_applies_the_template(folder):
    quick = run("chat", "-q", "the cat", "--system-prompt", "sat", "-m", folder, "--max-tokens", 8, "--stats")
    plain = run("generate", "<system>sat<user>the cat<assistant>", "-m", folder, "--max-tokens", 8)
    assert quick.returncode == 0, quick.stderr
    assert quick.stdout == plain.stdout != ""
    assert "new tokens" in quick.stderr


def start_chat(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-u", "-m", "minillm", "chat", "-m", str(folder), *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's background jobs, and what they start, would ignore Ctrl-C.
    return subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_chat_remembers_the_conversation_and_ends_at_exit(folder):
    chat = start_chat(folder, "--max-tokens", "6")
    out, err = chat.communicate(b"the cat\n\nthe mat\n/exit\nnever read\n", timeout=120)
    assert chat.returncode == 0, err
    first = run("chat", "-q", "the cat", "-m", folder, "--max-tokens", 6).stdout
    conversation = f"<user>the cat<assistant>{first.removesuffix(chr(10))}<user>the mat<assistant>"
    second = run("generate", conversation, "-m", folder, "--max-tokens", 6).stdout
    assert out.decode() == f"> {first}> > {second}> "


def test_ctrl_c_stops_the_answer_and_not_the_session(folder):
    chat = start_chat(folder, "--max-tokens", "3000")
    chat.stdin.write(b"the cat\n")
    chat.stdin.flush()
    chat.stdout.read(40)  # it writes
    chat.send_signal(signal.SIGINT)
    out = b""
    while b"[stopped]" not in out:
        out += chat.stdout.read(1)
    chat.stdin.write(b"/exit\n")
    chat.stdin.flush()
    assert chat.wait(timeout=60) == 0


def test_ctrl_c_at_the_prompt_does_not_end_it(folder):
    chat = start_chat(folder, "--max-tokens", "4")
    assert chat.stdout.read(2) == b"> "
    time.sleep(0.2)
    chat.send_signal(signal.SIGINT)
    assert chat.stdout.read(3) == b"\n> "
    out, err = chat.communicate(b"the\n", timeout=60)  # and the end of input ends it
    assert chat.returncode == 0
    assert len(out) > 2
    assert b"Ctrl-D or /exit" in err


def test_a_message_that_does_not_fit_loses_nothing(folder):
    chat = start_chat(folder, "--max-tokens", "4")
    out, err = chat.communicate(("the cat\n" + "x " * 5000 + "\nthe mat\n").encode(), timeout=120)
    assert chat.returncode == 0
    assert b"shorten the text" in err
    assert out.count(b"> ") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "top_p must be in (0, 1], not 1.5"),
        (["--temperature", "-1"], "temperature must be 0 (greedy)"),
        (["--dtype", "int4"], "dtype 'int4' is not one of auto, float32"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--seed", str(2**64)], "seed must be a number of 64 bits"),
        (["-m", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
    ],
)
def test_errors_are_one_sentence(folder, arguments, message):
    done = run("generate", "the", "-m", folder, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--api-key", ""], {}, "an API key is blank"),
        (["--api-key", "k", "--api-key", " "], {}, "an API key is blank"),
        ([], {"MINILLM_API_KEY": ""}, "an API key is blank"),
    ],
)
def test_what_serve_refuses_before_it_loads(arguments, environment, message):
    done = run("serve", "tiny", "--port", "1", *arguments, env=os.environ | environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_seconds_that_are_no_number_are_refused():
    done = run("serve", "tiny", "--port", "1", "--drain-seconds", "nan")
    assert done.returncode in (1, 2)  # ours, or the command line library's own where it knows
    assert "--drain-seconds" in done.stderr
    assert "cannot be listened on" not in done.stderr


def test_debug_shows_the_traceback(folder):
    for command in (["generate", "the", "--debug"], ["--debug", "generate", "the"]):
        done = run(*command, "-m", folder, "--top-p", "1.5")
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "top_p must be in" in done.stderr


def test_text_that_no_terminal_can_decode_or_show(folder):
    command = [sys.executable, "-m", "minillm", "generate", b"\xff", "-m", str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert b"not valid UTF-8 at character 0" in done.stderr
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    arguments = ["generate", "\u4f60\u597d", "-m", folder, "--temperature", "1e-40", "--max-tokens", 40]
    done = run(*arguments, env=latin, encoding="latin-1")
    assert done.returncode == 0, done.stderr


def test_wrong_options_show_the_usage(folder):
    for arguments in (["generate"], ["generate", "x", "--no-such"], ["fly"], ["generate", "x", "--max-tokens", "0"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Usage: " in done.stderr


def test_an_empty_prompt_and_a_model_without_template(folder, tmp_path):
    assert "at least one token" in run("generate", "", "-m", folder).stderr
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no chat template" in run("chat", "-q", "hi", "-m", tmp_path).stderr


def test_help_has_examples_and_needs_no_torch():
    done = run("--help", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    for command in ("generate", "chat", "pull", "env"):
        assert command in done.stdout
        assert "Usage" in run(command, "--help").stdout
    assert (
        "minillm generate 'Once upon a time'" in run("generate", "--help", env={**os.environ, "COLUMNS": "200"}).stdout
    )
    assert " torch" not in done.stderr
    assert run("--version").stdout == f"minillm {minillm.__version__}\n"


def test_env_tells_versions_and_mends():
    done = run("env", env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0
    for name in ("minillm", "python", "torch", "triton", "devices", "cpu", "memory"):
        assert any(line.startswith(name) for line in done.stdout.splitlines())
    assert torch.__version__.split("+")[0] in done.stdout
    hide = "import sys; sys.modules['jupyterlab'] = None; import minillm.environment as e; print(dict(e.mends()))"
    blocked = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert "pip install 'minillm-engine[notebooks]'" in blocked.stdout, blocked.stderr


def test_a_closed_pipe_is_no_traceback(folder):
    command = f"{sys.executable} -m minillm generate the -m {folder} --max-tokens 2000 --no-stats | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120, check=False)
    assert len(done.stdout) == 5
    assert done.stderr == b""
