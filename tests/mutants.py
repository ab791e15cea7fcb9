"""Plants faults in a copy of the code, one at a time, and says which ones the tests catch (make mutants).

    python tests/mutants.py [--only TEXT] [--workers 2]

A fault is one realistic slip: a line of the source and what it becomes. Each names the test files that ought to notice; a
fault that they let pass has survived. Exit code 1 where more than one in twenty survives, or where a fault no longer
fits the source. SURVIVORS explains those that are known to.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """`old`, which stands once in the file, becomes `new`; `tests`: pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


SWEEP = "tests/test_sweep.py -k mixed"
PATCH = "tests/test_patching.py -k mixed"
STOP = "tests/test_engine.py -k stopped"
SPANS = "tests/test_spans.py"
REFUSE = "tests/test_refusals.py"
SCORES = "tests/test_own_scores.py"
HARD = "tests/test_hard_use.py -k "
OPTIONS = "tests/test_cli_options.py"
OPS = "tests/test_ops_cpp.py"
INTERPRETED = "INTERPRET tests/test_ops_triton.py -k 'window or side'"

FAULTS = [
    # pairs that share a start, batches, padding
    Fault(
        "atp_fast/engine.py",
        "order = torch.argsort(pairs.split, descending=True, stable=True)\n        return list(torch.split(order, size))",
        "return list(torch.split(torch.arange(len(pairs)), size))[::-1][:-1] or [torch.arange(len(pairs))]",
        SWEEP,
    ),
    Fault(
        "atp_fast/engine.py",
        "clean_value[rows], corrupted_value[rows] = clean.cpu(), corrupted.cpu()",
        "clean_value[rows], corrupted_value[rows] = corrupted.cpu(), clean.cpu()",
        SWEEP,
    ),
    Fault(
        "atp_fast/engine.py",
        "clean_value[rows], corrupted_value[rows] = clean.cpu(), corrupted.cpu()",
        "clean_value[: len(rows)], corrupted_value[: len(rows)] = clean.cpu(), corrupted.cpu()",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "self.per_pair[kind][place.rows, layer, columns] = kept",
        "self.per_pair[kind][: len(kept), layer, columns] = kept",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "kept = score if self.method.graddrop else effect",
        "kept = effect",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py", "begin = first.pop()", "begin = first.pop() * 0", SWEEP
    ),
    Fault("atp_fast/attribution/scores.py", "if len(first) > 1:", "if len(first) > 2:", SWEEP),
    Fault(
        "atp_fast/attribution/scores.py",
        "here = (source >= 0) & (source < x.shape[1])",
        "here = source < x.shape[1]",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "None if all_live else live)",
        "None if any_live else live)",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "starts = runs.start + pairs.starts.to(plug.device)",
        "starts = pairs.starts.to(plug.device)",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "inputs[count:] = cotangents[:1]",
        "inputs[count:] = cotangents[-1:]",
        "tests/test_sweep.py -k equals_the_literal",
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        'self._reduce("k", found.effect_k[:, :, self.start :], first)',
        'self._reduce("k", found.effect_k[:, :, : found.effect_k.shape[2] - self.start], first)',
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        "live = (columns >= self.pairs.split[:, None]) & (columns < self.pairs.lengths[:, None])",
        "live = (columns >= self.pairs.split[:, None]) & (columns <= self.pairs.lengths[:, None])",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        "return min(int(pairs.split.min()), int(shortest.min()) - 1)",
        "return min(int(pairs.split.max()), int(shortest.min()) - 1)",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        "return min(int(pairs.split.min()), int(shortest.min()) - 1)",
        "return min(int(pairs.split.min()), int(shortest.max()) - 1)",
        SPANS,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        'plug.keys_values(number, moved["resid_pre"], *given)',
        "pass",
        SPANS,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        "return live if self.source is None else live & (self.source >= 0)",
        "return live",
        SPANS,
    ),
    Fault(
        "atp_fast/prompts/table.py",
        "lowest = torch.where(shifted, torch.minimum(source, columns), columns.shape[0]).amin(1)",
        "lowest = first",
        SPANS,
    ),
    Fault(
        "atp_fast/prompts/spans.py",
        "place = t + (self.corrupted[..., 1:] - self.clean[..., 1:])",
        "place = t + (self.corrupted[..., :1] - self.clean[..., :1])",
        SPANS,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "if len(grad) == 1 or self.spans is not None:",
        "if len(grad) == 1:",
        SPANS,
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "before = (end - first).cumsum(0) - (end - first)",
        "before = (end - first).cumsum(0) * 0",
        SPANS,
    ),
    Fault(
        "atp_fast/prompts/encoding.py",
        "first = len(self.with_prefix(ids)) - len(ids)",
        "first = len(self.prefix)",
        "tests/test_span_texts.py",
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        "if bool((ids == ids[:1]).all()):",
        "if bool((ids[:, :1] == ids[:1, :1]).all()):",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "return [layer / (layers - 1)] + [1 / (layers - 1)] * (layers - 1 - layer)",
        "return [layer / layers] + [1 / layers] * (layers - 1 - layer)",
        "tests/test_sweep.py -k depths",
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "return torch.cat(list(parts))[torch.argsort(torch.cat(self.batches))]",
        "return torch.cat(list(parts))[torch.cat(self.batches)]",
        PATCH,
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "moved = (position >= first) & (position < length)",
        "moved = (position > first) & (position < length)",
        PATCH,
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "return torch.arange(len(pair)), column - self.pairs.starts.cpu()[pair]",
        "return torch.arange(len(pair)), column",
        PATCH,
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "place[rows] = torch.arange(len(rows))",
        "place[rows] = torch.arange(len(rows)).flip(0)",
        PATCH,
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "source, target = position - start, position - begin",
        "source, target = position - begin, position - begin",
        PATCH,
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "real = (source >= 0) & (source < patched.shape[1])",
        "real = (source > 0) & (source < patched.shape[1])",
        PATCH,
    ),
    Fault(
        "atp_fast/prompts/table.py",
        "columns <= self.last[:, None]",
        "columns < self.last[:, None]",
        "tests/test_cli_study.py -k ragged",
    ),
    Fault(
        "atp_fast/study/cases.py",
        "share = found.counts.double() / len(self.pairs)",
        "share = (found.counts > 0).double()",
        "tests/test_cli_study.py -k ragged",
    ),
    Fault(
        "atp_fast/study/cases.py",
        "direction=self.direction,\n            progress=False,",
        "progress=False,",
        "tests/test_cli_study.py -k ragged",
    ),
    # the kernels
    Fault(
        "csrc/attention.h",
        "if (window) high = std::min(high, key + window - position);",
        "if (window) high = std::min(high, key + window - position + 1);",
        OPS,
    ),
    Fault(
        "csrc/attention.h",
        "if (window && position + queries - 1 - key >= window) return true;",
        "if (window && position + queries - 1 - key > window) return true;",
        OPS,
    ),
    Fault(
        "csrc/attention.h",
        "first_key = std::max<Index>(0, position - window + 1) / tile * tile;",
        "first_key = (std::max<Index>(0, position - window + 1) + tile - 1) / tile * tile;",
        OPS,
    ),
    Fault(
        "csrc/convert.h",
        "const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "const std::uint32_t rounded = bits >> 16;",
        OPS,
    ),
    Fault(
        "csrc/convert.h",
        "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "(bits + 0x8000) >> 16;",
        OPS,
    ),
    Fault(
        "csrc/convert.h",
        "(bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;",
        "(bits - (112u << 23)) >> 13;",
        OPS,
    ),
    Fault(
        "atp_fast/ops/cpp.py", "else scoring.key_mask.contiguous()", "else scoring.key_mask", OPS
    ),
    Fault(
        "atp_fast/ops/reference.py",
        "allowed &= distance < scoring.window",
        "allowed &= distance <= scoring.window",
        "tests/test_ops_cpp.py",
    ),
    Fault("kernels/tiles.py", "seen = distance < window", "seen = distance <= window", INTERPRETED),
    Fault(
        "kernels/tiles.py",
        "high = tl.minimum(start_n + BLOCK_N - 1 + window - (keys - queries), queries)",
        "high = tl.minimum(start_n + BLOCK_N - 2 + window - (keys - queries), queries)",
        INTERPRETED,
    ),
    Fault(
        "kernels/tiles.py",
        "window + 1, 0) // BLOCK_N * BLOCK_N",
        "window + BLOCK_N, 0) // BLOCK_N * BLOCK_N",
        INTERPRETED,
    ),
    # what is refused
    Fault(
        "atp_fast/hf/attention.py",
        "if given is not None and name not in _HARMLESS:",
        "if given is not None and name in _HARMLESS:",
        REFUSE,
    ),
    Fault("atp_fast/hf/attention.py", "or attention_mask.dtype != torch.int64 or", "or", REFUSE),
    Fault(
        "atp_fast/hf/attention.py",
        "[-w, -2, -1, 0, 1, 2, w - 1, w, w + 1, 2 * w, 3 * w]",
        "[0, 1, 2, w, 2 * w, 3 * w]",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/attention.py",
        "expected = (kv <= q) & (kv > q - width) if width else kv <= q",
        "expected = (kv <= q) & (kv >= q - width) if width else kv <= q",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/attention.py",
        "except (IndexError, RuntimeError) as error:",
        "except IndexError as error:",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/plug.py",
        '_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})',
        '_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic"})',
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/plug.py",
        'scale = float(getattr(self.model.config, "residual_multiplier", 1.0))',
        "scale = 1.0",
        REFUSE,
    ),
    Fault("atp_fast/hf/plug.py", 'self._check_close("logits", self.logits(x), own)', "", REFUSE),
    Fault(
        "atp_fast/hf/plug.py",
        'self._check_close(f"layer {number}\'s output", streams[number + 1], eager)',
        "",
        REFUSE,
    ),
    Fault("atp_fast/hf/plug.py", "if run.calls != 1:", "if run.calls < 1:", REFUSE),
    Fault("atp_fast/hf/plug.py", "if len(shapes) != 1:", "if not shapes:", REFUSE),
    Fault(
        "atp_fast/hf/inspection.py",
        "(call.module, scale * call.output.reshape(x.shape))",
        "(call.module, call.output.reshape(x.shape))",
        REFUSE,
    ),
    # interruption
    Fault(
        "atp_fast/hf/layers.py",
        "        try:\n            yield steps\n        finally:\n            self.list_parent._modules[self.list_name] = original",
        "        yield steps\n        self.list_parent._modules[self.list_name] = original",
        STOP,
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "                for p in trained:\n                    p.requires_grad_(True)",
        "                pass",
        STOP,
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "trained = [p for p in self.model.parameters() if p.requires_grad]",
        "trained = list(self.model.parameters())",
        STOP,
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "        finally:\n            running.reset(token)",
        "        except ZeroDivisionError:\n            running.reset(token)",
        "tests/test_engine.py",
    ),
    Fault(
        "atp_fast/hf/switching.py",
        "    finally:\n        for module, name, own in before:",
        "    finally:\n        for module, name, own in before[1:]:",
        "tests/test_engine.py tests/test_activations.py tests/test_linears.py",
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "hooks.callback(_watch(module, kind, run, x.shape[:2]).remove)",
        "_watch(module, kind, run, x.shape[:2])",
        STOP,
    ),
    # the command line and the shards
    Fault(
        "atp_fast/cli/attribute.py",
        "engine = Engine(network, backend, precision, memory_budget)",
        "engine = Engine(network, backend, None, memory_budget)",
        OPTIONS,
    ),
    Fault(
        "atp_fast/cli/attribute.py",
        "question = Question(metric, method, options.names(nodes), way)",
        "question = Question(metric, method, options.names(nodes))",
        OPTIONS,
    ),
    Fault(
        "atp_fast/cli/attribute.py",
        "**vars(question), shard_size=shard_size)",
        "**vars(question))",
        OPTIONS,
    ),
    Fault(
        "atp_fast/cli/attribute.py",
        "load_task(task, tokenizer, n_pairs=n_pairs, seed=seed)",
        "load_task(task, tokenizer, n_pairs=n_pairs)",
        OPTIONS,
    ),
    Fault(
        "atp_fast/cli/opened.py",
        'direction: Direction = "denoising" if found.direction == "denoising" else "noising"',
        'direction: Direction = "noising"',
        OPTIONS,
    ),
    Fault(
        "atp_fast/cli/opened.py",
        'load_model(name, dtype=found.metadata.get("dtype"))',
        "load_model(name)",
        OPTIONS,
    ),
    Fault("atp_fast/cli/diagnose.py", "        exclude=verified,\n", "", OPTIONS),
    Fault("atp_fast/cli/diagnose.py", "        seed=seed,\n", "", OPTIONS),
    Fault("atp_fast/cli/diagnose.py", "        metric=opened.found.metric,\n", "", OPTIONS),
    Fault("atp_fast/cli/study.py", "        best=neurons_top,\n", "", OPTIONS),
    Fault("atp_fast/cli/study.py", "        limit=limit or None,\n", "", OPTIONS),
    Fault(
        "atp_fast/cli/bench.py",
        "random_inputs(shape, cotangents, getattr(torch, dtype), device)",
        "random_inputs(shape, cotangents, torch.float32, device)",
        OPTIONS,
    ),
    Fault(
        "atp_fast/distributed/rays.py",
        "if key not in _engines:",
        "if not _engines:",
        "tests/test_distributed.py -k ray",
    ),
    Fault(
        "atp_fast/distributed/shards.py",
        "value[rows] = getattr(part, name)",
        "value[: len(rows)] = getattr(part, name)",
        "tests/test_distributed.py -k shards",
    ),
    # labels, files, the page
    Fault(
        "atp_fast/prompts/table.py",
        "for column, token in enumerate(tokens, start=start):",
        "for column, token in enumerate(tokens):",
        "tests/test_pairs.py",
    ),
    Fault(
        "atp_fast/prompts/pairs.py",
        '"clean_ids": self.clean_ids[i][real].tolist(),',
        '"clean_ids": self.clean_ids[i].tolist(),',
        "tests/test_pairs.py",
    ),
    Fault(
        "atp_fast/results/report.py",
        "{html.escape(visible(token))}</span>",
        "{visible(token)}</span>",
        "tests/test_results.py",
    ),
    Fault(
        "atp_fast/results/report.py",
        "<title>{html.escape(title)}</title>",
        "<title>{title}</title>",
        "tests/test_results.py",
    ),
    Fault(
        "atp_fast/results/report.py",
        "<h1>{html.escape(title)}</h1>",
        "<h1>{title}</h1>",
        "tests/test_results.py",
    ),
    Fault(
        "atp_fast/files.py",
        'writer = csv.writer(file, lineterminator="\\n")',
        'writer = csv.writer(file, lineterminator="\\n", quoting=csv.QUOTE_NONE, escapechar="\\\\")',
        "tests/test_results.py",
    ),
    Fault(
        "atp_fast/results/scores.py",
        'return {"kind": kind, "layer": layer, "position": live[column], "index": index}',
        'return {"kind": kind, "layer": layer, "position": column, "index": index}',
        "tests/test_results.py",
    ),
    # the study
    Fault(
        "atp_fast/patching/subsets.py",
        "self.cost += float(effect.numel())",
        "self.cost += float(len(lists))",
        "tests/test_baselines.py tests/test_cli_study.py",
    ),
    Fault(
        "atp_fast/patching/diagnostics.py",
        "t = np.where(self.standard_error > 0, t, np.where(gap > 0, np.inf, -np.inf))",
        "t = np.where(self.standard_error > 0, t, np.inf)",
        "tests/test_diagnostics.py",
    ),
    # models that write out their softmax, and those whose layers are of several kinds
    Fault("atp_fast/hf/scores.py", "if not factor > 0 or", "if factor == 0 or", SCORES),
    Fault(
        "atp_fast/hf/scores.py",
        "bias = None if parts.bias is None else parts.bias * factor",
        "bias = parts.bias",
        SCORES,
    ),
    Fault(
        "atp_fast/hf/scores.py",
        "parts.bias.to(v.dtype) / scale)",
        "parts.bias.to(v.dtype))",
        SCORES,
    ),
    Fault("atp_fast/hf/scores.py", "parts.allowed & ~out)", "parts.allowed | ~out)", SCORES),
    Fault(
        "atp_fast/hf/scores.py",
        "_kept_out(_linear(scores), ~condition)",
        "_kept_out(_linear(scores), condition)",
        SCORES,
    ),
    Fault("atp_fast/hf/scores.py", "(j > i - width))).all()", "(j >= i - width))).all()", SCORES),
    Fault(
        "atp_fast/hf/scores.py", "if parts.zeroed is not None or others[0]", "if others[0]", SCORES
    ),
    Fault(
        "atp_fast/hf/scores.py",
        "if not bool((out | (more == per_key)).all()):",
        "if False:",
        SCORES,
    ),
    Fault("atp_fast/hf/scores.py", "[input * beta])", "[input])", SCORES),
    Fault(
        "atp_fast/hf/plug.py", "dim = run.q.shape[3] - run.biased", "dim = run.q.shape[3]", SCORES
    ),
    Fault("atp_fast/hf/plug.py", "self.moves = False  # a layer", "pass  # a layer", REFUSE),
    Fault("atp_fast/hf/plug.py", "if rows and not torch.equal(*x.chunk(2)):", "if False:", REFUSE),
    Fault(
        "atp_fast/hf/plug.py",
        "self.moves = self._error(rest, out[:, half:].detach()) <= self._tolerance(out)",
        "pass",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/inspection.py",
        "error = float((more - more[:, :1]).abs().max())",
        "error = float(more.abs().max())",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/inspection.py",
        "error = float((more - more[:, :1]).abs().max())",
        "error = float((more - more).abs().max())",
        REFUSE,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "inputs.copy_(grads[-1])",
        "inputs.copy_(cotangents)",
        REFUSE,
    ),
    # hard use
    Fault("atp_fast/hf/switching.py", "    with lock:\n", "    if lock:\n", HARD + "thread"),
    Fault(
        "atp_fast/hf/switching.py",
        "with torch.inference_mode(False), torch.no_grad():",
        "with torch.no_grad():",
        HARD + "modes",
    ),
    Fault(
        "atp_fast/hf/switching.py",
        "switched(forwards, lambda module, compiled: getattr(compiled, _WRITTEN)),",
        "",
        HARD + "compiled",
    ),
    Fault(
        "atp_fast/hf/switching.py",
        "switched(calls, lambda module, compiled: None),",
        "",
        HARD + "compiled",
    ),
    Fault(
        "atp_fast/metrics.py",
        "for row in (0, len(values) - 1):",
        "for row in (0,):",
        HARD + "mixes",
    ),
    Fault(
        "atp_fast/files.py",
        "if found == wanted and digest != _digest(tensors, header):",
        "if False:",
        HARD + "byte",
    ),
    Fault(
        "atp_fast/files.py",
        "(found != older or digest is not None)",
        "found != older",
        HARD + "digest",
    ),
    Fault(
        "atp_fast/files.py",
        "        seen.update(x.contiguous()",
        "        (x.contiguous()",
        HARD + "byte",
    ),
    Fault(
        "atp_fast/engine.py",
        "_warn_of_nothing(scores, run_pairs, measure)",
        "pass",
        HARD + "vanish",
    ),
    Fault(
        "atp_fast/engine.py",
        "if none and scores.space.layers > 1 and",
        "if none and",
        HARD + "vanish",
    ),
]

SURVIVORS: dict[str, str] = {
    "None if any_live else live)": "effects outside a pair's own live positions are 0 anyway: before its first "
    "differing token the deltas are, in its padding the gradients; the mask only makes that exact on every device",
    "& (columns <= self.pairs.lengths[:, None])": "the same: one column of padding more, where gradients are 0",
}
"""The end of a fault that is known to survive -> why nothing can notice."""


class Copy:
    """A copy of the project, compiled extension included, that faults are planted in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for extension in ROOT.glob("atp_fast/_C*.so"):
            shutil.copy2(extension, folder / "atp_fast")
        (folder / "atp_fast" / "kernels").symlink_to("../kernels")

    def run(self, fault: Fault) -> str:
        """The verdict: caught, survived, or what is wrong with the fault."""
        path = self.folder / fault.file
        text = path.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            return (
                f"does not fit: its old text stands {text.count(fault.old)} times in {fault.file}"
            )
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            if fault.file.startswith("csrc/"):
                self._build()
            return self._test(fault.tests)
        finally:
            path.write_text(text, encoding="utf-8")
            if fault.file.startswith("csrc/"):
                for extension in ROOT.glob("atp_fast/_C*.so"):
                    shutil.copy2(extension, self.folder / "atp_fast")

    def _build(self) -> None:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        subprocess.run(command, cwd=self.folder, capture_output=True, check=True)

    def _test(self, tests: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        if tests.startswith("INTERPRET "):
            environment["TRITON_INTERPRET"], tests = "1", tests.removeprefix("INTERPRET ")
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider -p no:xdist {tests}"
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        verdicts = {0: "survived", 1: "caught"}
        return verdicts.get(done.returncode, done.stdout[-500:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose file or text holds this")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    chosen = [f for f in FAULTS if options.only in f.file + f.old + f.new + f.tests]
    with tempfile.TemporaryDirectory() as scratch:
        copies: Queue[Copy] = Queue()
        for number in range(options.workers):
            copies.put(Copy(Path(scratch, str(number))))

        def judge(fault: Fault) -> str:
            copy = copies.get()
            try:
                found = copy.run(fault)
            finally:
                copies.put(copy)
            new = fault.new.strip()
            what = new.splitlines()[0] if new else f"without {fault.old.strip()}"
            why = next((why for end, why in SURVIVORS.items() if new.endswith(end)), "")
            print(f"{found:9} {fault.file}: {what} {why and f'({why})'}".rstrip(), flush=True)
            return found

        with ThreadPoolExecutor(options.workers) as pool:
            verdicts = list(pool.map(judge, chosen))
    caught, survived = verdicts.count("caught"), verdicts.count("survived")
    print(f"{caught} of {len(chosen)} caught, {survived} survived")
    sys.exit(caught + survived < len(chosen) or survived > len(chosen) // 20)


if __name__ == "__main__":
    main()
