"""The stores record and silence what the model does; figures of attention draw these numbers."""

from __future__ import annotations

import html
import re

import matplotlib.pyplot as plt
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from minillm.errors import InvalidRequestError
from minillm.models.source import resolve
from minillm.models.tokenizer import get_tokenizer
from minillm.transformer.attention import attention_mask
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.kv import KVStore, NoCache, PaddedBatch
from minillm.transformer.positions import RotaryConfig
from minillm.viz import (
    RecordingStore,
    SilencingStore,
    attention_maps,
    best_head,
    explore_attention,
    next_token_probabilities,
    plot_cost,
    plot_groups,
    plot_head,
    plot_head_scores,
    plot_heads,
    plot_look_back,
    plot_lookup,
    plot_masks,
    plot_scale,
    token_names,
)

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Grouped heads, a soft cap, and a sliding window in the first of two layers."""
    torch.manual_seed(0)
    rotary = RotaryConfig(4)
    config = DecoderConfig(
        vocab_size=1536,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_position_embeddings=64,
        layers=(LayerConfig(3, rotary), LayerConfig(None, rotary)),
        attention_soft_cap=5.0,
    )
    model = Decoder(config).eval()
    model.reset_parameters(std=0.7)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return get_tokenizer("tiny")


def weights_by_formula(q, k, spec):
    """softmax(cap·tanh(q·k·scale / cap)) with k repeated; q and k are [seq, heads, head_dim]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    steps = torch.arange(len(q))
    mask = attention_mask(steps, steps, window=spec.window)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


class Spy(NoCache):
    """Keeps what the model handed over."""

    def __init__(self, specs):
        super().__init__(specs)
        self.seen = {}

    def attend(self, layer, q, k, v):
        self.seen[layer] = q, k, v
        return super().attend(layer, q, k, v)


@pytest.mark.parametrize("length", [1, 4, 11])
@torch.inference_mode()
def test_maps_are_the_weights_of_every_head(model, length):
    tokens = torch.randint(0, 1536, (length,)).tolist()
    maps = attention_maps(model, tokens)
    assert maps.shape == (2, 4, length, length)
    spy = Spy(model.config.attention_specs)
    spy.begin(PaddedBatch.full(1, length))
    model(torch.tensor([tokens]), torch.arange(length)[None], spy)
    for layer, (q, k, _) in spy.seen.items():
        expected = weights_by_formula(q[0], k[0], model.config.attention_specs[layer])
        torch.testing.assert_close(maps[layer], expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_recording_changes_nothing_and_accounts_for_the_outputs(model):
    tokens = torch.randint(0, 1536, (2, 9))
    batch = PaddedBatch((0, 0), (9, 6))
    store = RecordingStore(model.config.attention_specs)
    assert isinstance(store, KVStore)
    store.begin(batch)
    plain = NoCache(model.config.attention_specs)
    plain.begin(batch)
    logits = model(tokens, batch.positions(), store)
    torch.testing.assert_close(logits, model(tokens, batch.positions(), plain))
    for layer in range(2):
        values = store.values[layer].repeat_interleave(2, dim=1)
        torch.testing.assert_close(store.weights[layer] @ values, store.outputs[layer], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_silenced_head_is_a_strip_of_zeros_in_the_output_projection(model):
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    silenced = next_token_probabilities(model, rows, [(1, 2)])
    whole = next_token_probabilities(model, rows)
    for row, probabilities in zip(rows, whole, strict=True):
        torch.testing.assert_close(model(torch.tensor([row]))[0, -1].softmax(dim=-1), probabilities)
    out = model.layers[1].attention.out.weight
    kept = out.clone()
    out[:, 8:12] = 0
    try:
        torch.testing.assert_close(silenced, next_token_probabilities(model, rows))
    finally:
        out.copy_(kept)
    assert (silenced - whole).abs().max() > 1e-4


def test_a_silencing_store_is_a_store_and_remembers_as_its_inner_one_does(model):
    store = SilencingStore(NoCache(model.config.attention_specs), [])
    assert isinstance(store, KVStore)
    assert not store.remembers


def test_the_explorer_follows_its_controls(model, tokenizer):
    explorer = explore_attention(model, "Mia had a red kite.", tokenizer=tokenizer)
    (field, layer, head), line, image = explorer.controls, explorer.line, explorer.image
    before = bytes(image.value)
    assert before.startswith(PNG)
    for control, value in ((layer, 1), (head, 3), (field, "Tom lost a ball.")):
        old, shown, said = control.value, image.value, line.value
        control.value = value
        assert bytes(image.value).startswith(PNG)
        assert image.value != shown
        assert line.value != said
        control.value = old
        assert image.value == shown
    field.value = ""
    assert line.value == "Write something to read."
    assert image.value == before
    field.value = "a " * 300
    assert f"The first 48 of {len(tokenizer('a ' * 300).input_ids)} tokens" in line.value
    assert not plt.get_fignums(), "the explorer leaves no figure open"


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(resolve("tiny"), attn_implementation="eager", dtype=torch.float32)


def shades(html: str, looking: int) -> list[float]:
    """What the style sheet says while this token is pointed at; roots of the weights."""
    (rule,) = re.findall(rf":has\(\.q{looking}:hover\){{(.*?)}}", html)
    return [float(shade.split(":")[1]) for shade in rule.split(";")]


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (3, 2), (5, 5)])
def test_pointing_shows_the_weights_of_transformers(reference, tokenizer, layer, head, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "minillm.viz.attention.plot_head", lambda weights, *_, **__: drawn.append(weights) or plt.figure()
    )
    text = "Mia had a red kite. The kite flew away."
    explorer = explore_attention("tiny", text)
    explorer.controls[1].value, explorer.controls[2].value = layer, head
    with torch.inference_mode():
        tokens = torch.tensor([tokenizer(text).input_ids])
        expected = reference(tokens, output_attentions=True).attentions[layer][0, head]
    torch.testing.assert_close(drawn[-1], expected, atol=1e-5, rtol=1e-4)
    for looking, row in enumerate(expected):
        assert shades(explorer.line.value, looking) == pytest.approx(row.sqrt().tolist(), abs=0.0051)
    best = int(expected[6].argmax())
    names = token_names(tokenizer, tokens[0].tolist())
    assert f"{names[6]} looks at: {names[best]} {expected[6, best]:.0%}" in html.unescape(explorer.line.value)


def test_what_cannot_be_explored_is_refused(model, tokenizer):
    with pytest.raises(InvalidRequestError, match="tokenizer="):
        explore_attention(model, "Mia")
    with pytest.raises(InvalidRequestError, match=r"layer: 2 is not in 0 … 1"):
        explore_attention(model, "Mia", tokenizer=tokenizer, layer=2)
    with pytest.raises(InvalidRequestError, match="something"):
        explore_attention(model, "", tokenizer=tokenizer)


def test_a_text_cannot_write_into_the_page(model, tokenizer):
    explorer = explore_attention(model, "<script>alert('$')</script>", tokenizer=tokenizer)
    spans = explorer.line.value.split("</style>")[1]
    assert "<script" not in spans
    assert "<script>alert('$')</script>" in html.unescape(re.sub(r"<[^>]*>", "", spans))


def test_names_show_spaces_and_line_ends(tokenizer):
    names = token_names(tokenizer, tokenizer("a kite\ncosts $").input_ids)
    text = "".join(names)
    assert text == r"a␣kite↵costs␣\$"


def test_the_lookup_draws_the_softmax_and_the_mean():
    query, keys = torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    values = torch.tensor([[1.0, 1.0], [0.0, -1.0], [2.0, 0.0]])
    weights = (keys @ query).exp() / (keys @ query).exp().sum()
    left, middle, right = plot_lookup(query, keys, values, ["a", "b", "c"]).axes
    assert [bar.get_height() for bar in middle.patches] == pytest.approx(weights.tolist())
    tips = [text.xy for text in right.texts if text.arrow_patch is not None]
    assert tips[-1] == pytest.approx((weights @ values).tolist())
    assert len(left.texts) == 8


def test_maps_scores_and_masks_are_drawn_as_they_are():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 5, 5).tril()
    panels = plot_heads(maps).axes
    assert torch.allclose(torch.tensor(panels[4].images[0].get_array().data), maps[1, 1].sqrt())
    weights = plot_head(maps[0, 1][2:], list("abcde"), distance=2).axes[0]
    assert (weights.images[0].get_array() == maps[0, 1][2:].numpy()).all()
    assert [label.get_text() for label in weights.get_yticklabels()] == list("cde")
    line = weights.lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2], [2, 4])
    table = torch.tensor([[0.1, 0.72], [0.3, 0.0]])
    assert best_head(table) == (0, 1)
    assert [text.get_text() for text in plot_head_scores({"x": table}).axes[0].texts] == ["10", "72", "30", "0"]
    changes = plot_head_scores({"x": -table}, percent=False).axes[0]
    assert [text.get_text() for text in changes.texts] == ["−10", "−72", "−30", "+0"]
    assert changes.patches[0].get_xy() == (0.5, -0.5), "the largest change is framed"
    mask = torch.tensor([[True, False], [True, True]])
    assert (plot_masks({"m": mask}).axes[0].images[0].get_array() == mask.int().numpy()).all()


def test_a_text_is_shaded_by_the_weights():
    tokens = ["Mia", "␣ran", ".", "↵", "↵", "Tom"]
    row = torch.tensor([0.5, 0.1, 0.1, 0.0, 0.0, 0.3])
    texts = plot_look_back({"head": row}, tokens, marked=[5]).axes[0].texts
    assert [text.get_text() for text in texts] == ["Mia", "ran", ".", "↵", "↵", "Tom"]
    darkness = [1 - text.get_bbox_patch().get_facecolor()[0] for text in texts]
    assert sorted(range(6), key=darkness.__getitem__)[-2:] == [5, 0]
    assert texts[5].get_position() == (0, -1)
    assert texts[5].get_bbox_patch().get_edgecolor() != texts[0].get_bbox_patch().get_edgecolor()


def test_curves_and_groups():
    figure = plot_cost([1, 2, 4], {"p": {"a": [1.0, 2, 4], "b": [3.0, 3, 3]}}, ylabel="y", marks={"p": 3.0})
    assert [list(line.get_ydata()) for line in figure.axes[0].lines[:2]] == [[1, 2, 4], [3, 3, 3]]
    assert figure.axes[0].lines[2].get_xdata()[0] == 3.0
    left, right = plot_scale([4, 16], {"raw": [4.0, 16.0]}, {"raw": [0.3, 0.6]}).axes
    assert list(left.lines[0].get_ydata()) == [4, 16]
    assert list(right.lines[0].get_ydata()) == [0.3, 0.6]
    panel = plot_groups({"GQA": (6, 2)}).axes[0]
    assert [
        line.get_xdata().tolist()[1] if hasattr(line.get_xdata(), "tolist") else line.get_xdata()[1]
        for line in panel.lines
    ] == [1, 1, 1, 4, 4, 4]
