"""Stage 1: from a model and calibration data to a selection of blocks, heads and neurons.

Data flows calibration -> blocks -> states -> removal -> depth, and calibration -> moments, gradients -> importance;
``pipeline`` joins them.
"""
