"""The site: `make docs`. Pages are Markdown (MyST); the API reference is made from docstrings."""

import os
import posixpath
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
# A CPU is enough, and Triton modules are not documented.
os.environ.setdefault("VITDIV_BACKEND", "reference")

project = "vitdiv_kernels"
author = "The vitdiv_kernels authors"
copyright = author
release = re.search(r'__version__ = "(.*)"', (ROOT / "vitdiv_kernels/__init__.py").read_text())[1]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# Links into other sites need the network: VITDIV_DOCS_ONLINE=1 fetches the inventories.
if os.environ.get("VITDIV_DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "timm": ("https://huggingface.co/docs/timm/main/en", None),
}

html_theme = "pydata_sphinx_theme"
html_title = "vitdiv_kernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_center": [],
    "show_prev_next": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
html_sidebars = {"**": ["site-navigation"], "index": ["site-navigation"]}
templates_path = ["_templates"]
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_heading_anchors = 3
smartquotes = False  # docstrings quote values: "signed"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
napoleon_numpy_docstring = False
napoleon_preprocess_types = False
default_role = "py:obj"
python_maximum_signature_line_length = 80


def _included():
    """README or other page outside of docs/: the page of the site that includes it."""
    pages = {}
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"^```\{include\} (\S+)", page.read_text(), re.MULTILINE):
            pages[(page.parent / target).resolve()] = page
    return pages


INCLUDED = _included()


def _rewritten(text, folder):
    """The text of a Markdown file of that folder, its links to files as links from docs/."""

    def link(found):
        target, anchor = found[2], found[3] or ""
        path = (folder / target).resolve()
        path = INCLUDED.get(path, path)
        return f"{found[1]}/{posixpath.relpath(path.as_posix(), DOCS.as_posix())}{anchor}{found[4]}"

    return re.sub(r"(\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(\))", link, text)


def _read(app, docname, source):
    source[0] = _rewritten(source[0], (DOCS / docname).parent)


def _include(app, relative_path, parent_docname, content):
    content[0] = _rewritten(content[0], (DOCS / relative_path).resolve().parent)


def _docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`: what reStructuredText would read as markup is escaped."""
    fenced = False
    for number, line in enumerate(lines):
        if line.strip() == "```":
            lines[number] = "" if fenced else "::"
            fenced = not fenced
            continue
        if fenced:
            lines[number] = "    " + line
            continue
        if ">>>" in line or line.lstrip().startswith("..."):
            continue
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([|*_])", r"\\\1", part) for part in parts[::2]]
        # markup ends at a space or a sign: `Term`s
        lines[number] = re.sub(r"(`[^`]*`)(?=\w)", r"\1\\ ", "".join(parts))
    # names of arguments that go on in the next line
    text = re.sub(r"(?m)^(    [\w\\]+(?:, [\w\\]+)*,)\n +", r"\1 ", "\n".join(lines))
    # a fence of a docstring begins a literal block, which wants a blank line on both sides
    lines[:] = re.sub(r"\n::\n", "\n\n::\n\n", text).split("\n")


def setup(app):
    app.connect("source-read", _read)
    app.connect("include-read", _include)
    # before napoleon, which is connected at 500
    app.connect("autodoc-process-docstring", _docstring, priority=400)
