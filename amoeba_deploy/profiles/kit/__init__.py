"""Kits: folders that measure engines on a device which cannot hold the whole of Amoeba.

``form`` and ``results`` are the two files; ``writer`` builds a kit here; ``runner`` measures on the device, with the
part of this package that the kit carries (``carried``); ``remote`` does both over ssh. What the device imports (form,
results, runner, own_tools) needs the standard library, numpy and the engine alone, and Python 3.9.
"""
