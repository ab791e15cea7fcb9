"""In: prompt pairs and a plugged model. Out: scores of every node, by AtP and its repairs.

May import: prompts, metrics, ops, hf and what stands before them.
"""
