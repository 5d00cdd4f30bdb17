"""Pictures of what was searched and measured, from one Vega-Lite specification each for a page and for an image.

``front`` draws quality over latency, ``heatmap`` latency over depth and width, ``curves`` how latency falls with either
alone; each makes sections of plain data. ``page`` writes sections to a file. Needs the extra ``plot``.
"""
