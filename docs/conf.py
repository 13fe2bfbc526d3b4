"""How the site is built: `make docs`, without a network; whoever reads it needs none either.

The source is the whole repository, so that links between notebooks, these pages and the files at the top are what they
are in the repository. Outputs of notebooks are shown as they are committed: nothing is executed.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

import minillm


def _mathjax() -> Path:
    """MathJax in one file, out of the package that carries it."""
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ConfigError("The site's formulas need MathJax: pip install -c constraints.txt -e '.[docs]'")
    return Path(spec.origin).parent / "static" / "mathjax" / "tex-svg-full.js"


os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, kernels are described all the same

project = "minillm"
author = "the minillm authors"
project_copyright = "2026, the minillm authors"
release = version = minillm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb"]
exclude_patterns = [".*", "docs/_*", "kernels", "minillm", "tests", "notebooks/assignments", "notebooks/src", "build"]
templates_path = ["_templates"]
nitpicky = True
# Types in signatures belong to other projects; what links to them would need the network.
nitpick_ignore_regex = [(r"py:.*", r".*")]

html_theme = "furo"
html_title = "minillm"
html_static_path = ["_static", str(_mathjax())]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
mathjax_path = "tex-svg-full.js"
mathjax3_config: dict[str, Any] = {"options": {"enableMenu": False}}  # its menu would load what is not here

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
# A widget lives in a notebook that runs. Here is the picture that comes with it.
nb_mime_priority_overrides = [("*", "application/vnd.jupyter.widget-view+json", None)]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports = ["triton", "ray", "pyarrow"]
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries = False  # thousands of names in every page's contents

linkcheck_timeout = 20
linkcheck_ignore = [r"http://127\.0\.0\.1.*", r"http://localhost.*"]


def _is_tuple_field(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out a named tuple's "Alias for field number 0": its docstring tells of its fields."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def _drop_widgets(app: Sphinx, name: str, source: list[str]) -> None:
    """Leave out the state of a notebook's widgets: nothing on the site could read it."""
    if name.startswith("notebooks/"):
        notebook = json.loads(source[0])
        notebook["metadata"].pop("widgets", None)
        source[0] = json.dumps(notebook)


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("source-read", _drop_widgets)
    app.connect("autodoc-skip-member", _is_tuple_field)
