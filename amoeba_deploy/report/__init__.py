"""The report: one page on a checkpoint for those who decide what ships, with nothing measured and nothing loaded.

``asked`` resolves the options, ``case`` and ``board`` hold what a search chooses at every budget, ``kept`` which units
shapes keep, ``quality`` what was measured of them, ``left_out`` how well latencies are predicted, ``built`` what is in
bundles. ``document`` writes all that as HTML, ``page`` puts it into one file with the charts and their script.
"""
