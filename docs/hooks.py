"""What the site is made of beside these pages: the README as its front page, the command line's help, the notebook, and
the project's files that pages link to.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and a copy of every file outside docs/ that a page links to."""
    made = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "reference/cli.md": _command_line(),
        "reference/ioi.md": _notebook(ROOT / "examples" / "ioi.ipynb"),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for page in list(files.documentation_pages()):
        for target in _targets(page):
            if target.is_file() and not target.is_relative_to(ROOT / "docs"):
                name = f"files/{target.relative_to(ROOT)}"
                if files.get_file_from_path(name) is None and target.suffix != ".md":
                    files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ lead to the copies; those to pages and folders that the site has not become plain text."""
    source = _source(page.file)

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        up = "../" * page.file.src_uri.count("/")
        if target.is_relative_to(ROOT / "docs"):
            return f"]({up}{target.relative_to(ROOT / 'docs')}{match[2] or ''})"
        name = f"files/{target.relative_to(ROOT)}"
        if files.get_file_from_path(name) is not None:
            return f"]({up}{name})"
        return f"]({up}index.md)" if target == ROOT / "README.md" else "]{.file}"

    text = _LINK.sub(moved, markdown)
    return re.sub(r"!?\[([^\]]*)\]\{\.file\}", r"\1", text)


def _source(file: File) -> Path:
    """Where a page's own links start from."""
    return ROOT / "README.md" if file.src_uri == "index.md" else ROOT / "docs" / file.src_uri


def _targets(file: File) -> list[Path]:
    text = file.content_string
    return [(_source(file).parent / match[1]).resolve() for match in _LINK.finditer(text)]


def _command_line() -> str:
    command = [sys.executable, "-m", "typer", "atp_fast.cli", "utils", "docs", "--name", "atp-fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.replace("# `atp-fast`", "# Command line", 1)


def _notebook(path: Path) -> str:
    """An executed notebook's texts, code and printed results."""
    import nbformat

    parts = []
    for cell in nbformat.read(path, as_version=4).cells:  # type: ignore[no-untyped-call]
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            if text and "text/html" not in output.get("data", {}):
                parts.append(f"```text\n{text.rstrip()}\n```")
            elif "image/svg+xml" in output.get("data", {}):
                parts.append(output["data"]["image/svg+xml"])
    return "\n\n".join(parts)
