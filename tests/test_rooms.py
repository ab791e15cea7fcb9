"""Rooms import only what stands before them: the order of the folders is the order in which data flows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "atp_fast"
ROOMS = (
    *("_moved", "_version", "extras", "files", "nodes"),
    *("prompts", "metrics", "models", "kernels", "ops", "hf", "attribution", "patching", "results"),
    *("estimates", "engine", "study", "distributed", "integrations", "cli"),
)
TRANSFORMERS = ("hf", "models", "engine", "attribution.literal")
"""Who may import transformers: the literal code shares nothing with hf on purpose, so that an error cannot hide."""


def sources() -> Iterator[tuple[str, Path]]:
    """Module names below atp_fast, and their files."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "kernels" and parts != ("__init__",):
            yield ".".join(parts).removesuffix(".__init__"), path


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def arrows() -> dict[tuple[str, str], str]:
    """(room, room that it imports) -> a module that does."""
    found = {}
    for module, path in sources():
        for name in imported(path):
            first, _, rest = name.partition(".")
            if first == "atp_fast" and not rest.startswith("_C"):
                found[module.split(".")[0], rest.split(".")[0]] = module
    return found


def test_every_module_is_in_a_room() -> None:
    assert {module.split(".")[0] for module, _ in sources()} <= set(ROOMS)


def test_no_room_imports_one_that_comes_after_it() -> None:
    upwards = {
        f"{module} imports {there}"
        for (here, there), module in arrows().items()
        if ROOMS.index(there) > ROOMS.index(here)
    }
    assert not upwards


def test_modules_of_a_room_have_no_circle() -> None:
    files = dict(sources())
    edges = {
        module: {
            inner.removeprefix("atp_fast.")
            for name in imported(path)
            for inner in (name, name.rpartition(".")[0])
            if inner.removeprefix("atp_fast.") in files
        }
        - {module}
        for module, path in files.items()
    }
    edges = {a: {b for b in found if not a.startswith(f"{b}.")} for a, found in edges.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            pytest.fail(f"circle: {' -> '.join((*trail, module))}")
        if module not in done:
            for there in sorted(edges[module]):
                visit(there, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_only_hf_knows_transformers() -> None:
    knowing = {
        module
        for module, path in sources()
        for n in imported(path)
        if n.split(".")[0] == "transformers"
    }
    assert not [m for m in knowing if not m.startswith(TRANSFORMERS)]


def test_every_room_says_what_comes_in_and_goes_out() -> None:
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        if folder.name == "kernels":
            continue
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert text.startswith("In: ") and " Out: " in text and "\nMay import: " in text, (
            folder.name
        )


def test_the_picture_of_the_rooms_is_the_code() -> None:
    """docs/architecture.md draws every arrow between folders."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"engine"}
    drawn = {
        tuple(line.strip().split(" --> "))
        for line in text.splitlines()
        if " --> " in line and not line.startswith("#")
    }
    assert drawn == {
        (there, here) for here, there in arrows() if {here, there} <= folders and here != there
    }
