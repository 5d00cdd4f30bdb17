"""Amoeba: derive a subnet of any depth and width from one checkpoint, and build an engine of it for a device.

Data flows one way through the modules: checkpoint -> shape -> plan -> tensors -> model folder -> engine ->
measurement -> table -> search -> bundle. A module imports only from what stands before it on that line, and heavy
libraries (torch, transformers, onnxruntime) are imported inside the functions that use them.
"""

__version__ = "0.1.0"
