"""What mkdocs needs beside its configuration: results that lie elsewhere, and mathematics that no script has to set."""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
MATHEMATICS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LITERAL = re.compile(r'::</p>(?=\s*<(?:div class="[^"]*highlight|pre))')  # what reStructuredText has before code
REFERENCE = re.compile(r":(?:attr|class|func|meth|mod):<code>(?:~|\.)?([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the results of the benchmarks and their log, under the paths that they have in the repository."""
    results = ROOT / "benchmarks"
    for path in sorted([results / "LOG.md", *results.glob("results/*.md"), *results.glob("results/*.png")]):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> None:
    """Leaves the results, whose tables are wide, the room of the table of contents."""
    if page.file.src_uri.startswith("benchmarks/results/"):
        page.meta["hide"] = ["toc"]


def on_page_content(content: str, **_: object) -> str:
    """Mathematics from LaTeX to MathML, which browsers show by themselves; what docstrings have of reStructuredText to
    links and plain colons."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    content = REFERENCE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', content)
    content = LITERAL.sub(":</p>", content)
    return MATHEMATICS.sub(mathml, content)
