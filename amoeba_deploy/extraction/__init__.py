"""From a plan to a dense model folder: cutting tensors, compensation, layouts, and the folder itself.

Data flows cutting -> compensation -> ragged -> folder; ``native_layouts`` and ``layout_cost`` say what engines with
blocks of different widths want, and what padding costs.
"""
