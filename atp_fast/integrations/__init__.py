"""In: models, caches and metrics of other libraries. Out: our scores in their formats; one module per library.

May import: engine and what stands before it. No library is imported before its module is.
"""
