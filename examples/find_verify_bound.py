"""The whole way on your own prompts: find nodes by AtP*, patch the best exactly, bound what was missed.

python examples/find_verify_bound.py --model smollm2-135m
"""

import argparse

from atp_fast import Engine, PromptPairs, load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m", help="hub id, folder or smollm2-135m")
parser.add_argument("--verify", type=int, default=50, help="nodes that are patched exactly")
parser.add_argument("--forwards", type=int, default=1000, help="subsets patched for the bound")
options = parser.parse_args()

model, tokenizer = load_model(options.model)
pairs = PromptPairs.from_text(
    tokenizer,
    clean=["Mary and John went to the store and John gave a drink to"],
    corrupted=["Mary and John went to the store and Mary gave a drink to"],
    answers=[" Mary"],
    wrong_answers=[" John"],
)
engine = Engine(model)
kinds = ("q", "k", "v", "z")

found = engine.attribute(pairs, metric="logit_diff", method="atp*", nodes=kinds)
best = found.top(options.verify)
exact = engine.patch(pairs, best, metric="logit_diff")
print("estimated  exact     node")
for node, effect in list(zip(best, exact.mean.tolist(), strict=True))[:10]:
    print(f"{node.effect:+9.4f}  {effect:+9.4f} {node}")

bound = engine.bound_missed(
    pairs, exclude=best, metric="logit_diff", nodes=kinds, forwards=options.forwards
)
print(bound)
