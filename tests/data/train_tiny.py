#!/usr/bin/env python3
"""Train, from scratch on a CPU, a small HF causal LM that really does induction, IOI, agreement,
greater-than and fact recall, on a synthetic word-level grammar. No download of any kind.

    python train_tiny.py --arch gpt2 --layers 4 --d 128 --heads 4 --out DIR [--seed 0] [--max-seconds 300]

--arch gpt2|llama|neox|gpt2-attn (gpt2 with the MLPs zeroed and frozen: attention-only). The output directory
holds a save_pretrained model, a word-level tokenizer and metrics.json. Deterministic for a given seed, torch
version and thread count when --max-seconds does not cut it short.
"""

import argparse, json, math, os, random, time
import torch, torch.nn.functional as F

NAMES = (
    "Mary John Tom Anna James Sarah Paul Laura Peter Kate Mark Alice Robert Emma David Lucy Daniel Jane Simon Rose "
    "Adam Clara Henry Nora Oscar Ruth Frank Ella Leo Maya Carl Iris Victor Dora Hugo Lena Max Tina Sam Eva"
).split()
PLACES = "store park school office station garden museum library market beach".split()
OBJS = "drink book ring key letter ball card coin pen map".split()
VERBS = "gave handed passed".split()
NOUN = [
    ("key", "keys"),
    ("dog", "dogs"),
    ("author", "authors"),
    ("cabinet", "cabinets"),
    ("man", "men"),
    ("book", "books"),
    ("teacher", "teachers"),
    ("car", "cars"),
    ("child", "children"),
    ("house", "houses"),
]
PREP = "near behind with beside".split()
ADJ = "old new red small good".split()
FACT = dict(
    France="Paris",
    Italy="Rome",
    Japan="Tokyo",
    Germany="Berlin",
    Spain="Madrid",
    Egypt="Cairo",
    Peru="Lima",
    Norway="Oslo",
    Greece="Athens",
    Cuba="Havana",
    Kenya="Nairobi",
    Austria="Vienna",
)
YEARS = [f"{i:02d}" for i in range(2, 99)]
RAND = [f"w{i}" for i in range(40)]
FUNC = "<pad> <bos> When Then After and went to the , a . were at arrived had is are The war lasted from year 17 capital of".split()


def vocab():
    v = []
    for w in (
        FUNC
        + NAMES
        + PLACES
        + OBJS
        + VERBS
        + [x for p in NOUN for x in p]
        + PREP
        + ADJ
        + list(FACT)
        + list(FACT.values())
        + YEARS
        + RAND
    ):
        if w not in v:
            v.append(w)
    return {w: i for i, w in enumerate(v)}


V = vocab()
T_IOI = [
    "When {A} and {B} went to the {P} , {S} {G} a {O} to {X} .",
    "Then {A} and {B} were at the {P} . {S} {G} a {O} to {X} .",
    "After {A} and {B} arrived at the {P} , {S} {G} a {O} to {X} .",
]


def ioi(r, kind=None, order=None, t=None, io=None, s=None, c=None):
    if io is None:
        io, s, c = r.sample(NAMES, 3)
    kind = kind or ("ABC" if r.random() < 0.15 else "IOI")
    a, b = (io, s) if (order or r.choice(("ABBA", "BABA"))) == "ABBA" else (s, io)
    subj = s if kind == "IOI" else c
    x = io if kind == "IOI" else r.choice((io, s))
    return (t or r.choice(T_IOI)).format(
        A=a, B=b, P=r.choice(PLACES), S=subj, G=r.choice(VERBS), O=r.choice(OBJS), X=x
    )


def agree(r):
    i, j = r.randrange(2), r.randrange(2)
    n, m = r.sample(NOUN, 2)
    if r.random() < 0.3:
        return f"The {n[i]} {('is', 'are')[i]} {r.choice(ADJ)} ."
    return f"The {n[i]} {r.choice(PREP)} the {m[j]} {('is', 'are')[i]} {r.choice(ADJ)} ."


def greater(r):
    i = r.randrange(0, len(YEARS) - 1)
    return f"The war lasted from the year 17 {YEARS[i]} to the year 17 {YEARS[r.randrange(i + 1, len(YEARS))]} ."


def fact(r):
    k = r.choice(list(FACT))
    return f"The capital of {k} is {FACT[k]} ."


def induct(r, n=None, k=None, gap=None):
    """k random tokens, a segment of n distinct random tokens, a gap, the segment again (start, length, gap all vary)."""
    n = n or r.randint(3, 11)
    room = 31 - 2 * n
    k = r.randint(0, min(8, room)) if k is None else k
    gap = r.randint(0, min(6, room - k)) if gap is None else gap
    w = r.sample(RAND, n + k + gap)
    return " ".join(w[n : n + k] + w[:n] + w[n + k :] + w[:n])


def recall(r):
    """a b / c d / a b / ...: m random pairs in random order, so that neither position nor offset nor "what is still
    missing" tells the next token: only "what followed this token before" does. With segments alone, a layer-0 head
    finds a positional shortcut and no induction circuit forms."""
    m = r.randint(2, 5)
    w = r.sample(RAND, 2 * m)
    return " ".join(w[2 * i] + " " + w[2 * i + 1] for i in (r.randrange(m) for _ in range(15)))


def parts(ids):
    """(start of the first copy, n, start of the second copy) of an encoded induct() line: its first repeated token"""
    seen = {}
    for i, t in enumerate(ids):
        if t in seen:
            n = len(ids) - i
            return seen[t], n, i
        seen[t] = i
    raise ValueError


def enc(s):
    return [V["<bos>"]] + [V[w] for w in s.split()]


def batch(r, B, L, phase):
    f = r.choices(
        (recall, induct, ioi, agree, greater, fact),
        (3, 2, 0, 0, 0, 0) if phase == 1 else (1.5, 1.5, 3, 0.6, 1, 0.4),
        k=B,
    )
    x, w = torch.full((B, L), V["<pad>"]), torch.ones(B, L)
    for i, g in enumerate(f):
        ids = enc(g(r))[:L]
        x[i, : len(ids)] = torch.tensor(ids)
        if g is induct:  # nothing can predict these tokens: little weight, or they drown the rest
            w[i, : parts(ids)[2] + 1] = 0.1
        elif g is recall:
            seen = set()
            for j in range(
                1, len(ids)
            ):  # keys are never predictable, values only from their second time on
                if j % 2 or ids[j] not in seen:
                    w[i, j] = 0.1
                seen.add(ids[j])
    return x, w * (x != V["<pad>"])


def make(arch, layers, d, heads, L):
    n = len(V)
    kw = dict(bos_token_id=V["<bos>"], eos_token_id=V["."], pad_token_id=V["<pad>"])
    if arch.startswith("gpt2"):
        from transformers import GPT2Config, GPT2LMHeadModel

        m = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=n,
                n_positions=L,
                n_embd=d,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                initializer_range=d**-0.5,
                attn_implementation="eager",
                **kw,
            )
        )
        # learned positions that start as sinusoids: a previous-token head is then a rotation, and forms far sooner
        p, f = (
            torch.arange(L)[:, None],
            torch.exp(-math.log(1000.0) * torch.arange(0, d, 2) / d)[None],
        )
        m.transformer.wpe.weight.data = (
            torch.cat([(p * f).sin(), (p * f).cos()], 1) * d**-0.5 * 2**0.5
        )
        if arch == "gpt2-attn":
            for b in m.transformer.h:
                for p in b.mlp.parameters():
                    p.data.zero_()
                    p.requires_grad_(False)
        return m
    if arch == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=n,
                hidden_size=d,
                intermediate_size=d * 8 // 3 // 8 * 8,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=max(1, heads // 2),
                max_position_embeddings=L,
                tie_word_embeddings=True,
                initializer_range=d**-0.5,
                attn_implementation="eager",
                **kw,
            )
        )
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=n,
            hidden_size=d,
            intermediate_size=4 * d,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=L,
            initializer_range=d**-0.5,
            attn_implementation="eager",
            **kw,
        )
    )


def tokenizer(L):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.WordLevel(vocab=V, unk_token="<pad>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", V["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<bos>", pad_token="<pad>", eos_token=".", model_max_length=L
    )


@torch.no_grad()
def evaluate(m, L, n=300, seed=10**6):
    r = random.Random(seed)  # held-out seed
    m.eval()

    def last(seqs):
        x = torch.full((len(seqs), L), V["<pad>"])
        for i, s in enumerate(seqs):
            x[i, : len(s)] = torch.tensor(s)
        lg = m(x, attention_mask=torch.ones_like(x)).logits.float()
        return lg[torch.arange(len(seqs)), torch.tensor([len(s) - 1 for s in seqs])]

    out = {}
    P, io, sj, C = [], [], [], []
    for i in range(n):
        a, b, c = r.sample(NAMES, 3)
        o, t = ("ABBA", "BABA")[i % 2], r.choice(T_IOI)
        st = r.getstate()
        p = enc(ioi(r, "IOI", o, t, a, b, c))
        r.setstate(st)
        q = enc(ioi(r, "ABC", o, t, a, b, c))
        P.append(p[:-2])
        C.append(q[:-2])
        io.append(V[a])
        sj.append(V[b])
    io, sj, k = torch.tensor(io), torch.tensor(sj), torch.arange(n)
    lg, cg = last(P), last(C)
    dl = lg[k, io] - lg[k, sj]
    out["ioi_logit_diff"] = float(dl.mean())
    out["ioi_frac_positive"] = float((dl > 0).float().mean())
    out["ioi_top1"] = float((lg.argmax(-1) == io).float().mean())
    out["ioi_ABC_logit_diff"] = float((cg[k, io] - cg[k, sj]).mean())
    out["ioi_ABC_abs_logit_diff"] = float((cg[k, io] - cg[k, sj]).abs().mean())
    A = [enc(agree(r)) for _ in range(n)]
    A = [a for a in A if len(a) == 9]
    good = torch.tensor([a[-3] for a in A])
    bad = torch.where(good == V["is"], V["are"], V["is"])
    g = last([a[:-3] for a in A])
    out["agreement_acc"] = float((g[range(len(A)), good] > g[range(len(A)), bad]).float().mean())
    G = [enc(greater(r)) for _ in range(n)]
    g = F.softmax(last([a[:-2] for a in G]), -1)
    yi = torch.tensor([V[y] for y in YEARS])
    d = []
    for a, p in zip(G, g):
        s = YEARS.index([w for w, i in V.items() if i == a[8]][0])
        d.append(float(p[yi[s + 1 :]].sum() - p[yi[: s + 1]].sum()))
    out["greater_than_prob_diff"] = sum(d) / len(d)
    g = last([enc(f"The capital of {c} is") for c in FACT]).argmax(-1)
    out["fact_acc"] = float((g == torch.tensor([V[c] for c in FACT.values()])).float().mean())
    for tag, rows in (
        ("induction", [enc(induct(r)) for _ in range(n)]),
        # never trained on: longer gaps and prefixes, so offsets and positions the model has not seen
        (
            "induction_unseen_layout",
            [enc(induct(r, 5, r.randint(9, 12), r.randint(7, 9))) for _ in range(n)],
        ),
    ):
        x = torch.full((n, L), V["<pad>"])
        for i, q in enumerate(rows):
            x[i, : len(q)] = torch.tensor(q)
        o = m(x, attention_mask=torch.ones_like(x), output_attentions=True)
        lg = o.logits.float()
        l = F.cross_entropy(lg[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(
            n, -1
        )
        hit = lg[:, :-1].argmax(-1) == x[:, 1:]
        fi, se, ac, bi, qi, ki = [], [], [], [], [], []
        for i, q in enumerate(rows):
            p0, k0, p1 = parts(q)
            fi.append(l[i, p0 : p0 + k0 - 1].mean())
            se.append(l[i, p1 : p1 + k0 - 1].mean())
            ac.append(hit[i, p1 : p1 + k0 - 1].float().mean())
            for j in range(k0 - 1):
                bi.append(i)
                qi.append(p1 + j)
                ki.append(p0 + j + 1)
        out[tag + "_first_loss"] = float(torch.stack(fi).mean())
        out[tag + "_second_loss"] = float(torch.stack(se).mean())
        out[tag + "_top1"] = float(torch.stack(ac).mean())
        if tag == "induction":
            heads = lambda dq, dk: sorted(
                [
                    (round(float(A_[bi, j][range(len(bi)), qi_, ki_].mean()), 2), f"{i}.{j}")
                    for i, A_ in enumerate(o.attentions)
                    for j in range(A_.shape[1])
                    for qi_, ki_ in [([z + dq for z in qi], [z + dk for z in ki])]
                ],
                reverse=True,
            )[:4]
            out["induction_heads"] = heads(0, 0)
            pv = [([z for z in qi], [z - 1 for z in qi])]
            out["previous_token_heads"] = sorted(
                [
                    (
                        round(float(A_[bi, j][range(len(bi)), pv[0][0], pv[0][1]].mean()), 2),
                        f"{i}.{j}",
                    )
                    for i, A_ in enumerate(o.attentions)
                    for j in range(A_.shape[1])
                ],
                reverse=True,
            )[:4]
    m.train()
    return out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--arch", default="gpt2")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--d", type=int, default=128)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--opt", default="muon")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--max-seconds", type=float, default=540)
    p.add_argument("--out", default="")
    p.add_argument("--stop", type=int, default=1, help="stop early once every behaviour is there")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    L = 32
    r = random.Random(a.seed)
    m = make(a.arch, a.layers, a.d, a.heads, L)
    base = evaluate(m, L)

    # Muon (in torch >= 2.9) on the blocks' matrices, AdamW on the rest: the induction circuit forms in about half the time
    def hidden(n, q):
        return (
            a.opt == "muon"
            and q.dim() == 2
            and not any(w in n for w in ("wte", "wpe", "embed", "lm_head"))
        )

    P = [(n, q) for n, q in m.named_parameters() if q.requires_grad]
    opts = [
        torch.optim.AdamW(
            [q for n, q in P if not hidden(n, q)], lr=a.lr, betas=(0.9, 0.98), weight_decay=0.01
        )
    ]
    if a.opt == "muon":
        opts.append(
            torch.optim.Muon(
                [q for n, q in P if hidden(n, q)],
                lr=a.lr,
                weight_decay=0.01,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    print(
        f"{a.arch} {a.layers}L d={a.d} h={a.heads} vocab={len(V)} params={sum(q.numel() for q in m.parameters()) / 1e6:.2f} M",
        flush=True,
    )
    print(
        "  untrained:",
        {k: (round(v, 3) if isinstance(v, float) else v) for k, v in base.items()},
        flush=True,
    )
    t0 = time.time()
    hist = []
    done = 0
    # phase 1: induction alone, until it is there (trained on everything at once, a small model settles for
    # heuristics such as "a token of the segment not yet repeated"); phase 2: the whole mix, --steps long, lr decaying
    phase, start, step = 1, 0, 0
    while step - start < a.steps or phase == 1:
        step += 1
        lr = (
            a.lr
            * min(1, step / 100)
            * (
                1
                if phase == 1
                else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - start) / a.steps))
            )
        )
        for o in opts:
            for g in o.param_groups:
                g["lr"] = lr
            o.zero_grad()
        x, w = batch(r, a.batch, L, phase)
        lg = m(
            x, attention_mask=torch.ones_like(x)
        ).logits  # padding is on the right: causality hides it
        loss = F.cross_entropy(lg[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        loss = (loss * w[:, 1:].flatten()).sum() / w[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        for o in opts:
            o.step()
        if step % 250 == 0 or (phase == 2 and step - start == a.steps):
            e = evaluate(m, L, n=200)
            e.update(step=step, seconds=round(time.time() - t0, 1), loss=float(loss.detach()))
            hist.append(e)
            e["phase"] = phase
            print(
                "  %d %5d %6.1fs loss %.3f | ioi ld %.2f top1 %.2f (ABC %.2f) | ind %.2f->%.2f top1 %.2f (unseen layout %.2f) | agr %.2f gt %.2f fact %.2f | ind heads %s prev %s"
                % (
                    phase,
                    step,
                    e["seconds"],
                    e["loss"],
                    e["ioi_logit_diff"],
                    e["ioi_top1"],
                    e["ioi_ABC_logit_diff"],
                    e["induction_first_loss"],
                    e["induction_second_loss"],
                    e["induction_top1"],
                    e["induction_unseen_layout_top1"],
                    e["agreement_acc"],
                    e["greater_than_prob_diff"],
                    e["fact_acc"],
                    e["induction_heads"][:2],
                    e["previous_token_heads"][:2],
                ),
                flush=True,
            )
            if phase == 1 and e["induction_top1"] > 0.95:
                phase, start = 2, step
                print(f"  phase 2 from step {step}, {e['seconds']} s", flush=True)
            ok = (
                phase == 2
                and e["ioi_top1"] > 0.98
                and e["induction_top1"] > 0.98
                and e["agreement_acc"] > 0.98
                and e["greater_than_prob_diff"] > 0.85
                and e["fact_acc"] == 1
            )
            done = done + 1 if ok else 0
            if (a.stop and done >= 2) or time.time() - t0 > a.max_seconds:
                break
    fin = evaluate(m, L, n=1000, seed=2 * 10**6)
    fin.update(
        steps=step,
        seconds=round(time.time() - t0, 1),
        arch=a.arch,
        layers=a.layers,
        d=a.d,
        heads=a.heads,
        seed=a.seed,
    )
    print(
        "  final (1000 held-out):",
        {k: (round(v, 3) if isinstance(v, float) else v) for k, v in fin.items()},
        flush=True,
    )
    if a.out:
        m.eval()
        m.save_pretrained(a.out)
        tokenizer(L).save_pretrained(a.out)
        json.dump(
            dict(untrained=base, final=fin, history=hist),
            open(os.path.join(a.out, "metrics.json"), "w"),
            indent=1,
        )
        sz = sum(os.path.getsize(os.path.join(a.out, f)) for f in os.listdir(a.out))
        print(f"  saved {a.out}: {sz / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
