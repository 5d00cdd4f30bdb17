"""Losses that were measured once, in the cache folder: a search that was interrupted goes on from them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import cache_folder, json_text, read_json, whole_file
from amoeba_deploy.per_block.options import BlockOption

RISES_FORMAT = "amoeba.block-rises/1"


@dataclass
class SavedLosses:
    """Losses of a text and a checkpoint in the cache folder: one file a block, and one of the whole model."""

    folder: Path
    identity: dict[str, Any]
    blocks: list[dict[BlockOption, float]]
    whole: float | None
    depths: dict[int, float]

    @classmethod
    def of(cls, identity: dict[str, Any], depth: int) -> SavedLosses:
        """What is there already."""
        key = hashlib.sha256(json.dumps([RISES_FORMAT, identity], sort_keys=True).encode()).hexdigest()[:24]
        found = cls(cache_folder() / "block-rises" / key, identity, [], None, {})
        found.blocks = [found._read(f"block-{index:03}") for index in range(depth)]
        found.whole = next(iter(found._read("whole").values()), None)
        found.depths = {option.kv_heads: loss for option, loss in found._read("depths").items()}
        return found

    def add(self, index: int, losses: dict[BlockOption, float]) -> None:
        """Keep what was measured of a block."""
        if losses:
            self.blocks[index] |= losses
            self._write(f"block-{index:03}", self.blocks[index])

    def add_depth(self, depth: int, loss: float) -> None:
        """Keep the loss with the blocks that the selection keeps at a depth."""
        self.depths[depth] = loss
        self._write("depths", {BlockOption(number, 0): value for number, value in self.depths.items()})

    def set_whole(self, loss: float) -> None:
        """Keep the whole model's loss."""
        self.whole = loss
        self._write("whole", {BlockOption(0, 0): loss})

    def _read(self, name: str) -> dict[BlockOption, float]:
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return {}
        try:
            value = read_json(file, RISES_FORMAT)
            losses = {BlockOption(int(g), int(n)): float(loss) for g, n, loss in value["losses"]}
            if not all(map(math.isfinite, losses.values())):
                raise ValueError
        except (BadInput, KeyError, TypeError, ValueError):
            raise BadInput(f"{file}: is damaged; remove it, and it is measured again") from None
        return losses

    def _write(self, name: str, losses: dict[BlockOption, float]) -> None:
        rows = [[option.kv_heads, option.neurons, loss] for option, loss in sorted(losses.items())]
        with whole_file(self.folder / f"{name}.json", force=True) as file:
            file.write_text(json_text({"format": RISES_FORMAT, **self.identity, "losses": rows}), encoding="utf-8")
