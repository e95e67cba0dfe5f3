"""How Sphinx builds the pages: the Markdown beside this file, and the API from the docstrings of every public name."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numba_moe
from numba_moe import lab, parallel, placement, recorder, training

project = "numba_moe"
version = release = metadata.version("numba-moe")
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
autosummary_generate = True
autodoc_typehints = "none"  # docstrings say the types
numpydoc_show_class_members = False
myst_heading_anchors = 3
html_css_files = ["narrow.css"]
html_static_path = ["static"]
html_theme_options = {"page_width": "1200px", "description": "Mixture-of-Experts routing in Python"}


def to_pages(app: object, name: str, text: list[str]) -> None:  # noqa: ARG001
    """Let links to lessons and steps, which are files in the repository, lead to their pages here."""
    if name == "course/index":
        text[0] = re.sub(r"\(lessons/(\w+)\.py\)", r"(built/\1.md)", text[0])
        text[0] = re.sub(r"\(steps/(\w+)\)", r"(built/steps_\1.md)", text[0])


def setup(app: Any) -> None:
    """Tell Sphinx what to do with pages before they are read."""
    app.connect("source-read", to_pages)


def names_of(package: object) -> str:
    """Return the section of a package: a page for each of its names."""
    name = package.__name__
    rows = "".join(f"   {public}\n" for public in package.__all__)
    title = f"{name}\n{'-' * len(name)}\n"
    return f"{title}\n.. currentmodule:: {name}\n\n.. autosummary::\n   :toctree: api\n\n{rows}"


sections = [names_of(package) for package in (numba_moe, parallel, placement, recorder, training, lab)]
lessons = [sys.executable, str(Path(__file__).with_name("course") / "build_pages.py")]  # which run in the simulator
subprocess.run(lessons, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, check=True)
Path(__file__).with_name("api.rst").write_text("\n".join(["API\n===\n", *sections]))
