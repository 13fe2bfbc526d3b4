"""Figures and displays for notebooks (needs the extra `notebooks`)."""

from __future__ import annotations

from minillm.errors import MissingExtraError

try:
    import IPython  # noqa: F401
    import matplotlib  # noqa: F401
except ImportError as error:
    raise MissingExtraError("minillm.viz", "notebooks") from error

from minillm.viz.course import plot_course_map
from minillm.viz.source import show_source
from minillm.viz.tokens import plot_next_token

__all__ = ["plot_course_map", "plot_next_token", "show_source"]
