"""Spans: named groups of tokens scored and patched as one, also where the prompts of a pair differ in length."""

import pytest
import torch

import zoo
from atp_fast import Engine, PromptPairs
from atp_fast.attribution.literal import literal_attribution
from atp_fast.nodes import KINDS, Node
from atp_fast.prompts.spans import Spans
from tokenizers_for_tests import bpe

FAMILIES = ("llama", "gpt2")


def build(family):
    return zoo.build(family, wide_norms=True)


def pairs_of(rows, *, padding_side="right", names=None):
    """rows: (clean ids, corrupted ids, spans, corrupted spans) of each pair."""
    width = max(max(len(row[0]), len(row[1])) for row in rows)
    ids, masks = [], []
    for side in (0, 1):
        table = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(table.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            first = 0 if padding_side == "right" else width - len(row[side])
            table[i, first : first + len(row[side])] = torch.tensor(row[side])
            mask[i, first : first + len(row[side])] = True
        ids.append(table)
        masks.append(mask)
    return PromptPairs(
        *ids,
        torch.arange(1, len(rows) + 1),
        torch.arange(11, len(rows) + 11),
        attention_mask=masks[0],
        corrupted_attention_mask=masks[1],
        spans=Spans.of([row[2] for row in rows], [row[3] for row in rows]),
    )


UNEQUAL = [
    # the corrupted prompt is longer in "a"; "end" is moved by two
    ([5, 6, 7, 8, 9, 10], [5, 6, 17, 18, 7, 19, 9, 20], {"a": (2, 4), "end": (4, 6)}, {"a": (2, 6), "end": (6, 8)}),
    # shorter in "a", whose first token stands for nothing; "b" comes after a token without a span
    (
        [3, 4, 5, 6, 7, 8, 9, 12],
        [3, 14, 6, 7, 8, 9, 13],
        {"a": (1, 4), "b": (5, 7), "end": (7, 8)},
        {"a": (1, 3), "b": (4, 6), "end": (6, 7)},
    ),
    # equal lengths, but the spans have changed places; no span "b"
    ([2, 21, 22, 23, 24, 25], [2, 23, 24, 21, 22, 25], {"a": (1, 3), "end": (3, 6)}, {"a": (3, 5), "end": (5, 6)}),
    # the token that stands for clean position 1 lies before the first difference
    ([7, 7, 8, 9], [7, 8, 9], {"a": (0, 2), "end": (2, 4)}, {"a": (0, 1), "end": (1, 3)}),
]  # fmt: skip
EQUAL = [
    ([5, 6, 7, 8, 9, 10], [5, 6, 17, 8, 19, 10], {"a": (2, 4), "end": (4, 6)}, {"a": (2, 4), "end": (4, 6)}),
    ([3, 4, 5, 6], [3, 14, 5, 16], {"b": (0, 3), "end": (3, 4)}, {"b": (0, 3), "end": (3, 4)}),
]  # fmt: skip


class Hooked:
    """A tiny Llama or GPT-2 run through hooks that know nothing of ours: values, patches and gradients of its nodes."""

    def __init__(self, model):
        self.model, config = model, model.config
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.llama = config.model_type == "llama"
        self.layers = model.model.layers if self.llama else model.transformer.h

    def places(self, layer):
        """kind -> (module, whether the value is its output, the columns of head or neuron `index`)."""
        block, d, hidden = self.layers[layer], self.dim, self.model.config.hidden_size

        def head(first):
            return lambda index: slice(first + index * d, first + (index + 1) * d)

        def one(index):
            return slice(index, index + 1)

        def everything(index):
            return slice(None)

        if self.llama:
            a = block.self_attn
            return {
                "q": (a.q_proj, True, head(0)),
                "k": (a.k_proj, True, head(0)),
                "v": (a.v_proj, True, head(0)),
                "z": (a.o_proj, False, head(0)),
                "neuron": (block.mlp.down_proj, False, one),
                "attn_out": (a.o_proj, True, everything),
                "mlp_out": (block.mlp.down_proj, True, everything),
                "resid_pre": (block, False, everything),
            }
        a = block.attn
        return {
            "q": (a.c_attn, True, head(0)),
            "k": (a.c_attn, True, head(hidden)),
            "v": (a.c_attn, True, head(2 * hidden)),
            "z": (a.c_proj, False, head(0)),
            "neuron": (block.mlp.c_proj, False, one),
            "attn_out": (a.c_proj, True, everything),
            "mlp_out": (block.mlp.c_proj, True, everything),
        }

    def run(self, ids, patches=(), grad=False):
        """Logits of the last position and (module, is output) -> value; patches: (module, is output, at, value)."""
        seen, handles = {}, []

        def note(module, output):
            def change(value):
                for where, is_output, (position, columns), new in patches:
                    if where is module and is_output == output:
                        value = value.clone()
                        value[0, position, columns] = new
                if grad and not value.requires_grad:
                    value = value.requires_grad_()
                seen[module, output] = value
                return value

            if output:
                return module.register_forward_hook(lambda m, a, out: change(out))
            return module.register_forward_pre_hook(lambda m, a: (change(a[0]), *a[1:]))

        modules = {place[:2] for i in range(len(self.layers)) for place in self.places(i).values()}
        try:
            handles += [note(*place) for place in modules]
            with torch.set_grad_enabled(grad):
                logits = self.model(torch.tensor([ids])).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen


def sources(row, name):
    """Clean position -> corrupted position of one span, aligned from the end."""
    (a, b), (c, d) = row[2][name], row[3][name]
    return {t: d - (b - t) for t in range(a, b) if d - (b - t) >= c}


def naive_effects(model, row, answer, wrong, node_of, kinds, linear):
    """kind -> effect of patching all positions of a span at once, or the sum of grad . delta over them, by span name."""
    hooked = Hooked(model)
    metric = lambda logits: logits[answer] - logits[wrong]  # noqa: E731
    logits, clean = hooked.run(row[0], grad=linear)
    _, corrupted = hooked.run(row[1])
    before = metric(logits)
    if linear:
        keys = list(clean)
        grads = torch.autograd.grad(before, [clean[key] for key in keys], allow_unused=True)
        gradient = dict(zip(keys, grads, strict=True))
    found = {}
    for kind in kinds:
        for layer in range(len(hooked.layers)):
            module, output, columns = hooked.places(layer)[kind]
            at = columns(node_of[kind])
            for name in row[2]:
                moved = sources(row, name)
                if linear:
                    found[kind, layer, name] = sum(
                        float(
                            (
                                corrupted[module, output][0, s, at]
                                - clean[module, output][0, t, at].detach()
                            )
                            @ gradient[module, output][0, t, at]
                        )
                        for t, s in moved.items()
                    )
                    continue
                patches = [
                    (module, output, (t, at), corrupted[module, output][0, s, at])
                    for t, s in moved.items()
                ]
                found[kind, layer, name] = float(metric(hooked.run(row[0], patches)[0]) - before)
    return found


NODE_OF = {"q": 1, "k": 1, "v": 0, "z": 2, "neuron": 3, "attn_out": 0, "mlp_out": 0, "resid_pre": 0}


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_spans_of_unequal_prompts_are_patched_as_hooks_do(family, direction, padding_side):
    model = build(family)
    pairs = pairs_of(UNEQUAL, padding_side=padding_side)
    kinds = [kind for kind in KINDS if kind in Hooked(model).places(0)]
    nodes = [
        Node(kind, layer, span, NODE_OF[kind])
        for kind in kinds
        for layer in range(len(Hooked(model).layers))
        for span in range(len(pairs.spans.names))
    ]
    found = Engine(model).patch(pairs, nodes, direction=direction)
    for i, row in enumerate(UNEQUAL):
        if direction == "denoising":
            row = (row[1], row[0], row[3], row[2])
        naive = naive_effects(model, row, i + 1, i + 11, NODE_OF, kinds, linear=False)
        for j, node in enumerate(nodes):
            name = pairs.spans.names[node.position]
            assert bool(found.valid[i, j]) == (name in row[2])
            expected = naive.get((node.kind, node.layer, name), 0.0)
            assert float(found.effect[i, j]) == pytest.approx(expected, abs=1e-10), (i, node, name)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_spans_are_sums_of_signed_effects(family, budget):
    model = build(family)
    pairs = pairs_of(UNEQUAL)
    kinds = [kind for kind in KINDS if kind in Hooked(model).places(0)]
    found = Engine(model, memory_budget=budget).attribute(
        pairs, method="atp", nodes=kinds, per_pair=True
    )
    assert found.tokens == ["a", "end", "b"] and found.counts.tolist() == [4, 4, 1]
    for i, row in enumerate(UNEQUAL):
        naive = naive_effects(model, row, i + 1, i + 11, NODE_OF, kinds, linear=True)
        for (kind, layer, name), expected in naive.items():
            span = found.tokens.index(name)
            got = float(found.per_pair[kind][i, layer, span, NODE_OF[kind]])
            assert got == pytest.approx(expected, abs=1e-10), (i, kind, layer, name)
    for kind, x in found.per_pair.items():
        counts = found.counts[:, None]
        torch.testing.assert_close(found.effect[kind], x.sum(0) / counts)
        torch.testing.assert_close(found.contribution[kind], x.abs().sum(0) / counts)


def test_the_fix_of_queries_and_keys_sums_over_a_span_of_moved_tokens():
    model = build("llama")
    hooked, pairs = Hooked(model), pairs_of(UNEQUAL)
    found = Engine(model).attribute(pairs, method="atp+qk", nodes=("q", "k"), per_pair=True)
    for i, row in enumerate(UNEQUAL):
        logits, clean = hooked.run(row[0], grad=True)
        _, corrupted = hooked.run(row[1])
        value = logits[i + 1] - logits[i + 11]
        for layer in range(len(hooked.layers)):
            z = hooked.places(layer)["z"][:2]
            grad = torch.autograd.grad(value, clean[z], retain_graph=True)[0]
            for kind in ("q", "k"):
                module, output, columns = hooked.places(layer)[kind]
                at = columns(1)
                for name in row[2]:
                    expected = 0.0
                    for t, s in sources(row, name).items():
                        patch = (module, output, (t, at), corrupted[module, output][0, s, at])
                        moved = hooked.run(row[0], [patch])[1][z]
                        expected += float(((moved - clean[z].detach()) * grad).sum())
                    got = found.per_pair[kind][i, layer, pairs.spans.names.index(name), 1]
                    assert float(got) == pytest.approx(expected, abs=1e-10), (i, layer, kind, name)


@pytest.mark.parametrize("method", ["atp", "atp+qk", "atp+graddrop", "atp*"])
@pytest.mark.parametrize("budget", [None, 1])
def test_spans_equal_the_literal_code(method, budget):
    model, pairs = build("llama"), pairs_of(EQUAL)
    found = Engine(model, memory_budget=budget).attribute(
        pairs, method=method, nodes=KINDS, per_pair=True
    )
    contribution, effect, per_pair = literal_attribution(model, pairs, method=method, nodes=KINDS)
    for kind in KINDS:
        for got, wanted in (
            (found.contribution[kind], contribution[kind]),
            (found.effect[kind], effect[kind]),
            (found.per_pair[kind], per_pair[kind]),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_spans_of_single_tokens_are_positions():
    rows = [
        (row[0], row[1], *[{str(t): (t, t + 1) for t in range(len(row[0]))}] * 2) for row in EQUAL
    ]
    pairs, model = pairs_of(rows), build("gpt2")
    engine = Engine(model)
    by_span = engine.attribute(pairs, nodes=("k", "neuron"))
    by_position = engine.attribute(pairs.without_spans(), nodes=("k", "neuron"))
    for kind in ("k", "neuron"):
        torch.testing.assert_close(
            by_span.contribution[kind], by_position.contribution[kind], rtol=1e-10, atol=1e-13
        )
    assert by_span.counts.tolist() == by_position.counts.tolist()


def test_a_span_patches_all_its_positions_at_once():
    pairs, engine = pairs_of(EQUAL), Engine(build("llama"))
    whole = engine.patch(pairs, [Node("z", 0, 0, 1), Node("z", 1, 1, 0)])
    plain = pairs.without_spans()
    for i, subsets in enumerate(
        ([[Node("z", 0, 2, 1), Node("z", 0, 3, 1)], [Node("z", 1, 4, 0), Node("z", 1, 5, 0)]], [[], [Node("z", 1, 3, 0)]])
    ):  # fmt: skip
        apart = engine.patch_subsets(plain[[i]], subsets)
        torch.testing.assert_close(whole.effect[i], apart.effect[0], rtol=1e-10, atol=1e-13)
    assert whole.valid.tolist() == [[True, True], [False, True]]


def test_batches_shards_and_copies_keep_spans(tmp_path):
    pairs = pairs_of(UNEQUAL)
    engine = Engine(build("llama"))
    whole = engine.attribute(pairs, per_pair=True)
    for other in (
        PromptPairs.concat([pairs[[0]], pairs[[2, 1, 3]]])[[0, 2, 1, 3]],
        pairs.swapped().swapped().right_padded(),
        pairs_of(UNEQUAL, padding_side="left"),
    ):
        assert other.digest() == pairs.digest()
        found = engine.attribute(other, per_pair=True)
        spans = [found.tokens.index(name) for name in whole.tokens]
        for kind, x in whole.per_pair.items():
            torch.testing.assert_close(found.per_pair[kind][:, :, spans], x, rtol=1e-9, atol=1e-12)
    changed = pairs_of(
        [(*UNEQUAL[0][:2], {"a": (2, 4), "end": (4, 5)}, {"a": (2, 6), "end": (6, 7)})]
    )
    assert changed.digest() != pairs[[0]].digest()

    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    read = PromptPairs.from_jsonl(tmp_path / "pairs.jsonl", bpe())
    assert read.digest() == pairs.digest() and read.spans.names == pairs.spans.names


def test_the_bound_is_about_spans_that_can_move():
    pairs, engine = pairs_of(UNEQUAL), Engine(build("llama"))
    bound = engine.bound_missed(pairs, nodes=("z",), forwards=400, probability=0.3)
    assert {node.position for node in bound.nodes} == {0, 1, 2}
    still = pairs_of([([2, 3, 4], [2, 3, 5], *[{"same": (0, 2), "end": (2, 3)}] * 2)])
    assert still.moving.tolist() == [[False, True]]


def test_identical_pairs_beside_longer_ones_keep_their_own_last_token():
    rows = [([2, 3], [2, 3]), ([4, 5, 6, 7, 8], [4, 5, 6, 7, 9])]
    ids = [
        torch.tensor([[*row[side], *[0] * (5 - len(row[side]))] for row in rows]) for side in (0, 1)
    ]
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    with pytest.warns(UserWarning, match="identical in 1"):
        pairs = PromptPairs(*ids, torch.tensor([1, 2]), torch.tensor([11, 12]), attention_mask=mask)
    model = build("llama")
    found = Engine(model).attribute(pairs, nodes=("z",))
    for i, row in enumerate(rows):
        logits = model(torch.tensor([row[0]])).logits[0, -1].detach()
        assert float(found.clean_value[i]) == pytest.approx(float(logits[i + 1] - logits[i + 11]))
