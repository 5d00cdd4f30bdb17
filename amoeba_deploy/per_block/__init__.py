"""Per-block widths: for every block, whether it is kept and how many key/value groups and neurons of it.

Data flows options, costs -> surrogate -> problem -> exact, evolutionary -> pipeline -> report. docs/per_block_search.md
gives the formulas and their sources.
"""
