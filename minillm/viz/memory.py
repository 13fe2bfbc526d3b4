"""The memory of generation: what a pass costs in FLOPs and bytes, what keys and values take in published models, what
reservation wastes; its figures and its explorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor, nn

from minillm.errors import InvalidRequestError
from minillm.models.family import Json
from minillm.models.glm4 import GLM4_9B_CHAT
from minillm.models.registry import family_of
from minillm.transformer.decoder import Decoder, DecoderConfig
from minillm.viz.explorer import Explorer, choice, number_slider, slider
from minillm.viz.style import BLUE, COLOURS, GREEN, GREY, LIGHT, LINE_STYLES, MARKERS, ORANGE, RED, SKY

PUBLISHED: Mapping[str, Json] = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "GLM-4-9B": GLM4_9B_CHAT,
}
"""What decides the sizes, from the models' published config.json files."""

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
CARDS: Mapping[str, float] = {"24 GB card": 24e9, "80 GB card": 80e9, "141 GB card": 141e9}
EXPLORED_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@cache
def published_model(name: str) -> Decoder:
    """One of `PUBLISHED` as its family builds it, with shapes but without a byte of weights (torch's meta device).

    Raises:
        InvalidRequestError: for another name.
    """
    if name not in PUBLISHED:
        raise InvalidRequestError(f"{name!r} is not one of {', '.join(PUBLISHED)}")
    config = PUBLISHED[name]
    with torch.device("meta"):
        return Decoder(family_of(config).translate(config))


def matrix_weights(model: Decoder) -> int:
    """Weights that every token is multiplied with: not norms, biases, or an embedding table that is only looked up."""
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return linears + (model.embedding.weight.numel() if model.head is None else 0)


def forward_flops(model: Decoder, new: int, keys: int, batch: int = 1) -> int:
    """FLOPs of the matrix products of one pass: a multiplication and an addition for each pair of numbers.

    Args:
        new: tokens a sequence that are computed; logits are computed for all of them.
        keys: tokens a sequence that they attend to, themselves included; what a mask hides is counted too.
    """
    config = model.config
    weights = 2 * new * matrix_weights(model)
    scores_and_means = 2 * (2 * new * keys * config.head_dim) * config.num_heads * config.num_layers
    return batch * (weights + scores_and_means)


def forward_bytes(model: Decoder, new: int, keys: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """The least that one pass must move from and to memory: the weights once, each sequence's keys and values.

    What the layers hand on to one another is small beside these and is left out.
    """
    kept = (keys + new) * model.config.kv_bytes_per_token(dtype)  # all are read, the new ones are written as well
    return matrix_weights(model) * dtype.itemsize + batch * kept


@dataclass(frozen=True)
class Machine:
    """What a device can do at best.

    Attributes:
        flops: operations a second.
        bandwidth: bytes a second from and to its memory.
    """

    name: str
    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on arithmetic is the limit (Williams et al. 2009: the ridge point)."""
        return self.flops / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """FLOPs a second that work of this intensity can reach (Williams et al. 2009: the roofline)."""
        return min(self.flops, intensity * self.bandwidth)


def plot_work(prompt: int, written: int, *, title: str = "") -> Figure:
    """Which tokens each pass computes, without a store and with one: one row a pass, one column a token."""
    states = ("computed for the first time", "computed again", "only its keys and values are read")
    colours = [BLUE, RED, SKY]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, cached in zip(axes, (False, True), strict=True):
        table = torch.full((written, prompt + written - 1), float("nan"))
        for step in range(written):
            old = 0 if step == 0 else prompt + step - 1
            table[step, :old] = 2 if cached else 1
            table[step, old : prompt + step] = 0
        panel.imshow(table, cmap=ListedColormap(colours), vmin=0, vmax=2, aspect="auto", interpolation="none")
        panel.set_xticks([x - 0.5 for x in range(1, table.shape[1])], minor=True)
        panel.set_yticks([y - 0.5 for y in range(1, written)], minor=True)
        panel.grid(which="minor", color="white", linewidth=1.5)
        panel.tick_params(which="minor", length=0)
        panel.axvline(prompt - 0.5, color="black", linestyle=":")
        panel.set_yticks(range(written), range(1, written + 1))
        computed = int((table < 2).sum())
        panel.set(xlabel="position in the text (dotted line: end of the prompt)")
        panel.set_title(f"{'with' if cached else 'without'} a store: {computed} tokens computed")
    axes[0].set_ylabel("pass (each gives one token)")
    handles = [Patch(facecolor=colour, label=state) for colour, state in zip(colours, states, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


def plot_slots(
    snapshots: Mapping[str, Float[Tensor, "slots head_dim"]], *, used: Sequence[int] = (), title: str = ""
) -> Figure:
    """A store's memory for one head, one row a slot, at several moments; a line below the slots in use."""
    count = len(snapshots)
    figure, axes = plt.subplots(1, count, figsize=(3.1 * count, 4), sharey=True, squeeze=False, layout="constrained")
    largest = max(float(slots.abs().max()) for slots in snapshots.values())
    for number, (panel, (name, slots)) in enumerate(zip(axes[0], snapshots.items(), strict=True)):
        image = panel.imshow(slots, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto", interpolation="none")
        panel.set(title=name, xlabel="channel of the head")
        if number < len(used):
            panel.axhline(used[number] - 0.5, color=GREEN, linewidth=2)
    axes[0, 0].set_ylabel("slot (a token's position)")
    figure.colorbar(image, ax=axes, label="value")
    figure.suptitle(title)
    return figure


def plot_lines(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    scale: Literal["linear", "log"] = "linear",
    levels: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Lines with a marker at each measured or computed point.

    Args:
        scale: of both axes; logarithmic axes are labelled at every x.
        levels: drawn as horizontal lines, named at their right end.
    """
    figure, axes = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    for number, (label, values) in enumerate(curves.items()):
        style, marker = LINE_STYLES[number % len(LINE_STYLES)], MARKERS[number % len(MARKERS)]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, values, style, marker=marker, markersize=5, color=colour, linewidth=2, label=label)
    for label, level in (levels or {}).items():
        axes.axhline(level, color=GREY, linestyle=":")
        axes.annotate(label, (1, level), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", fontsize=9, color="#555555")  # fmt: skip
    if scale == "log":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}") if high < 20 * low else NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(curves) > 1:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_roofline(machines: Sequence[Machine], work: Mapping[str, float], *, title: str = "") -> Figure:
    """Williams et al. 2009, figure 1: what each machine can reach, against FLOPs a byte; `work` is marked on it."""
    count = len(machines)
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 4.2), squeeze=False, layout="constrained")
    lowest = min(0.25, *work.values())
    highest = max(4096.0, *work.values())
    for panel, machine in zip(axes[0], machines, strict=True):
        corners = [lowest, machine.ridge, highest]
        panel.plot(corners, [machine.attainable(x) for x in corners], color="black", linewidth=2)
        panel.axvline(machine.ridge, color=GREY, linestyle=":")
        for number, (label, intensity) in enumerate(work.items()):
            reached = machine.attainable(intensity)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            panel.plot([intensity], [reached], marker, color=colour, markersize=10, label=label, zorder=3)
        panel.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs a byte)")
        panel.set_ylim(machine.attainable(lowest) / 2, 3 * machine.flops)
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{machine.name}: ridge at {machine.ridge:,.0f} FLOPs a byte", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("FLOPs a second, at best")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def own_heads(config: DecoderConfig) -> DecoderConfig:
    """The same model if every query head had a key/value head of its own: grouped queries undone."""
    return replace(config, num_kv_heads=config.num_heads)


def plot_kv_per_token(
    configs: Mapping[str, DecoderConfig], dtype: torch.dtype = torch.bfloat16, *, title: str = ""
) -> Figure:
    """KiB of keys and values a token: as published, and if every query head had its own."""
    figure, axes = plt.subplots(figsize=(8.5, 0.75 * len(configs) + 1.2), layout="constrained")
    kinds = (("as published", BLUE, -0.2), ("one KV head for every query head", ORANGE, 0.2))
    for kind, colour, shift in kinds:
        shown = [own_heads(config) if shift > 0 else config for config in configs.values()]
        sizes = [config.kv_bytes_per_token(dtype) / 2**10 for config in shown]
        bars = axes.barh([y + shift for y in range(len(sizes))], sizes, 0.38, color=colour, label=kind)
        axes.bar_label(bars, [f"{size:,.1f}".removesuffix(".0") for size in sizes], padding=3, fontsize=9)
    names = [f"{name} ({config.num_heads} : {config.num_kv_heads} heads)" for name, config in configs.items()]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=f"keys and values of one token (KiB, {str(dtype).removeprefix('torch.')})", title=title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@dataclass(frozen=True)
class Reservation:
    """Slots of every row of a contiguous store at one moment, each sequence having written `step` tokens or all.

    Attributes:
        prompt, written: slots in use.
        to_come: slots that will be used, later.
        never: slots that will not be used (Kwon et al. 2023, §3.1: internal fragmentation).
    """

    prompt: Int[Tensor, "rows"]
    written: Int[Tensor, "rows"]
    to_come: Int[Tensor, "rows"]
    never: Int[Tensor, "rows"]

    @classmethod
    def at(cls, requests: Sequence[tuple[int, int]], max_len: int, step: int) -> Reservation:
        """Rows of (prompt, output) tokens with `max_len` slots each."""
        prompt, output = torch.tensor(requests).unbind(dim=1)
        written = output.clamp(max=step)
        return cls(prompt, written, output - written, max_len - prompt - output)

    @property
    def utilisation(self) -> float:
        """Share of the reserved slots that hold a token."""
        used, unused = self.prompt + self.written, self.to_come + self.never
        return float(used.sum() / (used + unused).sum())


def plot_reservation(requests: Sequence[tuple[int, int]], max_len: int, step: int, *, title: str = "") -> Figure:
    """One bar a sequence, as long as what is reserved for it."""
    parts = Reservation.at(requests, max_len, step)
    kinds = (
        ("prompt", parts.prompt, BLUE, ""),
        ("written so far", parts.written, GREEN, ""),
        ("still to come", parts.to_come, SKY, "///"),
        ("never needed", parts.never, LIGHT, ""),
    )
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(requests) + 1.7), layout="constrained")
    left = torch.zeros(len(requests), dtype=torch.long)
    for name, size, colour, hatch in kinds:
        axes.barh(range(len(requests)), size, 0.8, left, color=colour, hatch=hatch, edgecolor="white", label=name)
        left = left + size
    axes.set(xlim=(0, max_len), xlabel=f"slot ({max_len:,} reserved for each sequence)", ylabel="sequence", title=title)
    axes.set_yticks(range(len(requests)))
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_kv_memory(
    name: str = "Llama-3-8B", context: int = 8192, batch: int = 16, dtype: str = "bfloat16", *, title: str = ""
) -> Figure:
    """Weights and keys and values of a batch beside the memory of some cards, in GB (10⁹ bytes).

    Args:
        name: one of `PUBLISHED`.
        context: tokens of each sequence.
        batch: sequences.
        dtype: of weights, keys and values; one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise InvalidRequestError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    model, kind = published_model(name), getattr(torch, dtype)
    weights = sum(parameter.numel() for parameter in model.parameters()) * kind.itemsize / 1e9
    one = context * model.config.kv_bytes_per_token(kind) / 1e9
    need = weights + batch * one
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axes.barh([0], [weights], color=BLUE, label="weights")
    axes.barh([0], [batch * one], left=[weights], color=ORANGE, label="keys and values")
    for row, size in enumerate(CARDS.values(), start=1):
        room = size / 1e9
        most = int((room - weights) / one)
        fits = f"fits: room for {most:,} such sequences" if need <= room else f"too small: room for {max(most, 0):,}"
        if room < weights:
            fits = "too small for the weights alone"
        bar = axes.barh([row], [room], color=GREEN if need <= room else LIGHT)
        axes.bar_label(bar, [fits], padding=4, fontsize=9)
    axes.set_yticks(range(len(CARDS) + 1), ["needed", *CARDS])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02 * max(need, 1.45 * max(CARDS.values()) / 1e9)), xlabel="memory (GB)")
    amounts = f"{weights:,.1f} GB of weights + {batch * one:,.1f} GB of keys and values"
    axes.set_title(title or f"{name}, {batch:,} × {context:,} tokens, {dtype}:\n{amounts}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def explore_kv_memory(
    name: str = "Llama-3-8B", context: int = 8192, batch: int = 16, dtype: str = "bfloat16"
) -> Explorer:
    """`plot_kv_memory` with a control for each of its arguments; needs a running kernel to move."""
    controls = (
        choice("model", PUBLISHED, name),
        number_slider("tokens each", EXPLORED_TOKENS, context),
        slider("sequences", batch, 1, 128),
        choice("dtype", DTYPES, dtype),
    )
    return Explorer(controls, plot_kv_memory)
