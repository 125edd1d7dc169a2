"""Settings of Sphinx, for `make docs-site`.

The repository is the source folder, so that each relative link of a page works on a code host and on the site alike.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS / "_site"), str(ROOT / "scripts")]

project = "Stepwell"
author = "The Stepwell authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "sphinx_copybutton",
    "docstrings",
    "reference_pages",
    "repository_files",
]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
# Sphinx enters each folder that no pattern names.
exclude_patterns = [f"{path.name}/**" for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]

# ------------------------------------------------------------------------------------------------------------ Markdown

myst_heading_anchors = 4
myst_links_external_new_tab = False

# ------------------------------------------------------------------------------------------------------------------ SDK

autodoc_default_options = {
    "members": True,
    "inherited-members": "dict,Mapping,Sequence,Coroutine,BaseException,object",
    "member-order": "bysource",
}
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
smartquotes = False  # values in quotes stay as a program has them
default_role = "stepwell-name"

# --------------------------------------------------------------------------------------------------------------- links

nitpicky = True
nitpick_ignore = [
    ("py:obj", "DataFrame"),  # of pandas
    ("py:obj", "Dataset"),  # of xarray
]

# ---------------------------------------------------------------------------------------------------------------- look

html_theme = "furo"
html_title = f"Stepwell {release}"
html_static_path = ["_site/static"]
html_css_files = ["stepwell.css"]
html_extra_path = ["_site/root"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
