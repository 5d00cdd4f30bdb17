"""What is tuned: a base model and the selection that was made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amoeba_deploy.checkpoint import open_selected
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selection import Selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.sandwich import Space
from amoeba_deploy.stage2.settings import Settings


@dataclass(frozen=True)
class Selected:
    """A base model with its selection; ``name`` is what the user called it, a folder or a hub id."""

    name: str
    model: ModelFolder
    selection: Selection

    @classmethod
    def open(cls, name: str, selection_folder: Path) -> Selected:
        """Open both.

        Raises:
            BadInput: one is missing or damaged, the selection was made for another model, or it holds masks.
        """
        model, selection = open_selected(name, selection_folder)
        if selection.masks is not None:
            raise BadInput(
                f"{selection_folder}: holds imported masks, which do not say in which order units go; select again "
                f"with 'amoeba select'"
            )
        return cls(name, model, selection)

    def space(self, settings: Settings) -> Space:
        """The shapes to tune: all depths of the selection at the widths asked for, or one alone.

        Raises:
            BadInput: the selection does not cover the one.
        """
        if settings.shape is None:
            return Space(tuple(sorted(self.selection.depths)), settings.widths, settings.policy)
        shape = Shape.parse(settings.shape, settings.policy)
        self.selection.choice(shape.depth)
        return Space((shape.depth,), (shape.width,), settings.policy)
