"""What the site adds to the folder of pages: README.md is its first page; what lies outside of the folder is named, not linked."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./|benchmarks/|recipes/)[^)]+\)")


def on_files(files: Files, config) -> Files:
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    return markdown if page.file.src_uri.startswith("notebooks/") else OUTSIDE.sub(r"\1", markdown)
