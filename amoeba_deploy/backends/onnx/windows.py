"""How far back each block of a model attends."""

from __future__ import annotations

from amoeba_deploy.model_folder import ModelFolder

Windows = tuple[int | None, ...]
"""For each block the positions that it attends to, its own included; None for all."""


def block_windows(model: ModelFolder) -> Windows:
    """The windows of a model's blocks, from the lists of its config that follow the kept blocks.

    ``layer_types`` decides where a family has it, else ``max_window_layers`` (the first so many attend to everything);
    a Mistral windows every block whatever ``layer_types`` says, as transformers does.
    """
    sizes = model.architecture
    if sizes.sliding_window is None:
        return (None,) * sizes.depth
    config = model.family.completed(model.config)
    kinds, first = config.get("layer_types"), config.get("max_window_layers")
    if model.family.model_type == "mistral":
        windowed = [True] * sizes.depth
    elif isinstance(kinds, list):
        windowed = [kind == "sliding_attention" for kind in kinds[: sizes.depth]]
    else:
        windowed = [not isinstance(first, int) or index >= first for index in range(sizes.depth)]
    return tuple(sizes.sliding_window if here else None for here in windowed)
