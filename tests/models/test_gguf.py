"""GGUF files as llama.cpp's converter writes them: every type, every architecture, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import CheckpointError, ConfigError, MinillmError, TokenizerError, UnsupportedModelError
from minillm.models.gguf import gguf_config, iterate_gguf, open_gguf
from minillm.models.loader import load_model
from minillm.models.tokenizer import get_tokenizer
from minillm.transformer.generation import generate
from minillm.transformer.positions import YarnScaling, yarn_mscale
from tests.helpers import TokenComparison, randomise, reference_greedy, reference_logits
from tests.models.families import LLAMA3, SMALL, YARN

TYPES = gguf.GGMLQuantizationType
READABLE = sorted({TYPES.F32, TYPES.F16, *gguf.quants._type_traits})
PROMPTS = [[5, 17, 3, 99, 42, 7, 7, 120, 11, 2, 64, 31], [150, 9, 1], [33, 4, 8, 15, 16, 23, 42]]
ODD = SMALL | {"rms_norm_eps": 1e-3}
"""An ε that shows in the logits when it is not read."""
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0}

Tensors = Iterator[tuple[str, np.ndarray]]


# Writing a model as llama.cpp's convert_hf_to_gguf.py does.


def permute(weight: Tensor, heads: int) -> Tensor:
    """The two halves of each head, interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def to_halves(weight: Tensor, head_dim: int, rotated: int) -> Tensor:
    """The opposite, of the rotated channels: how the text half of GLM-4's vision models is stored."""
    parts = weight.reshape(-1, head_dim, *weight.shape[1:])
    return torch.cat([parts[:, :rotated:2], parts[:, 1:rotated:2], parts[:, rotated:]], dim=1).reshape(weight.shape)


def converted(model: nn.Module, case: Case) -> Tensors:
    """GGUF's name and values of each tensor."""
    config = model.config
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for published, tensor in model.state_dict().items():
        if published == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if case.architecture == "llama" and "q_proj" in published:
            tensor = permute(tensor, config.num_attention_heads)
        if case.architecture == "llama" and "k_proj" in published:
            tensor = permute(tensor, config.num_key_value_heads)
        if case.sections and ("q_proj" in published or "k_proj" in published):
            tensor = to_halves(tensor, config.head_dim, config.head_dim // 2)
        if case.architecture == "gemma3" and published.endswith("norm.weight"):
            tensor = tensor + 1
        if published.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        yield known.get_name(published, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy()


def fused(tensors: Tensors) -> Tensors:
    """q, k and v in one tensor: ChatGLM's own form, and the converter's --fuse-qkv."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors:
        base, _, rest = name.partition(".attn_")
        if rest.partition(".")[0] in ("q", "k", "v"):
            parts.setdefault(f"{base}.attn_qkv.{rest[2:]}", {})[rest[0]] = values
        else:
            yield name, values
    yield from ((name, np.concatenate([part[letter] for letter in "qkv"])) for name, part in parts.items())


def llama3_factors(config: Any) -> np.ndarray:
    """What each frequency is divided by, as the converter works it out."""
    rope = config.rope_parameters
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    wavelengths = 2 * torch.pi * rope["rope_theta"] ** (channels / config.head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return (1 / ((1 - smooth) / factor + smooth).clamp(1 / factor, 1)).numpy()


def describe(writer: gguf.GGUFWriter, config: Any, case: Case) -> None:
    """The header's values for the architecture."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if case.architecture == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if case.architecture != "chatglm":
        writer.add_key_length(size)
        writer.add_value_length(size)
    if case.architecture == "gemma3":
        if getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if "sliding_attention" in config.layer_types:
            writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn") and not case.extra:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32.0))
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Letters, and one merge."""
    alphabet = sorted(bytes_to_unicode().values())[: size - 3]
    tokens = [*alphabet, "ab", "<s>", "</s>", *(f"[PAD{number}]" for number in range(size))][:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = {"<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))


@dataclass
class Case:
    """A model of transformers' class and how it is written.

    Attributes:
        extra: values of the header, beyond the usual ones.
        fused: q, k and v in one tensor.
        sections: rotary halves, not neighbours, with the key that says so (GLM-4's vision models).
        transformers_reads: whether transformers' own GGUF reader understands this file.
    """

    architecture: str
    model: type
    config: Callable[[], Any]
    extra: dict[str, Any] = field(default_factory=dict)
    fused: bool = False
    sections: bool = False
    transformers_reads: bool = False

    def write(self, model: nn.Module, path: Path) -> None:
        writer = gguf.GGUFWriter(path, self.architecture)
        describe(writer, model.config, self)
        add_tokenizer(writer, model.config.vocab_size)
        for key, value in self.extra.items():
            kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
            kinds[type(value)](f"{self.architecture}.{key}", value)
        if self.sections:
            writer.add_rope_dimension_sections([2, 1, 1, 0])
        tensors = converted(model, self)
        for name, values in fused(tensors) if self.fused else tensors:
            writer.add_tensor(name, values)
        if getattr(model.config, "rope_parameters", {}).get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(model.config))
        finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gemma3(**different: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 3000.0}
    usual = {
        "num_hidden_layers": 7,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "rope_parameters": {"sliding_attention": rope, "full_attention": rope | {"rope_theta": 1e5}},
    }
    return T.Gemma3TextConfig(**ODD | usual | different)


def published_gemma3() -> Any:
    """With what transformers' reader takes from its class's defaults instead of the file."""
    config = gemma3(head_dim=256, query_pre_attn_scalar=256)
    for kind, base in (("sliding_attention", 10000.0), ("full_attention", 1e6)):
        config.rope_parameters[kind] = {"rope_type": "default", "rope_theta": base}
    return config


def scaled_gemma3() -> Any:
    config = gemma3(final_logit_softcapping=20.0)
    config.rope_parameters["full_attention"] = LINEAR
    return config


FEW = ["sliding_attention", "full_attention", *["sliding_attention"] * 2, *["full_attention"] * 3]
GPT2 = {"vocab_size": 160, "n_embd": 48, "n_layer": 3, "n_head": 6, "bos_token_id": None, "eos_token_id": None}
GLM_ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
CASES = {
    "llama": Case("llama", T.LlamaForCausalLM, lambda: T.LlamaConfig(**ODD), transformers_reads=True),
    "llama, tied, biases": Case(
        "llama",
        T.LlamaForCausalLM,
        lambda: T.LlamaConfig(**ODD, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "llama, wide heads": Case("llama", T.LlamaForCausalLM, lambda: T.LlamaConfig(**ODD, head_dim=16)),
    "llama, fused qkv": Case("llama", T.LlamaForCausalLM, lambda: T.LlamaConfig(**ODD), fused=True),
    "llama, rope factors": Case("llama", T.LlamaForCausalLM, lambda: T.LlamaConfig(**ODD, rope_parameters=LLAMA3)),
    "llama, linear rope": Case("llama", T.LlamaForCausalLM, lambda: T.LlamaConfig(**ODD, rope_parameters=LINEAR)),
    "llama, linear rope, old key": Case(
        "llama",
        T.LlamaForCausalLM,
        lambda: T.LlamaConfig(**ODD, rope_parameters=LINEAR),
        extra={"rope.scale_linear": 4.0},
    ),
    "llama, yarn": Case("llama", T.LlamaForCausalLM, lambda: T.LlamaConfig(**ODD, rope_parameters=YARN)),
    "llama, yarn, its own ramp": Case(
        "llama",
        T.LlamaForCausalLM,
        lambda: T.LlamaConfig(**ODD, rope_parameters=YARN | {"beta_fast": 4.0, "attention_factor": 0.7}),
    ),
    "qwen2": Case("qwen2", T.Qwen2ForCausalLM, lambda: T.Qwen2Config(**ODD), transformers_reads=True),
    "qwen2, tied, yarn": Case(
        "qwen2", T.Qwen2ForCausalLM, lambda: T.Qwen2Config(**ODD, tie_word_embeddings=True, rope_parameters=YARN)
    ),
    "qwen3": Case("qwen3", T.Qwen3ForCausalLM, lambda: T.Qwen3Config(**ODD, head_dim=128), transformers_reads=True),
    "qwen3, tied, small heads": Case(
        "qwen3", T.Qwen3ForCausalLM, lambda: T.Qwen3Config(**ODD, head_dim=16, tie_word_embeddings=True)
    ),
    "gemma3": Case("gemma3", T.Gemma3ForCausalLM, published_gemma3, transformers_reads=True),
    "gemma3, small heads": Case("gemma3", T.Gemma3ForCausalLM, gemma3),
    "gemma3, linear rope, soft cap": Case("gemma3", T.Gemma3ForCausalLM, scaled_gemma3),
    "gemma3, windows listed": Case(
        "gemma3",
        T.Gemma3ForCausalLM,
        lambda: gemma3(layer_types=FEW),
        extra={"attention.sliding_window_pattern": [kind == "sliding_attention" for kind in FEW]},
    ),
    "gemma3, no windows": Case("gemma3", T.Gemma3ForCausalLM, lambda: gemma3(layer_types=["full_attention"] * 7)),
    "gpt2": Case(
        "gpt2",
        T.GPT2LMHeadModel,
        lambda: T.GPT2Config(**GPT2, layer_norm_epsilon=1e-3),
        transformers_reads=True,
    ),
    "chatglm": Case("chatglm", T.GlmForCausalLM, lambda: T.GlmConfig(**ODD, head_dim=8, rope_parameters=GLM_ROPE)),
    "chatglm, fused qkv": Case(
        "chatglm", T.GlmForCausalLM, lambda: T.GlmConfig(**ODD, head_dim=8, rope_parameters=GLM_ROPE), fused=True
    ),
    "glm4": Case("glm4", T.Glm4ForCausalLM, lambda: T.Glm4Config(**ODD, head_dim=16, rope_parameters=GLM_ROPE)),
    "glm4, of a vision model": Case(
        "glm4",
        T.Glm4ForCausalLM,
        lambda: T.Glm4Config(**ODD, head_dim=16, attention_bias=True, rope_parameters=GLM_ROPE),
        sections=True,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """The original model, the case, and its file."""
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = case.model(case.config()).eval()
    randomise(model)
    model.config._attn_implementation = "eager"
    case.write(model, path)
    return request.param, case, model, path


@torch.inference_mode()
def test_equal_to_the_original_model(written, report):
    name, case, model, path = written
    decoder = load_model(path, dtype="float32", device="cpu")
    ours = [decoder(torch.tensor([prompt]))[0] for prompt in PROMPTS]
    references = {"original": model}
    if case.transformers_reads:
        theirs = T.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        references["transformers' reader"] = theirs.eval()
    store = ContiguousCache.for_decoder(decoder, len(PROMPTS), 64)
    steps = list(generate(decoder, PROMPTS, store, max_tokens=20))
    for which, reference in references.items():
        expected = reference_logits(reference, PROMPTS)
        difference = max(float((o - e).abs().max()) for o, e in zip(ours, expected, strict=True))
        assert difference < 1e-4, which
        compared = TokenComparison()
        for row, prompt in enumerate(PROMPTS):
            compared.add([step[row] for step in steps], *reference_greedy(reference, prompt, 20))
        line = f"{name + ' / ' + which:54} {difference:.1e}  {compared}"
        report("GGUF against transformers (largest logit difference, tokens)", line)


def test_llama_cpps_attention_factor_multiplies_yarns(tmp_path):
    case = CASES["llama, yarn"]
    case = replace(
        case, extra={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5}
    )
    case.write(case.model(case.config()), tmp_path / "model.gguf")
    _, config = gguf_config(tmp_path / "model.gguf")
    scaling = config.layers[0].rotary.scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(0.5 * yarn_mscale(4.0))


# Every type of tensor.


def tiny_llama(folder: Path, tensors: dict[str, Any] | None = None, **header: Any) -> Path:
    """One layer, 256 wide (a row of every block size).

    Args:
        tensors: name → (values, type), in place of its own; values of None leave one out.
        header: further values, ``__`` for a dot.
    """
    wide = {"vocab_size": 48, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config = T.LlamaConfig(**SMALL | wide | {"num_attention_heads": 8})
    case = Case("llama", T.LlamaForCausalLM, lambda: config)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, header.pop("architecture", "llama"))
    describe(writer, config, case)
    add_tokenizer(writer, config.vocab_size)
    for key, value in header.items():
        writer.add_uint32(key.replace("__", "."), value)
    torch.manual_seed(0)
    own = {name: (values, TYPES.F32) for name, values in converted(T.LlamaForCausalLM(config), case)}
    for name, (values, kind) in (own | (tensors or {})).items():
        if values is not None:
            writer.add_tensor(name, values, raw_dtype=kind)
    finish(writer)
    return path


def stored(kind: TYPES) -> np.ndarray:
    """A [256, 256] matrix of that type: quantised, or, where the library cannot do that, any bytes at all."""
    values = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        return np.random.default_rng(kind).integers(0, 256, shape, dtype=np.uint8)


def bits(values: Tensor | np.ndarray) -> bytes:
    return torch.as_tensor(values).detach().float().numpy().tobytes()


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # any bytes may spell infinities
def test_every_type_is_dequantised_as_the_library_does(kind, tmp_path):
    data = stored(kind)
    names = ("blk.0.ffn_down.weight", "blk.0.attn_output.weight")
    path = tiny_llama(tmp_path, dict.fromkeys(names, (data, kind)))
    expected = gguf.dequantize(data.view(np.uint8) if kind in (TYPES.F32, TYPES.F16) else data, kind)
    found = {name: torch.cat(list(tensor.blocks())) for name, tensor in iterate_gguf(path)}
    for name in names:
        assert found[name].shape == (256, 256)
        assert bits(found[name]) == bits(expected)
    layer = load_model(path, dtype="float32", device="cpu").layers[0]
    assert bits(layer.feed_forward.down.weight) == bits(layer.attention.out.weight) == bits(expected)


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(READABLE)), ids=lambda kind: kind.name)
def test_other_types_are_refused_by_name(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((256, 256 // block * size), dtype=np.uint8)
    path = tiny_llama(tmp_path, {"blk.0.ffn_down.weight": (data, kind)})
    with pytest.raises(CheckpointError, match=rf"blk\.0\.ffn_down\.weight is of type {kind.name}"):
        load_model(path, device="cpu")


# What is wrong with a file.


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("gguf"))


def places(path: Path) -> dict[str, int]:
    """Where a file can be cut."""
    reader = gguf.GGUFReader(path)
    tokens, first = reader.fields["tokenizer.ggml.tokens"].offset, reader.tensors[0]
    return {
        "nothing at all": 0,
        "the magic number": 3,
        "the counts": 20,
        "the first key": 30,
        "the tokens": tokens + 200,
        "the tensors' names": first.field.offset + 9,
        "the first tensor": reader.data_offset + 100,
        "the last byte": path.stat().st_size - 1,
    }


CUTS = ("nothing at all", "the magic number", "the counts", "the first key", "the tokens", "the tensors' names")


@pytest.mark.parametrize("part", [*CUTS, "the first tensor", "the last byte"])
def test_cut_files(part, small_file, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(small_file.read_bytes()[: places(small_file)[part]])
    for read in (load_model, get_tokenizer):
        with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read; truncated, or not GGUF: "):
            read(path)


def test_the_header_is_read_as_the_library_reads_it(small_file):
    ours, theirs = open_gguf(small_file), gguf.GGUFReader(small_file)
    assert list(ours.fields) == list(theirs.fields)
    for name, expected in theirs.fields.items():
        assert (ours.fields[name].contents(), ours.fields[name].types) == (expected.contents(), expected.types)
    tokens = ours.fields["tokenizer.ggml.tokens"]
    assert tokens.contents(3) == tokens.contents()[3] == tokens.contents(slice(3, 4))[0]


def test_a_text_that_is_none_is_said_when_it_is_asked_for(small_file, tmp_path):
    field, content = gguf.GGUFReader(small_file).fields["tokenizer.ggml.tokens"], bytearray(small_file.read_bytes())
    content[content.index(max(field.contents(), key=len).encode(), field.offset)] = 0xFF
    path = tmp_path / "text.gguf"
    path.write_bytes(content)
    load_model(path)
    with pytest.raises(CheckpointError, match=r"header's tokenizer\.ggml\.tokens cannot be read"):
        get_tokenizer(path)


def test_not_gguf(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>404</html>" * 100)
    with pytest.raises(CheckpointError, match=r"page\.gguf cannot be read; truncated, or not GGUF: .*magic"):
        load_model(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(tmp_path / "nowhere.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path / "folder.gguf")


def test_other_byte_order(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match="other byte order"):
        load_model(tmp_path / "big.gguf")


ABSENT = (None, TYPES.F32)
ROWS = (np.ones((8, 256), dtype=np.float32), TYPES.F32)


@pytest.mark.parametrize(
    ("tensors", "header", "error", "sentence"),
    [
        ({}, {"architecture": "mamba"}, UnsupportedModelError, r"architecture not known: mamba; minillm reads gpt2, "),
        ({}, {"llama__expert_count": 8}, ConfigError, r"mixture of experts, which minillm does not run"),
        ({}, {"split__count": 3}, CheckpointError, r"one part of a split file: merge the parts first"),
        ({"token_embd.weight": ABSENT}, {}, CheckpointError, r"has no tensor token_embd\.weight"),
        ({"blk.0.attn_q.weight": ABSENT}, {}, CheckpointError, r"lacks the tensors blk\.0\.attn_q\.weight: damaged"),
        ({"blk.0.ffn_norm.weight": ABSENT}, {}, CheckpointError, r"lacks the tensors blk\.0\.ffn_norm\.weight"),
        ({"blk.7.wonder.weight": ROWS}, {}, CheckpointError, r"unexpected blk\.7\.wonder\.weight"),
        ({"output_norm.weight": ROWS}, {}, CheckpointError, r"shape \[8, 256\]; its config says \[256\]"),
        ({"blk.0.attn_k.weight": ROWS}, {}, CheckpointError, r"shape \[8, 256\]; its config says \[64, 256\]"),
        ({}, {"llama__block_count": 2}, CheckpointError, r"lacks the tensors .*blk\.1\.attn_norm\.weight"),
        (
            {},
            {"llama__block_count": 2**31},
            CheckpointError,
            r"announces 2147483648 layers, the file holds \d+ tensors",
        ),
        (
            {},
            {"llama__feed_forward_length": 2**31},
            CheckpointError,
            r"describes a model of [\d,]+ parameters and holds",
        ),
        ({}, {"llama__attention__head_count": 0}, ConfigError, r"attention\.head_count=0; a number from 1"),
        ({"rope_freqs.weight": ROWS}, {}, CheckpointError, r"holds 2048 factors for 16 pairs of channels"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicated key:UserWarning")
def test_what_is_wrong_is_said(tensors, header, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence):
        load_model(tiny_llama(tmp_path, tensors, **header), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, r"tokenizer model None is not implemented; these are: gpt2, llama"),
        ({"model": "t5"}, r"tokenizer model 't5' is not implemented"),
        ({"model": "gpt2"}, r"no tokenizer\.ggml\.tokens"),
        (
            {"model": "gpt2", "pre": "jais", "tokens": ["a"], "merges": ["a a"]},
            r"pre-tokenizer 'jais' is not implemented",
        ),
    ],
)
def test_tokenizers_that_cannot_be_read(change, sentence, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in change.items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(f"tokenizer.ggml.{key}", value)
    finish(writer)
    with pytest.raises(TokenizerError, match=sentence):
        get_tokenizer(tmp_path / "model.gguf")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 4))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_header_is_a_typed_error_or_none(small_file, tmp_path_factory, changes, cut):
    data = bytearray(small_file.read_bytes())
    header = gguf.GGUFReader(small_file).data_offset
    for place, value in changes:
        data[place % header] = value
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(data[: changes[0][0] % header] if cut == 0 else data)
    for read in (lambda: load_model(path, dtype="float32", device="cpu"), lambda: get_tokenizer(path)):
        try:
            read()
        except MinillmError as error:
            assert len(str(error)) > 20  # noqa: PT017
