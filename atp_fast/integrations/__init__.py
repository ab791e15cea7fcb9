"""In: models and results of other libraries. Out: theirs from ours, ours from theirs; one module per library.

May import: engine and what stands before it. No library is imported before its module is.
"""
