"""The method study on SmolLM2-135M and the paper's tasks (make study, make study-quick).

AtP, its variants and the paper's baselines against exact patching of every attention node, and of a sample of neuron
nodes. Everything goes to runs/study (runs/study-quick), where finished pieces stay: a study that was stopped goes on
when it is started again. The small tables and the picture of the whole study are copied to bench/results/study.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

from rows import RESULTS, ROOT, provenance

from atp_fast.engine import Engine
from atp_fast.models import DEMO_MODEL, load_model
from atp_fast.prompts.tasks import load_task
from atp_fast.study import Plan, Study, run_study, write_study
from atp_fast.study.cases import engine_cases

KEPT = ("results.csv", "settings.csv", "curves.csv", "bounds.csv", "summary.md", "curves.png")


class Part(NamedTuple):
    """A task, how many pairs of it (its own number if None), its families, and what is done with them."""

    task: str
    pairs: int | None
    families: tuple[str, ...]
    plan: Plan


# The limits keep the parts with many nodes or pairs within minutes; what they leave out is marked in the tables.
FULL = (
    Part("city", None, ("attention", "neuron"), Plan()),
    Part("ioi_pair", None, ("attention", "neuron"), Plan()),
    Part("ioi", 12, ("attention",), Plan(seeds=2, limit=2000)),
    Part("random", None, ("attention",), Plan(seeds=1, limit=600, forwards=1000, probability=0.02)),
)
_QUICK = Plan(seeds=2, top=300, limit=500, forwards=700, probability=0.03)
QUICK = (
    Part("city", None, ("attention",), _QUICK),
    Part("ioi_pair", None, ("attention",), _QUICK),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases, about five minutes")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    name = "study-quick" if options.quick else "study"
    network, tokenizer = load_model(options.model)
    engine = Engine(network, options.backend)
    folder = ROOT / "runs" / name
    study = Study()
    for part in QUICK if options.quick else FULL:
        pairs = {part.task: load_task(part.task, tokenizer, n_pairs=part.pairs)}
        study.extend(run_study(engine_cases(engine, pairs, part.families), folder, part.plan))
        # Written after every part, so that a study that is still running can be read.
        paths = write_study(study, folder, f"Method study on {options.model}", _about(engine))
    if not options.quick:
        _keep(paths, RESULTS / name)


def _about(engine: Engine) -> str:
    at = provenance()
    return (
        f"Metric nll, noising. {at['device']}, {at['threads']} threads, backend {engine.backend}, "
        f"torch {at['torch']}, transformers {at['transformers']}, commit {at['commit']}, {at['date']}."
    )


def _keep(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.name in KEPT:
            shutil.copyfile(path, folder / path.name)
            print(f"wrote {folder / path.name}")


if __name__ == "__main__":
    main()
