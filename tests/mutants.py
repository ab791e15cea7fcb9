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
FETCHED = "tests/test_streaming.py -k fetched_twice"
FILES = "tests/test_streaming.py -k goes_to_disk"
DEVICES = "tests/test_placement.py -k two_devices"
PATCH = "tests/test_patching.py -k mixed"
EXPERTS = "tests/test_patching.py -k 'mixtral or gpt_oss'"
STOP = "tests/test_engine.py -k stopped"
SPANS = "tests/test_spans.py"
REFUSE = "tests/test_refusals.py"
SCORES = "tests/test_own_scores.py"
HARD = "tests/test_hard_use.py -k "
OPTIONS = "tests/test_cli_options.py"
OPS = "tests/test_ops_cpp.py"
REPORT = "tests/test_report.py"
PAGE = "tests/test_report_page.py"
ADDED = "tests/test_add_effects.py"
GROUPED = f"INTERPRET {ADDED} -k 'groups or split or parts'"
NORMS = "tests/test_norm.py"
WALK = "tests/test_adjoint.py"
TWINS = "tests/test_twins.py"
READY = "tests/test_launch.py"
GATE = "tests/test_gate.py"
SHAPES = "tests/test_layer_shapes.py"
CHUNKS = "tests/test_chunks.py"
STARTS = "tests/test_launches.py"
REPLAY = "tests/test_replay.py -k "
LINKS = "atp_fast/integrations"
EAP = "tests/integrations/test_eap.py"
MIB = "tests/integrations/test_eap_mib.py"
PRUNE = "tests/integrations/test_auto_circuit.py"
SPLIT = "tests/test_tensor_parallel.py -m 'not slow'"
GROUPS = "tests/test_tensor_parallel.py -k dead"
INTERPRETED = "INTERPRET tests/test_ops_triton.py -k 'window or side'"
PRODUCTS = "tests/test_linears.py -k product"
COMPILED = "tests/test_kernels_compile.py -k "

DICTS = "tests/test_dictionaries.py -k "

FAULTS = [
    # the product of linear layers, and what is tuned
    Fault(
        "csrc/linear.h",
        "std::min(c.rows, c.call.rows - row),",
        "c.rows,",
        PRODUCTS,
    ),
    Fault(
        "csrc/linear.h",
        "right + at * N * L)",
        "right + at * turned_width<R>)",
        PRODUCTS,
    ),
    Fault(
        "csrc/linear.h",
        "x + m * call.x_row + k, depth, last_rows",
        "x + m * call.x_row, depth, last_rows",
        PRODUCTS,
    ),
    Fault(
        "kernels/launch.py",
        "* parts >= _processors",
        "> _processors",
        COMPILED + "tuned",
    ),
    Fault(
        "kernels/launch.py",
        ", cache_results=True",
        "",
        COMPILED + "autotuning",
    ),
    Fault(
        "atp_fast/attribution/memory.py",
        "rows <= _FEW_ROWS",
        "rows < _FEW_ROWS",
        TWINS + " -k waited",
    ),
    # memory after a replay that had too little
    Fault(
        "atp_fast/attribution/replay.py",
        "recording.call(asked)\n        except torch.OutOfMemoryError:",
        "recording.call(asked)\n        except torch.OutOfMemoryError as error:\n            self._last = error",
        REPLAY + "free_again",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "recording.replay(asked)\n        except torch.OutOfMemoryError:",
        "recording.replay(asked)\n        except torch.OutOfMemoryError as error:\n            self._last = error",
        REPLAY + "free_again",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "*(_product_precision(), ",
        "*(",
        REPLAY + "settings_of_torch",
    ),
    # models that several processes share
    Fault(
        "atp_fast/attribution/adjoint.py",
        '"_EnteredBackward": _entered,',
        '"_EnteredBackward": _pass,',
        SPLIT,
    ),
    Fault(
        "atp_fast/attribution/tape.py",
        'manual_seed(1 + plug.shares.part("q"))',
        "manual_seed(1)",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/parallel.py",
        "if run.entered is None or run.entered[0] is not x:",
        "if True:",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/parallel.py",
        "_leaving(mapped(x, module.weight, None, backend), group)",
        "_leaving(mapped(x, module.weight, module.bias, backend), group)",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/parallel.py",
        "chosen, entered(weights, group)",
        "chosen, weights",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/parallel.py",
        "                place[name] = value\n",
        "                pass\n",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/shares.py",
        "return within // width == self.group.rank, block",
        "return within // width >= 0, block",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/shares.py",
        "block * width + within % width",
        "within % width",
        SPLIT,
    ),
    Fault(
        "atp_fast/hf/shares.py",
        "return torch.cat(parts, -1).flatten(-2)",
        "return torch.cat(parts, -2).flatten(-2)",
        SPLIT,
    ),
    Fault(
        "atp_fast/ops/collectives.py",
        "key=lambda x: (x != x, x)",
        "key=lambda x: (x == x, x)",
        SPLIT,
    ),
    Fault(
        "atp_fast/distributed/peers.py",
        "return [rank for rank in self._ranks if not",
        "return [rank for rank in self._ranks[:1] if not",
        SPLIT,
    ),
    Fault(
        "atp_fast/distributed/processes.py",
        "                if team.leads:\n",
        "                if True:\n",
        GROUPS,
    ),
    # dictionaries' features and error terms
    Fault(
        "atp_fast/attribution/scores.py",
        "carried, below = seat or (layer, kind)",
        "carried, below = layer, kind",
        DICTS + "equal_those",
    ),
    Fault(
        "atp_fast/hf/dictionaries.py",
        '(self.layer + 1, "resid_pre")',
        '(self.layer, "resid_pre")',
        DICTS + "equal_those",
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "slice(first + begin, min(first + end, stop))",
        "slice(first, min(first + end - begin, stop))",
        DICTS + "a_budget",
    ),
    Fault(
        "atp_fast/attribution/features.py",
        "known = max(added.get(name, 0) - first, 0)",
        "known = 0",
        DICTS + "out_of_memory",
    ),
    Fault(
        "atp_fast/attribution/features.py",
        "- (x - before)",
        "",
        DICTS + "single_nodes",
    ),
    Fault(
        "atp_fast/attribution/features.py",
        "corrupted - dictionary.decoded(to, x) - (",
        "corrupted - dictionary.decoded(to, corrupted) - (",
        DICTS + "scales",
    ),
    Fault(
        "atp_fast/hf/plug.py",
        "*(d.seat[0] for d in self.asked(kinds))",
        "*(d.seat[0] + 1 for d in self.asked(kinds))",
        DICTS + "lowest",
    ),
    # cotangents' walk, sums in place, both prompts together, norms and rotations
    Fault(
        "atp_fast/attribution/adjoint.py",
        "return [(grad, own and alone)] * 2",
        "return [(grad, own)] * 2",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "    arrived[number] = value, False\n",
        "    arrived[number] = value, True\n",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "    if node._saved_alpha != 1:\n        return None\n    alone",
        "    alone",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "or node._saved_alpha != 1:\n        return None\n    plain",
        "or False:\n        return None\n    plain",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "if step.inner and arrived and",
        "if not step.wanted and arrived and",
        WALK,
    ),
    Fault(
        "atp_fast/ops/pending.py",
        "own = own and before.is_contiguous()",
        "own = before.is_contiguous()",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "known = max(self.added.get(kind, 0) - first, 0)",
        "known = 0",
        "tests/test_memory.py -k out_of_memory",
    ),
    Fault(
        "csrc/add_effects.h",
        "if (i < 0 || i >= call.positions) continue;",
        "if (i >= call.positions) continue;",
        ADDED,
    ),
    Fault(
        "csrc/add_effects.h",
        "call.pair_signed ? first : score);",
        "call.pair_signed ? score : first);",
        ADDED,
    ),
    Fault(
        "kernels/add_effects.py",
        "pair_effect = tl.where(c == 0, found, pair_effect)",
        "pair_effect = found",
        f"INTERPRET {ADDED}",
    ),
    Fault(
        "kernels/add_effects.py",
        "tl.minimum((part + 1) * own, batch)",
        "tl.minimum((part + 1) * own + 1, batch)",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "range(part * own, tl.minimum(",
        "range(0 * own, tl.minimum(",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "    score += group_score\n",
        "",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "effect = tl.where(last, effect + group_effect, effect)",
        "effect = tl.where(last, group_effect, effect)",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "        left = tl.where(last, pairs, left)\n",
        "",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "before = inside & (tl.num_programs(1) == 1)",
        "before = inside",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "part.to(tl.int64) * stride_sp + column",
        "column",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "& (start + n < parts)",
        "& (start + n < parts - 1)",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "            total += loaded[n]\n",
        "            total += loaded[0]\n",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "None if effect is None else tables[1]",
        "None if effect is None else tables[0]",
        GROUPED,
    ),
    Fault(
        "kernels/add_effects.py",
        "_MOST_GROUPS, _NODES // block_m)",
        "_MOST_GROUPS)",
        COMPILED + "groups",
    ),
    Fault(
        "kernels/add_effects.py",
        "4 * math.prod(shape) <= _BYTES_OF_TABLES",
        "True",
        COMPILED + "groups",
    ),
    Fault(
        "kernels/add_effects.py",
        'do_not_specialize_on_alignment=["weights_ptr", "live_ptr", "first_ptr", "rows_ptr"],',
        "do_not_specialize_on_alignment=[],",
        COMPILED + "slices",
    ),
    Fault(
        "csrc/norm.h",
        "h[i] = (h[i] - level - n[i] * along) * rstd;",
        "h[i] = (h[i] - n[i] * along) * rstd;",
        NORMS,
    ),
    Fault(
        "kernels/norm.py",
        "        y = y.to(narrow.dtype).to(tl.float32)\n",
        "        y = y\n",
        f"INTERPRET {NORMS}",
    ),
    Fault(
        "kernels/rotate.py",
        "y2 = x2 * c2 - x1 * s1",
        "y2 = x2 * c2 - x1 * s2",
        f"INTERPRET {NORMS}",
    ),
    Fault(
        "kernels/rotate.py",
        "_TILE // max(block, beside)",
        "_TILE // block",
        COMPILED + "few_columns",
    ),
    Fault(
        "kernels/node_effects.py",
        "    rows2 = tl.cast(rows2, tl.int64)\n",
        "",
        COMPILED + "64_bits",
    ),
    Fault("atp_fast/hf/norms.py", "for offset in (0.0, 1.0)]", "for offset in (0.0,)]", TWINS),
    Fault("atp_fast/hf/rotations.py", "if count == 1:", "if count:", TWINS),
    Fault(
        "atp_fast/attribution/tape.py",
        "return self.values[kind].detach()[: self._rows]",
        "return self.values[kind].detach()[self._rows :]",
        TWINS,
    ),
    Fault(
        "atp_fast/attribution/tape.py",
        "return q, k, v, run.stats.rows(self._rows)",
        "return q, k, v, run.stats.rows(1)",
        TWINS,
    ),
    Fault(
        "atp_fast/attribution/tape.py",
        "            plug.layers[other].together = together\n",
        "            plug.layers[other].together = True\n",
        TWINS,
    ),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "    rest = iter(r if parts == 1 else r[:, : r.shape[1] // parts] for r in results)\n",
        "    rest = iter(results)\n",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "return [(torch.ops.aten.threshold_backward(plain, result, 0), True)]",
        "return [(torch.ops.aten.threshold_backward(plain, result, 1), True)]",
        WALK,
    ),
    Fault(
        "atp_fast/ops/functions.py",
        "x, rstd, mean = x[:rows], rstd[:rows],",
        "x, rstd, mean = x[-rows:], rstd[-rows:],",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        "tape = _tape_together if together else _tape_apart",
        "tape = _tape_apart",
        STARTS,
    ),
    Fault(
        "kernels/row_dots.py",
        'tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)',
        "lse * LOG2_E",
        "INTERPRET tests/test_ops_triton.py -k base_2",
    ),
    Fault(
        "kernels/launch.py",
        "return x.dtype, x.data_ptr() % 16, small",
        "return x.dtype, small",
        READY,
    ),
    Fault(
        "atp_fast/attribution/row_steps.py",
        "len(shape) == len(out) and shape[0] == out[0]",
        "len(shape) == len(out)",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/row_steps.py",
        "axes[0] in (0, -len(axes))",
        "True",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/row_steps.py",
        "and before[0] % parts == 0",
        "",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/row_steps.py",
        "if not axes or min(axes) == 0:\n        return False",
        "if not axes or min(axes) == 0:\n        return True",
        WALK,
    ),
    Fault("csrc/gate.h", "* (one - s) * inner", "* (one - s)", GATE),
    Fault(
        "csrc/gate.h",
        "call.grad_up, at(call.grad_up) + c *",
        "call.grad_up, at(call.grad_up) + 0 *",
        GATE,
    ),
    Fault("kernels/gate.py", "0.134145", "0.044715", f"INTERPRET {GATE}"),
    Fault("kernels/gate.py", "    slope *= up\n", "", f"INTERPRET {GATE}"),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "node is None or node in self._targets else",
        "node is None else",
        WALK,
    ),
    Fault("atp_fast/attribution/adjoint.py", "gate.shape != up.shape or ", "", WALK),
    Fault(
        "atp_fast/attribution/adjoint.py",
        "saved = step.node._saved_other, step.node._saved_self",
        "saved = step.node._saved_self, step.node._saved_other",
        WALK,
    ),
    Fault(
        "atp_fast/attribution/tape.py",
        "g.clone() if x is self.x and",
        "g if x is self.x and",
        SHAPES + " -k writes",
    ),
    Fault(
        "atp_fast/attribution/tape.py",
        "            self.run.prefix = None\n",
        "",
        "tests/test_memory.py -k shared_starts",
    ),
    Fault(
        "atp_fast/attribution/tape.py",
        "    except Exception:  #",
        "    except RuntimeError:  #",
        TWINS,
    ),
    Fault(
        "kernels/attention_vjp.py",
        "batch_head - head) * queries + head",
        "batch_head - head) * queries + kv_head",
        "INTERPRET tests/test_ops_triton.py -k vjp",
    ),
    Fault(
        "kernels/attention.py",
        "out_ptr += batch_head // heads * stride_ob + head * stride_oh",
        "out_ptr += batch_head // heads * stride_ob",
        "INTERPRET tests/test_ops_triton.py",
    ),
    Fault("kernels/launch.py", "choices if tunes else blocks, *numbers)", "*numbers)", READY),
    Fault(
        "kernels/launch.py",
        "ready.compiled[programs(ready.blocks), parts, 1](*values)",
        "ready.compiled[programs(blocks), parts, 1](*values)",
        READY,
    ),
    Fault(
        "kernels/launch.py",
        "            for number, value in ready.beside:\n                values[number] = value\n",
        "",
        READY,
    ),
    # replayed sweeps
    Fault(
        "atp_fast/attribution/batch.py",
        "start -= start % _STEP",
        "start -= start % -_STEP",
        REPLAY + "rounded",
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "positions if context is None else min(positions, context - start)",
        "positions",
        REPLAY + "steps_grow",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "        live=change(batch.live),\n",
        "",
        REPLAY + "asked",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "        source=part(batch.source),\n",
        "",
        REPLAY + "asked",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "prefix=None if batch.prefix is None else entered(batch.prefix)",
        "prefix=batch.prefix",
        REPLAY + "asked",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "        self._cotangent.copy_(cotangent)\n",
        "",
        REPLAY + "asked",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "self._holds[kind] = reads.found is None",
        "self._holds[kind] = True",
        REPLAY + "other_models",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "if all(map(torch.equal, found, wanted)) and recording.sums.equals(",
        "if all(map(torch.equal, found, wanted)) or recording.sums.equals(",
        REPLAY + "wrong",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "if state != self._state:",
        "if False:",
        REPLAY + "recorded_anew",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "or need > self._room // 2",
        "",
        REPLAY + "half_of",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "known.step *= 2",
        "pass",
        REPLAY + "take_turns",
    ),
    Fault(
        "atp_fast/attribution/replay.py",
        "recording = self._recorded[key] = self._recorded.pop(key)",
        "recording = self._recorded[key]",
        REPLAY + "take_turns",
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "if release():\n                continue",
        "if False:\n                continue",
        REPLAY + "needs_room",
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "rows.index_copy_(0, place.rows,",
        "rows.index_copy_(0, torch.arange(len(place.rows)),",
        REPLAY + "asked",
    ),
    # pairs that share a start, batches, padding
    Fault(
        "atp_fast/engine.py",
        "order = torch.argsort(pairs.split, descending=True, stable=True)\n        return list(torch.split(order, size))",
        "return list(torch.split(torch.arange(len(pairs)), size))[::-1][:-1] or [torch.arange(len(pairs))]",
        SWEEP,
    ),
    Fault(
        "atp_fast/engine.py",
        "corrupted_value[rows] = corrupted.to(clean_value)",
        "corrupted_value[rows] = clean.to(clean_value)",
        SWEEP,
    ),
    Fault(
        "atp_fast/engine.py",
        "clean_value[rows] = clean.to",
        "clean_value[: len(rows)] = clean.to",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "rows=None if table.pairs is None else place.rows,",
        "rows=None if table.pairs is None else torch.arange(len(place.rows)),",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "pair_signed=not self.method.graddrop,",
        "pair_signed=first == 0,",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/scores.py",
        "return cls(rows, slice(column, column + inside), live)",
        "return cls(rows, slice(0, inside), live)",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "bool((columns == first).all())",
        "bool((columns == first).any())",
        SWEEP,
    ),
    Fault(
        "atp_fast/ops/reference.py",
        "here = ((source >= 0) & (source < found.shape[2]))[..., None]",
        "here = (source < found.shape[2])[..., None]",
        ADDED,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "live = None if self.all_live else self.live",
        "live = None if self.any_live else self.live",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "columns = start + given.starts",
        "columns = given.starts",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "self.skip != 1 else cotangents[:1])",
        "self.skip != 1 else cotangents[-1:])",
        "tests/test_sweep.py -k equals_the_literal",
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        'self._given("k", found.effect_k[:, :, self.start :], first)',
        'self._given("k", found.effect_k[:, :, : found.effect_k.shape[2] - self.start], first)',
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "live = (columns >= pairs.split[:, None]) & (columns < pairs.lengths[:, None])",
        "live = (columns >= pairs.split[:, None]) & (columns <= pairs.lengths[:, None])",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "start = min(int(pairs.split.min()), int(shortest.min()) - 1)",
        "start = min(int(pairs.split.max()), int(shortest.min()) - 1)",
        SWEEP,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "start = min(int(pairs.split.min()), int(shortest.min()) - 1)",
        "start = min(int(pairs.split.min()), int(shortest.max()) - 1)",
        SPANS,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        'plug.keys_values(number, moved["resid_pre"], *given)',
        "pass",
        SPANS,
    ),
    Fault(
        "atp_fast/attribution/batch.py",
        "live = live & (source >= 0)",
        "pass",
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
        "        if self.spans is None:\n            self._add(kind, first, grad, (clean, corrupted))",
        "        if len(grad) > 1:\n            self._add(kind, first, grad, (clean, corrupted))",
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
        "atp_fast/attribution/batch.py",
        "if bool((prefix_ids == prefix_ids[:1]).all()):",
        "if bool((prefix_ids[:, :1] == prefix_ids[:1, :1]).all()):",
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
        "causal & (kv > q - width) if width else causal",
        "causal & (kv >= q - width) if width else causal",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/attention.py",
        "except (IndexError, RuntimeError):",
        "except IndexError:",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/plug.py",
        '_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})',
        '_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic"})',
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/inspection.py",
        '"nothing", "numbers", "skip and',
        '"nothing", "skip and',
        REFUSE,
    ),
    Fault("atp_fast/hf/plug.py", 'self._check_close("logits", self.logits(x), own)', "", REFUSE),
    Fault(
        "atp_fast/hf/plug.py",
        'self._check_close(f"layer {number}\'s output", streams[number + 1], eager)',
        "",
        REFUSE,
    ),
    Fault("atp_fast/hf/plug.py", "if run.calls > 1:", "if run.calls > 2:", REFUSE),
    # layers that differ, writes, attention in chunks
    Fault(
        "atp_fast/nodes.py",
        "bisect_right(self._starts, flat) - 1",
        "bisect_right(self._starts, flat - 1) - 1",
        SHAPES,
    ),
    Fault(
        "atp_fast/nodes.py",
        "if not 0 <= node.index < limit:",
        "if not 0 <= node.index <= limit:",
        SHAPES,
    ),
    Fault(
        "atp_fast/results/scores.py",
        "if kind in self.space.counts:",
        "if kind in ():",
        SHAPES + " -k listed",
    ),
    Fault(
        "atp_fast/results/scores.py",
        "np.cumsum(len(live) * counts)",
        "np.cumsum(len(live) * counts.max() + 0 * counts)",
        SHAPES + " -k listed",
    ),
    Fault(
        "atp_fast/patching/subsets.py",
        "np.repeat(live, n) for n in counts",
        "np.repeat(live, max(counts)) for n in counts",
        SHAPES + " -k listed",
    ),
    Fault(
        "atp_fast/results/attribution.py",
        "dict(widths), *by_layer)",
        "dict(widths))",
        SHAPES + " -k files",
    ),
    Fault(
        "atp_fast/attribution/sweep.py",
        "cotangents[:1] * self.skip if self.skip != 1 else cotangents[:1]",
        "cotangents[:1]",
        SHAPES + " -k beam",
    ),
    Fault("atp_fast/hf/inspection.py", "float(numbers[0])\n", "1.0\n", SHAPES + " -k beam"),
    Fault(
        "atp_fast/hf/inspection.py",
        "if len(others) == 1:",
        "if others:",
        SHAPES + " -k granitemoehybrid",
    ),
    Fault(
        "atp_fast/hf/inspection.py",
        '"MLP" if _alike(rows',
        '"MLP" if True or _alike(rows',
        "tests/test_served_models.py",
    ),
    Fault(
        "atp_fast/hf/plug.py",
        'lacking.setdefault("neuron", "has no down projection")',
        "pass",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/plug.py",
        '_COUNTED_FROM_0 = ("attn_temperature_tuning",)',
        "_COUNTED_FROM_0 = ()",
        CHUNKS,
    ),
    Fault(
        "atp_fast/hf/options.py", "skipped = first - first % self.chunk", "skipped = first", CHUNKS
    ),
    Fault("atp_fast/hf/options.py", "keys <= self.chunk", "queries <= self.chunk", CHUNKS),
    Fault(
        "atp_fast/hf/attention.py",
        "causal & (kv // width == q // width)",
        "causal & (kv // width >= q // width - 1)",
        CHUNKS,
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
        "                _require_grad(trained, True)",
        "                pass",
        STOP,
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "if p is not None and p.requires_grad",
        "if p is not None",
        STOP,
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "        finally:\n            running.reset(token)",
        "        except ZeroDivisionError:\n            running.reset(token)",
        "tests/test_engine.py",
    ),
    Fault(
        "atp_fast/hf/experts.py",
        "rows * experts.number + expert, experts",
        "expert * tokens + rows, experts",
        EXPERTS,
    ),
    Fault("atp_fast/hf/experts.py", "order.argsort()", "order", EXPERTS),
    Fault(
        "atp_fast/hf/experts.py",
        "if experts.transposed else",
        "if weights[number].shape[0] > weights[number].shape[1] else",
        EXPERTS,
    ),
    Fault("atp_fast/hf/experts.py", "None if biases is None else biases[number]", "None", EXPERTS),
    Fault(
        "atp_fast/hf/experts.py",
        "x = x * top_k_weights.reshape(-1).index_select(0, order)[:, None]",
        "x = x * top_k_weights.reshape(-1)[:, None]",
        EXPERTS,
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
        "atp_fast/results/report/__init__.py",
        "autoescape=True",
        "autoescape=False",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        "on {{ found.model }}</title>",
        "on {{ found.model|safe }}</title>",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        "on {{ found.model }}</h1>",
        "on {{ found.model|safe }}</h1>",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        'style="--share:{{ "%.3g"|format(piece.share) }}">{{ piece.text }}',
        'style="--share:{{ "%.3g"|format(piece.share) }}">{{ piece.text|safe }}',
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        "<mark>{{ piece.text }}</mark>",
        "<mark>{{ piece.text|safe }}</mark>",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        '<small dir="auto">{{ piece.name }}',
        '<small dir="auto">{{ piece.name|safe }}',
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        "<td>{{ row.token }}",
        "<td>{{ row.token|safe }}",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        "{{ bound.assumptions }}",
        "{{ bound.assumptions|safe }}",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/report/page.html",
        "{%- if piece.share -%}<mark>",
        "{%- if not piece.share -%}<mark>",
        f'{REPORT} -k "coloured or span"',
    ),
    Fault(
        "atp_fast/results/figures.py",
        "    return html.escape(text, quote=False)",
        "    return text",
        f"{REPORT} -k markup",
    ),
    Fault(
        "atp_fast/results/figures.py",
        "torch.split(values * share, size, dim=1)",
        "torch.split(values, size, dim=1)",
        f"{REPORT} -k columns",
    ),
    Fault(
        "atp_fast/results/figures.py",
        '"showSendToCloud": False',
        '"showSendToCloud": True',
        f"{PAGE} -k name",
    ),
    Fault(
        "atp_fast/results/report/texts.py",
        "skipped = max(0, len(prompt.tokens) - room)",
        "skipped = 0",
        f"{REPORT} -k long",
    ),
    Fault(
        "atp_fast/results/report/texts.py",
        "prompt.tokens[-kept:], prompt.columns[-kept:], shares",
        "prompt.tokens[:kept], prompt.columns[:kept], shares",
        f"{REPORT} -k long",
    ),
    Fault(
        "atp_fast/results/report/texts.py",
        "if prompts and len(prompt.tokens) > room:",
        "if len(prompts) == 3:",
        f'{REPORT} -k "long or largest"',
    ),
    Fault(
        "atp_fast/results/report/charts.py",
        "round(x, digits)",
        "x",
        f"{REPORT} -k largest",
    ),
    Fault(
        "atp_fast/results/report/checks.py",
        "if None not in (own, other) and own != other:",
        "if False:",
        f"{REPORT} -k refused",
    ),
    Fault(
        "atp_fast/results/report/checks.py",
        "return agreement(found.scored(exact.nodes), exact, found.method)",
        "return agreement(found.top(len(exact.nodes)), exact, found.method)",
        f"{REPORT} -k thousand",
    ),
    Fault(
        "atp_fast/results/prompts.py",
        "first = int(pairs.starts[row])",
        "first = 0",
        f"{REPORT} -k kept",
    ),
    Fault(
        "atp_fast/engine.py",
        "prompts=kept_prompts(run_pairs)",
        "prompts=kept_prompts(pairs)",
        f"{REPORT} -k kept",
    ),
    Fault(
        "atp_fast/results/attribution.py",
        '"prompts": self.prompts,',
        '"prompts": None,',
        f"{REPORT} -k kept",
    ),
    Fault(
        "atp_fast/cli/report.py",
        "bound=_bound(run) if run.is_dir() else None",
        "bound=None",
        f"{REPORT} -k folder",
    ),
    Fault(
        "atp_fast/files.py",
        'if _same_kind(found, wanted) else ""',
        'if not _same_kind(found, wanted) else ""',
        f"{REPORT} -k one_line",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        "Number.isNaN(x) - Number.isNaN(y)",
        "Number.isNaN(y) - Number.isNaN(x)",
        f"{PAGE} -k header",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        "names.includes(term)",
        "text.includes(term)",
        f"{PAGE} -k filter",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        "kinds.has(kind) &&",
        "",
        f"{PAGE} -k filter",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        'dark.matches ? "dark" : "light"',
        '"light"',
        f"{PAGE} -k dark",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        'dark.addEventListener("change", drawAll);\n',
        "",
        f"{PAGE} -k dark",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        '=== "rtl" ? -1 : 1',
        '=== "rtl" ? 1 : 1',
        f"{PAGE} -k arrows",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        '  prompts.addEventListener("focusin", follow);\n',
        "",
        f"{PAGE} -k keyboard",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        '  prompts.addEventListener("mouseleave", hideTip);\n',
        "",
        f"{PAGE} -k pointer",
    ),
    Fault(
        "atp_fast/results/report/page.js",
        "traces[0].x = data.columns",
        "traces[0].x = null",
        f'{PAGE} -k "texts or cell"',
    ),
    Fault(
        "atp_fast/results/report/page.css",
        "@media (prefers-color-scheme: dark)",
        "@media (prefers-contrast: more)",
        f"{PAGE} -k dark",
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
    # EAP-IG, MIB and auto-circuit
    Fault(
        f"{LINKS}/graph_shape.py",
        'for letter in "qkv" for name in heads), f"m{layer}"]',
        'for name in heads for letter in "qkv"), f"m{layer}"]',
        f"{EAP} -k nodes_and_edges",
    ),
    Fault(
        f"{LINKS}/graph_shape.py",
        'behind_heads = destination[0] == "m" and not self.parallel_attn_mlp',
        'behind_heads = destination[0] == "m"',
        f"{EAP} -k nodes_and_edges",
    ),
    Fault(
        f"{LINKS}/graph_shape.py",
        'value + noise * (1 + value.abs().max()) if kind == "attn_out" else value',
        "value",
        f"{EAP} -k shape_of_a_model",
    ),
    Fault(
        f"{LINKS}/graph_shape.py",
        "share = found.counts / len(found.clean_value)",
        "share = (found.counts > 0).double()",
        f"{EAP} -k llama-right",
    ),
    Fault(
        f"{LINKS}/graph_shape.py",
        "inputs[0], layers",
        "inputs[-1], layers",
        f"{EAP} -k llama-right",
    ),
    Fault(
        f"{LINKS}/graph_shape.py", "[heads, mlps], 2", "[mlps, heads], 2", f"{EAP} -k llama-right"
    ),
    Fault(f"{LINKS}/graph_shape.py", '"nll": False', '"nll": True', f"{EAP} -k positive"),
    Fault(
        f"{LINKS}/graph_shape.py",
        'if found.direction != "noising":',
        'if found.direction == "":',
        f"{EAP} -k fit",
    ),
    Fault(
        f"{LINKS}/eap.py",
        "matrix = projection(one) - projection(torch.zeros_like(one))",
        "matrix = projection(one)",
        f"{EAP} -k gpt2-right",
    ),
    Fault(
        f"{LINKS}/eap.py",
        "below = tape.from_attention(by_kind, skip)[0]",
        "below = skip[0]",
        f"{EAP} -k llama-right",
    ),
    Fault(
        f"{LINKS}/eap.py",
        "neurons=sign * neurons / len(pairs)",
        "neurons=sign * neurons / size",
        f"{EAP} -k llama-right",
    ),
    Fault(
        f"{LINKS}/eap.py",
        'delta = (corrupted["z"] - run.z.detach()) * live[:, None, :, None]',
        'delta = corrupted["z"] - run.z.detach()',
        f"{EAP} -k spans",
    ),
    Fault(
        f"{LINKS}/eap.py",
        'found[int(name.partition(".h")[2])] if found.ndim == 2',
        "found[-1] if found.ndim == 2",
        f"{EAP} -k neuron_json",
    ),
    Fault(
        f"{LINKS}/eap.py",
        'nodes[name]["score"] = score',
        'nodes[name]["score"] = abs(score)',
        f"{EAP} -k files",
    ),
    Fault(
        f"{LINKS}/eap.py",
        "for key, value in self.shape.cfg.items() if own[key] != value]",
        'for key, value in self.shape.cfg.items() if own[key] != value and key != "n_heads"]',
        f"{EAP} -k another_shape",
    ),
    Fault(
        f"{LINKS}/eap_faithfulness.py",
        "int(fraction * scored)",
        "round(fraction * scored)",
        f"{MIB} -k faithfulness",
    ),
    Fault(f"{LINKS}/eap_faithfulness.py", " | frozenset(unscored)", "", f"{MIB} -k faithfulness"),
    Fault(
        f"{LINKS}/eap_faithfulness.py",
        "(nodes.abs() if absolute else nodes)",
        "nodes",
        f"{MIB} -k faithfulness",
    ),
    Fault(
        f"{LINKS}/eap_faithfulness.py",
        "pairs.moving.any(0)",
        "pairs.moving.all(0)",
        f"{MIB} -k faithfulness",
    ),
    Fault(f"{LINKS}/eap_faithfulness.py", "abs(1 - value)", "(1 - value)", f"{MIB} -k areas"),
    Fault(f"{LINKS}/eap_faithfulness.py", "math.log(x)", "math.log10(x)", f"{MIB} -k areas"),
    Fault(
        f"{LINKS}/eap_faithfulness.py",
        'yield "mlp_out", layer, 0',
        'yield "attn_out", layer, 0',
        f"{MIB} -k faithfulness",
    ),
    Fault(
        f"{LINKS}/eap_data.py",
        "length == len(encoder.alone(words.wrong)) == 1",
        "length == 1",
        f"{MIB} -k sums",
    ),
    Fault(f"{LINKS}/eap_data.py", ' or row["operator"] != operator', "", f"{MIB} -k sums"),
    Fault(
        f"{LINKS}/eap_data.py", "wrong, (wrong, third))", "wrong, (wrong,))", f"{MIB} -k ioi_rows"
    ),
    Fault(
        f"{LINKS}/eap_data.py",
        "wrongs.append(encoder.alone(words.wrong)[0])",
        "wrongs.append(encoder.alone(words.wrong)[-1] + 1)",
        f"{MIB} -k ioi_rows",
    ),
    Fault(
        f"{LINKS}/auto_circuit.py",
        'shape.before(f"a{layer}.h0<q>")',
        'shape.before(f"m{layer}")',
        f"{PRUNE} -k every_edge",
    ),
    Fault(f"{LINKS}/auto_circuit.py", "heads.clone()", "heads", f"{PRUNE} -k tensors_of_their_own"),
    Fault(
        "atp_fast/cli/mib.py",
        "opened.pairs if pairs is None else read_file(pairs, opened.tokenizer)",
        "opened.pairs",
        f"{MIB} -k other_pairs",
    ),
    Fault(
        "atp_fast/cli/mib.py",
        '"effect" if scores == "effect" else "contribution"',
        '"effect"',
        f"{MIB} -k other_pairs",
    ),
    Fault(
        "atp_fast/metrics.py",
        "options = {p.name: False for p in parameters if p.name in",
        "options = {p.name: True for p in parameters if p.name in",
        f"{EAP} -k four_argument",
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
        "self.moves = self.error(rest, out[:, half:].detach()) <= self.tolerance(out)",
        "pass",
        REFUSE,
    ),
    Fault(
        "atp_fast/hf/inspection.py", "((terms - terms[:, :, :1]) / unit)", "(terms / unit)", REFUSE
    ),
    Fault("atp_fast/hf/inspection.py", "_ROUNDINGS = 8 ", "_ROUNDINGS = 1e30 ", REFUSE),
    Fault(
        "atp_fast/attribution/sweep.py",
        "inputs.append(grads[-1])",
        "inputs.append(cotangents)",
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
        "_warn_of_nothing(scores, run_pairs, asked.metric)",
        "pass",
        HARD + "vanish",
    ),
    Fault(
        "atp_fast/engine.py",
        "if none and scores.space.layers > 1 and",
        "if none and",
        HARD + "vanish",
    ),
    Fault(
        "atp_fast/hf/placement.py",
        "hook.weights_map, hook.offload = own, True",
        "hook.weights_map = own",
        FETCHED,
    ),
    Fault(
        "atp_fast/hf/placement.py",
        "hook.weights_map, hook.offload = own, True",
        "hook.offload = True",
        FETCHED,
    ),
    Fault(
        "atp_fast/hf/placement.py",
        "if self._ahead and stage + 1 < len(self._stages):",
        "if stage + 1 < len(self._stages):",
        "tests/test_streaming.py -k ahead",
    ),
    Fault(
        "atp_fast/hf/placement.py",
        "return value if in_memory else _read(value)",
        "return _read(value)",
        "tests/test_streaming.py -k not_copied",
    ),
    Fault(
        "atp_fast/hf/placement.py",
        "same = torch.equal(sent, sent.to(other).to(device).to(other).cpu())",
        "same = len(sent.to(other).to(device).to(other).cpu()) == 8",
        "tests/test_placement.py -k refused",
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "            if sum(sizes) > memory:",
        "            if min(sizes) > memory:",
        "tests/test_streaming.py -k below_one_layer",
    ),
    Fault(
        "atp_fast/hf/layers.py",
        "return logits if self._spread is None else logits.to(self.device)",
        "return logits",
        DEVICES,
    ),
    Fault(
        "atp_fast/attribution/runs.py",
        'at = self.source.clamp(min=0).to(values["resid_pre"].device)',
        "at = self.source.clamp(min=0)",
        DEVICES,
    ),
    Fault("atp_fast/attribution/scores.py", "here.score.copy_(away.score)", "pass", DEVICES),
    Fault(
        "atp_fast/attribution/streaming.py",
        "many = -(-plan.pairs // plan.sweep.pairs)",
        "many = 1",
        FETCHED,
    ),
    Fault("atp_fast/attribution/waiting.py", "self._folder.cleanup()", "pass", FILES),
    Fault(
        "atp_fast/attribution/waiting.py", "        os.unlink(self._path)", "        pass", FILES
    ),
    Fault(
        "atp_fast/patching/lockstep.py",
        "first = min(job.first for job in group)",
        "first = 0",
        "tests/test_streaming.py -k group_by_group",
    ),
    Fault(
        "atp_fast/patching/sessions.py",
        "self._keeps = self._together >= len(self.batches)",
        "self._keeps = False",
        "tests/test_streaming.py -k patching_fetches",
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
        crashes = dict.fromkeys((134, 139), "caught")
        verdicts = {0: "survived", 1: "caught", **crashes}
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
