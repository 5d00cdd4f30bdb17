"""The documentation as a site: ``make docs`` builds it into build/site with Sphinx, and fails on a broken link.

Pages are Markdown (MyST), so that they read well in the repository too. The reference of commands comes from click,
that of modules from docstrings. Nothing is loaded from the network, neither to build the site nor to read it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from amoeba_deploy import __version__  # noqa: E402

project = "Amoeba"
author = "The Amoeba developers"
copyright = author  # noqa: A001 - Sphinx's own name
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
smartquotes = False  # it makes a dash of the -- before an option
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = f"Amoeba {release}"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
html_last_updated_fmt = None
exclude_patterns = ["schemas", "examples"]
