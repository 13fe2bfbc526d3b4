"""What every explorer is made of: controls, a line of text, and a picture that is drawn anew when a control changes."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ipywidgets as widgets  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from minillm.errors import InvalidRequestError, MinillmError
from minillm.llm import LLM
from minillm.models.loader import load_model
from minillm.models.tokenizer import get_tokenizer, stop_token_ids
from minillm.transformer.decoder import Decoder
from minillm.viz.style import png

LOOKS: Mapping[str, Any] = {"style": {"description_width": "190px"}, "layout": {"width": "510px"}}
"""Of every control, so that those of one explorer stand in columns."""
SLIDER: Mapping[str, Any] = {**LOOKS, "continuous_update": False}
"""Of a slider: a picture takes too long to follow every pixel of its way."""
MILLISECONDS = 700
"""From one step to the next when they are played."""
MOST_PLAYED = 60
"""Pictures of a run from its first step to its last."""


class Explorer(widgets.VBox):
    """A row of controls, a line of text, and a picture drawn from the controls' values: change one, and it is redrawn.

    Without a kernel it shows what it showed when it was saved. Where no widgets are shown at all (a PDF, a site that
    hosts code) it is displayed as its picture.

    Args:
        controls: their values are the arguments of `draw` and `tell`.
        draw: makes the picture; what a MinillmError raised here or by `tell` says stands in the line.
        tell: makes the line of text, in HTML.
        rows: what stands above the line; when None, the controls, as many beside each other as there is room for.

    Attributes:
        controls, line, image: the parts.

    Raises:
        MinillmError: there is no picture to begin with.
    """

    def __init__(
        self,
        controls: Sequence[Any],
        draw: Callable[..., Figure],
        tell: Callable[..., str] = lambda *_: "",
        *,
        rows: Iterable[Any] | None = None,
    ) -> None:
        self.controls = tuple(controls)
        self.line = widgets.HTML(layout={"max_width": "1000px"})
        self.image = widgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self._draw, self._tell = draw, tell
        row = widgets.Box(self.controls, layout={"flex_flow": "row wrap"})
        super().__init__([*([row] if rows is None else rows), self.line, self.image])
        self._show()
        for control in self.controls:
            control.observe(self.redraw, names="value")

    def redraw(self, _: Any = None) -> None:
        """Make picture and line anew; where they cannot be made, the picture stays and the line tells why."""
        try:
            self._show()
        except MinillmError as error:
            self.line.value = html.escape(str(error))

    def _show(self) -> None:
        values = [control.value for control in self.controls]
        picture, said = png(self._draw(*values)), self._tell(*values)
        self.image.value, self.line.value = picture, said

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widget, and the picture for whatever shows no widgets."""
        bundle = super()._repr_mimebundle_(**options)
        return {**bundle, "image/png": base64.b64encode(self.image.value).decode()}


def slider(name: str, value: float, low: float, high: float, step: float = 1) -> Any:
    """A slider from `low` to `high`, of whole numbers where the step is one.

    Raises:
        InvalidRequestError: a value beyond its ends.
    """
    if not low <= value <= high:
        raise InvalidRequestError(f"{name}: {value} is not in {low} … {high}")
    kind = widgets.IntSlider if isinstance(step, int) else widgets.FloatSlider
    return kind(value, min=low, max=high, step=step, description=name, **SLIDER)


def number_slider(name: str, numbers: Sequence[int], value: int) -> Any:
    """A slider over some numbers.

    Raises:
        InvalidRequestError: a value that is none of them.
    """
    if value not in numbers:
        raise InvalidRequestError(f"{name}: {value} is not one of {', '.join(map(str, numbers))}")
    options = [(f"{number:,}", number) for number in numbers]
    return widgets.SelectionSlider(options=options, value=value, description=name, **SLIDER)


def text_field(name: str, value: str) -> Any:
    """A line to write in; it is read when Enter is pressed, or another control is gone to."""
    wide = {**SLIDER, "layout": {"width": "800px"}}
    return widgets.Text(value, description=name, **wide)


def choice(name: str, options: Iterable[Any], value: Any) -> Any:
    """A menu.

    Raises:
        InvalidRequestError: a value that is not in it.
    """
    options = tuple(options)
    if value not in options:
        raise InvalidRequestError(f"{name}: {value!r} is not one of {', '.join(map(str, options))}")
    return widgets.Dropdown(options=options, value=value, description=name, **LOOKS)


class Steps(NamedTuple):
    """The controls of steps 0, 1, …, last: the slider holds the step that is shown, the others move it."""

    slider: Any
    back: Any
    step: Any
    play: Any

    @classmethod
    def to(cls, last: int, value: int = 0) -> Steps:
        """Controls of steps up to `last`, at step `value`.

        Raises:
            InvalidRequestError: no such step.
        """
        shown = slider("step", value, 0, last)
        play = widgets.Play(value=value, min=0, max=last, step=_stride(last), interval=MILLISECONDS)
        back, step = (
            widgets.Button(description=name, icon=f"step-{icon}", layout={"width": "80px"})
            for name, icon in (("back", "backward"), ("step", "forward"))
        )
        widgets.link((play, "value"), (shown, "value"))
        widgets.link((play, "max"), (shown, "max"))
        controls = cls(shown, back, step, play)
        back.on_click(lambda _: controls.move(-1))
        step.on_click(lambda _: controls.move(1))
        return controls

    def move(self, count: int) -> None:
        """So many steps on, or back where it is negative, and never over an end."""
        self.slider.value = max(0, min(self.slider.max, self.slider.value + count))

    def set(self, last: int, value: int) -> None:
        """Change how many steps there are, and go to one of them."""
        self.slider.value = min(self.slider.value, last)
        self.slider.max, self.play.step = last, _stride(last)
        self.slider.value = value

    @property
    def row(self) -> Any:
        """All of them beside each other."""
        return widgets.Box([self.back, self.step, self.play, self.slider], layout={"flex_flow": "row wrap"})


def _stride(last: int) -> int:
    return max(1, last // MOST_PLAYED)


class Reader(NamedTuple):
    """A model that reads texts.

    Attributes:
        stop_ids: the tokens that end what it writes.
    """

    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


def reader_of(model: Decoder | LLM | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Reader:
    """What an explorer of texts needs, from whatever names a model.

    Args:
        model: a decoder, an LLM, or a name that `load_model` knows; then it is loaded in float32.
        tokenizer: of a decoder, which does not know its own; beside the others it is used instead of theirs.

    Raises:
        InvalidRequestError: a decoder without a tokenizer.
        MinillmError: a model or tokenizer that cannot be had.
    """
    if isinstance(model, str):
        own = tokenizer or get_tokenizer(model)
        return Reader(load_model(model, dtype="float32"), own, stop_token_ids(model, own))
    if isinstance(model, LLM):
        return Reader(model.decoder, tokenizer or model.get_tokenizer(), frozenset(model.engine.end_ids))
    if tokenizer is None:
        raise InvalidRequestError("a decoder does not know its tokenizer: give tokenizer=, or name the model")
    return Reader(model, tokenizer, frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)))
