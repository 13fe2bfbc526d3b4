"""The encoder/decoder against torch.nn.Transformer and MarianMT; padding, dropout, gradients, errors."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MarianConfig, MarianMTModel

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import ConfigError, InvalidRequestError
from minillm.transformer.blocks import ResidualNorm
from minillm.transformer.kv import CachedConfig, NoCache, PaddedBatch, ReorderableStore
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig, cross_attention_weights

CONFIG = Seq2SeqConfig(40, 24, 3, 48, 2, 3, 64)
SOURCES = [[5, 17, 3, 9, 21, 7, 7, 30], [12, 9, 1], [33, 4, 8, 15, 16, 23]]
TARGETS = [[0, 4, 8, 15], [0, 16], [0, 23, 31, 11, 2, 39]]
PLACEMENTS = pytest.mark.parametrize("placement", ["post", "pre"])


def padded(rows, fill=0):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def lengths(rows):
    return [len(row) for row in rows]


def scatter(model: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Random weights with no norm and no bias at its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "embed_positions" not in name:
                noise = std * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def small_model(placement="post", **changes) -> Seq2Seq:
    model = Seq2Seq(replace(CONFIG, norm_placement=placement, **changes)).eval()
    scatter(model)
    return model


def torch_twin(ours: Seq2Seq) -> nn.Transformer:
    """torch's own encoder/decoder with our weights."""
    config = ours.config
    pre = config.norm_placement == "pre"
    theirs = nn.Transformer(
        config.hidden_size,
        config.num_heads,
        config.num_encoder_layers,
        config.num_decoder_layers,
        config.intermediate_size,
        config.dropout,
        batch_first=True,
        norm_first=pre,
    ).eval()
    if pre:
        theirs.encoder.norm.load_state_dict(ours.encoder_norm.state_dict())
        theirs.decoder.norm.load_state_dict(ours.decoder_norm.state_dict())
    else:
        theirs.encoder.norm = theirs.decoder.norm = None
    for our, their in [*zip(ours.encoder, theirs.encoder.layers), *zip(ours.decoder, theirs.decoder.layers)]:  # noqa: B905
        pairs = {
            "self_attn.in_proj_": our.attention.qkv,
            "self_attn.out_proj.": our.attention.out,
            "linear1.": our.feed_forward.up,
            "linear2.": our.feed_forward.down,
            "norm1.": our.attention_norm.norm,
            f"norm{2 if our in set(ours.encoder) else 3}.": our.feed_forward_norm.norm,
        }
        state = {prefix + key: value for prefix, part in pairs.items() for key, value in part.state_dict().items()}
        if our in set(ours.decoder):
            cross = our.cross_attention
            for key in ("weight", "bias"):
                q_kv = getattr(cross.q, key), getattr(cross.kv, key)
                state[f"multihead_attn.in_proj_{key}"] = torch.cat(q_kv)
                state[f"multihead_attn.out_proj.{key}"] = getattr(cross.out, key)
                state[f"norm2.{key}"] = getattr(our.cross_attention_norm.norm, key)
        their.load_state_dict(state)
    return theirs


def small_marian(seed: int = 0) -> MarianMTModel:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in {"layers": 2, "ffn_dim": 48}.items()}
    config = MarianConfig(
        vocab_size=40,
        d_model=24,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        max_position_embeddings=64,
        activation_function="relu",
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        pad_token_id=39,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        **sizes,
    )
    theirs = MarianMTModel(config).eval()
    scatter(theirs, seed)
    theirs.generation_config.forced_eos_token_id = theirs.generation_config.bad_words_ids = None
    return theirs


def marian_twin(theirs: MarianMTModel) -> Seq2Seq:
    """Our model with MarianMT's weights.

    Marian's position vectors hold all sines first, then the cosines; ours alternate (Vaswani et al. 2017, §3.5). The
    same model comes out when the hidden channels of every weight are put into our order.
    """
    ours = Seq2Seq(Seq2SeqConfig(40, 24, 3, 48, 2, 2, 64)).eval()
    order = torch.arange(24).view(2, 12).T.flatten()  # ours 2i and 2i + 1 are theirs i and 12 + i

    def columns(name):
        return torch.cat([theirs.state_dict()[f"{part}.weight"] for part in name])[:, order]

    def biases(name):
        return torch.cat([theirs.state_dict()[f"{part}.bias"] for part in name])

    state = {"embedding.weight": theirs.model.shared.weight[:, order]}

    def reads_hidden(our, *names):
        state[f"{our}.weight"], state[f"{our}.bias"] = columns(names), biases(names)

    def writes_hidden(our, name):
        weight, bias = (theirs.state_dict()[f"{name}.{key}"] for key in ("weight", "bias"))
        state[f"{our}.weight"], state[f"{our}.bias"] = weight[order], bias[order]

    for side in ("encoder", "decoder"):
        for layer in range(2):
            our, their = f"{side}.{layer}", f"model.{side}.layers.{layer}"
            reads_hidden(f"{our}.attention.qkv", *(f"{their}.self_attn.{part}_proj" for part in "qkv"))
            writes_hidden(f"{our}.attention.out", f"{their}.self_attn.out_proj")
            writes_hidden(f"{our}.attention_norm.norm", f"{their}.self_attn_layer_norm")
            reads_hidden(f"{our}.feed_forward.up", f"{their}.fc1")
            writes_hidden(f"{our}.feed_forward.down", f"{their}.fc2")
            writes_hidden(f"{our}.feed_forward_norm.norm", f"{their}.final_layer_norm")
            if side == "decoder":
                reads_hidden(f"{our}.cross_attention.q", f"{their}.encoder_attn.q_proj")
                reads_hidden(f"{our}.cross_attention.kv", *(f"{their}.encoder_attn.{part}_proj" for part in "kv"))
                writes_hidden(f"{our}.cross_attention.out", f"{their}.encoder_attn.out_proj")
                writes_hidden(f"{our}.cross_attention_norm.norm", f"{their}.encoder_attn_layer_norm")
    ours.load_state_dict(state)
    return ours


@PLACEMENTS
def test_equals_torch_transformer(placement, report):
    ours = small_model(placement)
    theirs = torch_twin(ours)
    source, target = padded(SOURCES), padded(TARGETS)
    hides = ~PaddedBatch((0, 0, 0), tuple(lengths(SOURCES))).is_real()
    embedded = [ours.embed(tokens, torch.arange(tokens.shape[1])[None]) for tokens in (source, target)]
    expected = theirs(
        *embedded,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
        src_key_padding_mask=hides,
        memory_key_padding_mask=hides,
        tgt_is_causal=True,
    )
    logits = ours(source, target, lengths(SOURCES))
    difference = float((logits - ours.logits(expected)).detach().abs().max())
    kv = NoCache(ours.config.attention_specs)
    kv.begin(PaddedBatch.full(*target.shape))
    hidden = ours.hidden(target, torch.arange(target.shape[1])[None], kv, ours.encode(source, lengths(SOURCES)))
    assert (hidden - expected).abs().max() < 1e-5
    report("seq2seq: largest logit difference", f"torch.nn.Transformer, {placement}-norm {difference:.1e}")
    assert difference < 1e-4
    expected.square().sum().backward()
    hidden.square().sum().backward()
    pairs = [(ours.encoder[0].attention.qkv.weight.grad, theirs.encoder.layers[0].self_attn.in_proj_weight.grad)]
    pairs.append(
        (ours.decoder[1].cross_attention.out.bias.grad, theirs.decoder.layers[1].multihead_attn.out_proj.bias.grad)
    )
    for our, their in pairs:
        torch.testing.assert_close(our, their, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_equals_marian(report):
    theirs = small_marian()
    ours = marian_twin(theirs)
    source = padded(SOURCES)
    mask = PaddedBatch((0, 0, 0), tuple(lengths(SOURCES))).is_real().long()
    expected = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=padded(TARGETS)).logits
    difference = float((ours(source, padded(TARGETS), lengths(SOURCES)) - expected).abs().max())
    report("seq2seq: largest logit difference", f"MarianMT {difference:.1e}")
    assert difference < 1e-4
    assert expected.std() > 0.5


@PLACEMENTS
@torch.inference_mode()
def test_cached_steps_equal_the_whole(placement, report):
    model = small_model(placement)
    target = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    whole = model(padded(SOURCES), target, lengths(SOURCES))
    cache = ContiguousCache.for_decoder(model, 3, 12)
    memory = model.encode(padded(SOURCES), lengths(SOURCES))
    differences = []
    for start, end in [(0, 3), *((at, at + 1) for at in range(3, 12))]:
        batch = PaddedBatch.full(3, end - start, start)
        cache.begin(batch)
        step = model.logits(model.hidden(target[:, start:end], batch.positions(), cache, memory))
        differences.append(float((step - whole[:, start:end]).abs().max()))
    report("seq2seq: largest logit difference", f"cached and not, {placement}-norm {max(differences):.1e}")
    assert max(differences) < 1e-5
    assert cache.num_bytes == 3 * 12 * model.config.kv_bytes_per_token(torch.float32)


@PLACEMENTS
@pytest.mark.parametrize("fill", [0, 7, 39])
@torch.inference_mode()
def test_padding_is_never_seen(placement, fill):
    model = small_model(placement)
    together = model(padded(SOURCES, fill), padded(TARGETS, fill), lengths(SOURCES))
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone = model(torch.tensor([source]), torch.tensor([target]))[0]
        torch.testing.assert_close(together[row, : len(target)], alone, atol=1e-5, rtol=1e-5)


@PLACEMENTS
@pytest.mark.parametrize("autocast", [False, True])
def test_it_learns(placement, autocast):
    """Some steps on a ragged batch bring its loss down: gradients reach every parameter, in bfloat16 too."""
    torch.manual_seed(0)
    model = Seq2Seq(replace(CONFIG, norm_placement=placement, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = padded(TARGETS, -100)[:, 1:]
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(padded(SOURCES), padded(TARGETS)[:, :-1], lengths(SOURCES))
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 6
    assert losses[-1] < 0.1


def test_the_base_model_has_the_papers_size():
    with torch.device("meta"):
        model = Seq2Seq(Seq2SeqConfig.base())
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_082_496
    with torch.device("meta"):
        without = Seq2Seq(replace(Seq2SeqConfig.base(), attention_bias=False))
    assert not any("attention." in name and name.endswith("bias") for name, _ in without.named_parameters())


def test_fresh_weights():
    """Packed projections are drawn as the square matrices they hold; embeddings come out of the scaling at about 1."""
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(2000, 64, 4, 256, 1, 1))
    limit = (6 / 128) ** 0.5
    for weight in (model.encoder[0].attention.qkv.weight, model.decoder[0].cross_attention.kv.weight):
        assert 0.98 * limit < weight.abs().max() <= limit
    x = model.embedding(torch.arange(2000)) * 8
    assert x.std().item() == pytest.approx(1, abs=0.02)
    built = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scatter(model)
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 1 or torch.equal(parameter, built[name])


@PLACEMENTS
def test_dropout_falls_on_sublayers_in_training_only(placement):
    torch.manual_seed(0)
    residual = ResidualNorm(placement, nn.Identity, dropout=0.25)
    x = torch.zeros(200, 100)
    out = residual(x, lambda x: x + 1)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(residual.eval()(x, lambda x: x + 1), x + 1)


@PLACEMENTS
def test_dropout_makes_training_random_and_nothing_else(placement):
    torch.manual_seed(0)
    pair = padded(SOURCES), padded(TARGETS)
    model = small_model(placement, dropout=0.3)
    assert torch.equal(model(*pair), model(*pair))
    assert not torch.allclose(model.train()(*pair), model(*pair))
    share = (model.embed(pair[0], torch.arange(8)[None]) == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.06)
    steady = small_model(placement, dropout=0.0)
    torch.testing.assert_close(steady.train()(*pair), model.eval()(*pair))


@PLACEMENTS
def test_cross_attention_weights_are_torchs(placement):
    ours = small_model(placement)
    weights = cross_attention_weights(ours, SOURCES[0], TARGETS[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3, 4))
    theirs, seen = torch_twin(ours), []

    def look(attention, inputs, kwargs):
        seen.append(nn.MultiheadAttention.forward(attention, *inputs, average_attn_weights=False)[1])

    for layer in theirs.decoder.layers:
        layer.multihead_attn.register_forward_pre_hook(look, with_kwargs=True)
    embedded = [ours.embed(torch.tensor([row]), torch.arange(len(row))[None]) for row in (SOURCES[0], TARGETS[0])]
    theirs(*embedded, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4))
    torch.testing.assert_close(weights, torch.cat(seen), atol=1e-5, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in ours.cross_attentions)
    with pytest.raises(InvalidRequestError, match=r"model\.eval\(\)"):
        cross_attention_weights(ours.train(), SOURCES[0], TARGETS[0])


def test_memory_rows_are_selected():
    model = small_model()
    memory = model.encode(padded(SOURCES), lengths(SOURCES)).select(torch.tensor([2, 2, 0]))
    expected = model.encode(padded([SOURCES[2], SOURCES[2], SOURCES[0]]), lengths([SOURCES[2], SOURCES[2], SOURCES[0]]))
    for ours, theirs in zip((*memory.keys, *memory.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(memory.mask, expected.mask)
    assert model.encode(padded(SOURCES)).select(torch.tensor([1])).mask is None


def test_what_the_stores_ask_for():
    model = small_model()
    assert isinstance(model.config, CachedConfig)
    assert isinstance(ContiguousCache.for_decoder(model, 2, 8), ReorderableStore)
    assert isinstance(NoCache(model.config.attention_specs), ReorderableStore)
    assert ContiguousCache.for_decoder(model).max_len == 64
    with pytest.raises(InvalidRequestError, match="each of the 2 rows"):
        ContiguousCache.for_decoder(model, 2, 8).reorder(torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_decoder_layers": 0}, "num_decoder_layers must be a whole number of at least 1"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"activation": "sigmoid"}, "'sigmoid' is not one of"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)


def test_other_norm_placements_are_refused():
    config = replace(CONFIG)
    object.__setattr__(config, "norm_placement", "sandwich")  # the tests' type checker would refuse it before we do
    with pytest.raises(ConfigError, match="must be 'post' or 'pre', not 'sandwich'"):
        config.__post_init__()


def test_calls_that_cannot_work_are_refused():
    model = small_model()
    source, target = padded(SOURCES), padded(TARGETS)
    for wrong in ([8, 3], [8, 3, 0], [7, 3, 6], [9, 3, 6]):
        with pytest.raises(InvalidRequestError, match="3 sources padded to 8 tokens need 3 lengths"):
            model.encode(source, wrong)
    with pytest.raises(InvalidRequestError, match="2 sources need as many targets, not 3"):
        inspect.unwrap(Seq2Seq.forward)(model, source[:2], target)  # without the tests' check of shapes
    with pytest.raises(InvalidRequestError, match="target must be"):
        model(source, target[:, :0])
    with pytest.raises(InvalidRequestError, match="source has 65 tokens, the model takes 64"):
        model.encode(torch.zeros(1, 65, dtype=torch.long))
