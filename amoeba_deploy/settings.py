"""``amoeba.toml`` in the working folder: which checkpoint commands take when none is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

from amoeba_deploy.errors import BadInput

SETTINGS = "amoeba.toml"


def configured_checkpoint(folder: Path = Path()) -> Path | None:
    """The ``checkpoint`` of ./amoeba.toml, relative to it, or None; raises BadInput where the file is damaged."""
    file = folder / SETTINGS
    if not file.is_file():
        return None
    try:
        value = tomllib.loads(file.read_text(encoding="utf-8")).get("checkpoint")
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: is not valid TOML ({error})") from None
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadInput(f"{file}: 'checkpoint' must be the path of a checkpoint folder")
    return folder / value
