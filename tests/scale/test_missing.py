"""Without Ray."""

from __future__ import annotations

import importlib
import sys

import pytest

from minillm.errors import MissingExtraError


@pytest.fixture
def _no_ray(monkeypatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith(("ray.", "minillm.scale"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("_no_ray")
def test_the_extra_is_named():
    with pytest.raises(MissingExtraError, match=r"minillm-engine\[scale\]"):
        importlib.import_module("minillm.scale")
