"""Loading: every dtype and file form, memory while loading, and an error for everything that can be wrong."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.errors import CheckpointError, ConfigError, OutOfMemoryError, UnsupportedModelError
from minillm.models import loader
from minillm.models.loader import load_model, num_parameters, resolve_dtype
from tests.helpers import randomise, reference_logits
from tests.models.families import FAMILIES, SMALL

ROW = [5, 17, 3, 99, 42]


@pytest.fixture
def llama(tmp_path):
    return FAMILIES["llama"](tmp_path), tmp_path


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder, dtype=dtype, device="cpu")(torch.tensor([ROW]))[0].float()


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_any_dtype_whole_or_in_shards(llama, dtype, shards):
    model, folder = llama
    (folder / "model.safetensors").unlink()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))  # what the file can hold
    expected = reference_logits(model, [ROW])[0]
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() is shards
    torch.testing.assert_close(logits(folder), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["zip", "legacy", "shards"])
def test_pytorch_files_through_the_restricted_unpickler(llama, form):
    """As `facebook/opt-125m` publishes them: no safetensors, names without the outer prefix."""
    model, folder = llama
    (folder / "model.safetensors").unlink()
    weights = {name.removeprefix("model."): tensor.half() for name, tensor in model.state_dict().items()}
    if form == "shards":
        names = list(weights)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, held in parts.items():
            torch.save({name: weights[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    expected = reference_logits(model.half().float(), [ROW])[0]
    torch.testing.assert_close(logits(folder), expected, atol=1e-4, rtol=1e-4)


def test_opt_as_the_hub_publishes_it(tmp_path):
    """`decoder.` names in a pickle, fp16, as `facebook/opt-125m`."""
    model = FAMILIES["opt"](tmp_path)
    (tmp_path / "model.safetensors").unlink()
    published = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    torch.save(published, tmp_path / "pytorch_model.bin")
    assert all(name.startswith(("decoder.", "lm_head")) for name in published)
    torch.testing.assert_close(logits(tmp_path), reference_logits(model, [ROW])[0], atol=1e-4, rtol=1e-4)


def test_names_that_hold_nothing_to_load_are_ignored(tmp_path):
    FAMILIES["gpt2"](tmp_path)
    expected = logits(tmp_path)

    def add(weights):
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()

    change_weights(tmp_path, add)
    torch.testing.assert_close(logits(tmp_path), expected)


def test_dtypes(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    half = torch.bfloat16 if loader.cpu_has_bfloat16() else torch.float32
    assert resolve_dtype("auto", "float32", cpu) is resolve_dtype("auto", "bfloat16", cpu) is half
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert resolve_dtype("auto", "bfloat16", cuda) is torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype("auto", "float16", cuda) is torch.float16
    assert resolve_dtype("auto", "float32", cuda) is torch.bfloat16
    assert resolve_dtype("float32", "float16", cuda) is torch.float32
    assert resolve_dtype(torch.bfloat16, "float16", cpu) is torch.bfloat16
    with pytest.warns(UserWarning, match="float16 is slow on a CPU"):
        assert resolve_dtype("half", "float16", cpu) is half
    with pytest.raises(ConfigError, match="'fp8' is not one of"):
        resolve_dtype("fp8", "float16", cpu)
    with pytest.raises(ConfigError, match="not a floating-point type"):
        resolve_dtype(torch.int32, "float16", cpu)


def test_bfloat16_loads_bfloat16(llama):
    _, folder = llama
    model = load_model(folder, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(folder, "bfloat16") - logits(folder)).abs().mean() < 0.3


PEAK = """
import sys, threading, torch
import minillm.models.loader as loader

def resident(field):  # in bytes
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

torch.ones(8, 8) @ torch.ones(8, 8)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
class Half:
    rank, size = 1, 2
model = loader.load_model(sys.argv[1], dtype="bfloat16", device="cpu", ranks=Half() if "rank" in sys.argv[2] else None)
size = sum(p.nbytes for p in model.parameters())
print((resident("VmHWM") - before) / size)
"""


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


def big_llama(vocab_size: int, hidden_size: int, layers: int) -> transformers.LlamaForCausalLM:
    sizes = SMALL | {"vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))


def peak_over_model(path: Path, form: str = "") -> float:
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), form], capture_output=True, text=True, check=True)
    return float(done.stdout)


@needs_proc
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("safetensors", (32000, 1024, 12)),
        ("float32 safetensors, large embedding", (250000, 640, 4)),
        ("safetensors, one rank of two", (32000, 1024, 24)),
        ("shards", (32000, 1024, 12)),
        ("bin", (32000, 1024, 12)),
        ("bin shards, large embedding", (250000, 640, 4)),
    ],
)
def test_peak_memory_while_loading(tmp_path, form, shape, report):
    """At most 1.3 times the model, mapped files counted in: no second copy of the model, ever."""
    model = big_llama(*shape).to(torch.float32 if "float32" in form else torch.bfloat16)
    if form.startswith("bin"):
        model.config.save_pretrained(tmp_path)
        names, index, parts = list(model.state_dict()), {}, 1 if form == "bin" else 4
        for part in range(parts):
            file = "pytorch_model.bin" if form == "bin" else f"pytorch_model-{part}.bin"
            held = [name for name in names[part::parts] if name != "lm_head.weight"]
            torch.save({name: model.state_dict()[name].clone() for name in held}, tmp_path / file)
            index |= dict.fromkeys(held, file)
        if form != "bin":
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        model.save_pretrained(tmp_path, max_shard_size="100MB" if form == "shards" else "10GB")
    megabytes = num_parameters(model) * 2 / 2**20
    del model
    ratio = peak_over_model(tmp_path, form)
    report("peak memory while loading", f"{form:37} {ratio:.2f} x the model ({megabytes:.0f} MiB in bf16)")
    assert ratio <= 1.3


def test_blocks_of_rows_are_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.models.checkpoint.BLOCK_ELEMENTS", 100)
    for family in ("gpt2", "glm-4 (remote-code form)"):
        model = FAMILIES[family](tmp_path / family)
        torch.testing.assert_close(logits(tmp_path / family), reference_logits(model, [ROW])[0], atol=1e-4, rtol=1e-4)


# --- what does not


def test_a_stored_head_that_is_not_the_tied_embedding(tmp_path):
    FAMILIES["llama (tied, biases)"](tmp_path)

    def untie(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][150] += 1

    change_weights(tmp_path, untie)
    with pytest.raises(CheckpointError, match="a head that differs from it"):
        load_model(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(tmp_path), reference_logits(reference, [ROW])[0], atol=1e-4, rtol=1e-4)


def test_rope_scaling_wins_as_in_transformers(tmp_path):
    FAMILIES["qwen3"](tmp_path)
    plain = logits(tmp_path)
    change_config(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = logits(tmp_path)
    torch.testing.assert_close(ours, reference_logits(reference, [ROW])[0], atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 0.01


def test_a_model_too_large_for_the_memory(llama):
    _, folder = llama
    change_config(folder, vocab_size=10**13)
    with pytest.raises(OutOfMemoryError, match="do not fit on cpu"):
        load_model(folder, device="cpu")


def test_unknown_architectures_name_the_known(llama):
    _, folder = llama
    change_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM; minillm reads GPT2LMHeadModel, .*Gemma3"):
        load_model(folder)
    change_config(folder, architectures=None, model_type="mamba")
    with pytest.raises(UnsupportedModelError, match="not known: mamba"):
        load_model(folder)


def test_a_bare_model_is_known_by_its_type(llama):
    model, folder = llama
    change_config(folder, architectures=None)
    torch.testing.assert_close(logits(folder), reference_logits(model, [ROW])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not implemented"),
        ({"rope_parameters": {"rope_type": "linear"}}, "no 'factor'"),
        ({"num_key_value_heads": 4}, "multiple of num_kv_heads"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"num_attention_heads": 0}, "makes no sense|at least 1"),
        ({"hidden_size": "48"}, "makes no sense"),
        ({"rope_parameters": None, "rope_scaling": "llama3"}, "makes no sense"),
        ({"rms_norm_eps": "small"}, "makes no sense"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    ],
)
def test_configurations_that_cannot_run(llama, changes, message):
    _, folder = llama
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_folders_that_are_not_models(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not hold an object"):
        load_model(tmp_path)


def test_no_weights(llama):
    _, folder = llama
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(folder)


def test_missing_unexpected_and_wrongly_shaped_weights(llama):
    _, folder = llama
    change_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing layers\.1\.self_attn\.k_proj\.weight"):
        load_model(folder)
    change_weights(folder, lambda weights: weights.update({"model.layers.1.extra.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"missing .*; unexpected model\.layers\.1\.extra\.weight"):
        load_model(folder)
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[47\]; its config says \[48\]"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 50, 0.3, 0.99])
def test_truncated_safetensors(llama, keep):
    _, folder = llama
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.98])
@pytest.mark.parametrize("new", [True, False])
def test_truncated_pickles(llama, keep, new):
    model, folder = llama
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"truncated|refused"):
        load_model(folder)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, (Evil.target, "w"))

    target = ""


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_would_run_code_is_refused(llama, new, tmp_path_factory):
    _, folder = llama
    (folder / "model.safetensors").unlink()
    Evil.target = str(tmp_path_factory.mktemp("evil") / "ran")
    torch.save({"x": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="refused: it holds more than tensors"):
        load_model(folder)
    assert not Path(Evil.target).exists()


def test_a_pickle_of_something_else(llama):
    _, folder = llama
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}, protocol=4))
    with pytest.raises(CheckpointError, match="pytorch_model"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a readable index"),
        ('{"weight_map": {"x": "../../secret.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"x": "model-2.safetensors", "y": "model-1.safetensors"}}', "lacks 2 of 2 weight files"),
    ],
)
def test_bad_indexes(llama, index, message):
    _, folder = llama
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_random_models_decide():
    """The tiny models of these tests are no coin tosses (see helpers.randomise)."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    randomise(model, seed=5)
    best = torch.stack(reference_logits(model, [list(range(100))])).topk(2).values
    assert (best[..., 0] - best[..., 1]).median() >= 0.1
