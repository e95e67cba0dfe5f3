"""Lessons as pages: their cells in Markdown, with what each prints and its picture, made when the pages are built.

The files stay as they are; what is made lies in `built/`, which nobody commits.
"""

import ast
import contextlib
import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
LESSONS = HERE / "lessons"
BUILT = HERE / "built"


def cells(text: str) -> list[tuple[bool, str, int]]:
    """Return the cells of a file in the percent format: whether each is Markdown, its text, and the lines before."""
    found, line = [], 0
    for part in text.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        is_markdown = "[markdown]" in head
        lines = [line.removeprefix("#").removeprefix(" ") for line in body.split("\n")] if is_markdown else [body]
        blank = len(body) - len(body.lstrip("\n"))
        found.append((is_markdown, "\n".join(lines).strip(), line + 1 + blank))
        line += part.count("\n")
    return found


def page_of(path: Path, pictures: Any) -> str:
    """Run a lesson and return it as a page."""
    namespace: dict[str, Any] = {"__name__": "lesson", "__file__": str(path)}
    parts = []
    for is_markdown, text, line in cells(path.read_text()):
        if is_markdown:
            parts.append(text)
            continue
        printed = io.StringIO()
        drawn: list[str] = []
        with contextlib.redirect_stdout(printed), mock.patch.object(pictures, "show", drawn.append):
            exec(compile(ast.increment_lineno(ast.parse(text), line), str(path), "exec"), namespace)
        parts.append(f"```python\n{text}\n```")
        if printed.getvalue():
            parts.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        parts += [f"```{{raw}} html\n{pictures.draw(name)}\n```" for name in drawn]
    return "\n\n".join(parts) + "\n"


def build() -> None:
    """Write the pages of all lessons, and of the steps."""
    BUILT.mkdir(exist_ok=True)
    sys.path.insert(0, str(LESSONS))
    import pictures

    for path in sorted(LESSONS.glob("[01]*.py")):
        (BUILT / f"{path.stem}.md").write_text(page_of(path, pictures))
    for family in sorted((HERE / "steps").iterdir()):
        steps = [f"## {step.stem}\n\n```python\n{step.read_text()}```\n" for step in sorted(family.glob("*.py"))]
        (BUILT / f"steps_{family.name}.md").write_text(f"# Steps of {family.name}\n\n" + "\n".join(steps))


if __name__ == "__main__":
    build()
