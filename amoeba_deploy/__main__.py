"""``python -m amoeba_deploy`` is the same as the command ``amoeba``."""

from amoeba_deploy.cli import main

main()
