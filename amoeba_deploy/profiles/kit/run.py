#!/usr/bin/env python3
"""Measures the engines in this folder on this machine; ``python3 run.py -h`` says how."""

import sys
from pathlib import Path

if sys.version_info < (3, 9):  # noqa: UP036 - a device's own may be any
    sys.exit(f"run.py needs Python 3.9 or newer, and this is {sys.version.split()[0]}; start it with another python3")

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "package"))

if __name__ == "__main__":
    try:
        import numpy  # noqa: F401
    except ImportError:
        sys.exit("run.py needs numpy beside the engine's own package; run: python3 -m pip install numpy")
    from amoeba_deploy.profiles.kit.runner import main

    sys.exit(main(FOLDER, sys.argv[1:]))
