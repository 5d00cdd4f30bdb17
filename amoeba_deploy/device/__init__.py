"""Bundles on a device: two slots, of which one runs, and a switch between them that a fault at any moment cannot spoil.

``install`` fetches, verifies and switches; ``recovery`` undoes what was cut off; docs/device.md says what is promised.
Nothing here needs what bundles are built with.
"""
