"""A run's folder, its model and its pairs, ready to be used again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from atp_fast.cli.commands import note
from atp_fast.cli.folder import PAIRS, RUN

if TYPE_CHECKING:
    from atp_fast.engine import Engine
    from atp_fast.prompts.directions import Direction
    from atp_fast.prompts.encoding import Tokenizer
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.results import Attribution


class OpenedRun(NamedTuple):
    found: Attribution
    pairs: PromptPairs
    engine: Engine
    direction: Direction
    tokenizer: Tokenizer


def open_run(folder: Path, model: str | None = None, backend: str = "auto") -> OpenedRun:
    """What `atp-fast attribute` left in a folder, with its model loaded in the dtype of that run.

    model: where the model is now, the run's own name for it when None. Raises OSError for a folder that is no run,
    ValueError when the pairs are not those of the run, or stood in other columns there.
    """
    from atp_fast.engine import Engine
    from atp_fast.models import load_model
    from atp_fast.prompts.pairs import PromptPairs
    from atp_fast.results import Attribution

    for name in (RUN, PAIRS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"run must be a folder of `atp-fast attribute`, {str(folder)!r} holds no {name}"
            )
    found = Attribution.load(folder / RUN)
    name = model or found.model
    note(f"loading {name}")
    network, tokenizer = load_model(name, dtype=found.metadata.get("dtype"))
    pairs = PromptPairs.from_jsonl(folder / PAIRS, tokenizer)
    if pairs.digest() != found.metadata.get("pairs_digest"):
        raise ValueError(f"{folder / PAIRS} must hold the pairs of {folder / RUN}, it holds others")
    if pairs.present.sum(0).tolist() != found.counts.tolist():
        raise ValueError(
            f"{folder / PAIRS} must hold pairs in the columns of {folder / RUN}, whose pairs were padded on the left"
        )
    direction: Direction = "denoising" if found.direction == "denoising" else "noising"
    return OpenedRun(found, pairs, Engine(network, backend), direction, tokenizer)
