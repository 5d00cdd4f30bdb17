"""What a block may take: nothing, or so many key/value groups and neurons that an engine takes.

Which units an option keeps follows the checkpoint's scores, as every plan's does: the best-scored ones, so options of a
block are nested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import Backend, BuildOptions
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.plan import BlockPlan, Plan, Steps, best_units, block_plan, subnet_widths
from amoeba_deploy.shape import Shape, kept_units

Item = TypeVar("Item")
MOST_OPTIONS = 64
"""Options of a block, that of dropping it included."""
WIDTH_DIGITS = 4


@dataclass(frozen=True, order=True)
class BlockOption:
    """How many key/value groups and neurons a block keeps; none of both where it is dropped."""

    kv_heads: int
    neurons: int

    @property
    def dropped(self) -> bool:
        """Whether nothing of the block is kept."""
        return not self.kv_heads and not self.neurons


DROPPED = BlockOption(0, 0)


def option_steps(checkpoint: Checkpoint, backend: Backend, precision: str) -> Steps:
    """The numbers of groups and neurons that an engine takes of a checkpoint's blocks."""
    return backend.takes.steps(checkpoint.architecture, checkpoint.multiple, precision, checkpoint.bias)


def block_options(
    checkpoint: Checkpoint,
    flow: str,
    precision: str,
    options: BuildOptions,
    minimum_width: Fraction | None = None,
    most: int = MOST_OPTIONS,
) -> tuple[BlockOption, ...]:
    """The options of a block for an engine: first to drop it, then pairs of groups and neurons, ascending.

    Pairs go down to what ``minimum_width`` keeps, the checkpoint's own where left out. Where there are more than
    ``most``, those of uniform widths fill up to a third of the places, and an even grid over both counts the rest.

    Raises:
        BadInput: the engine takes blocks of one width only, or the checkpoint holds masks or loose sublayers.
    """
    require_varying(checkpoint, flow, precision, options)
    full = checkpoint.architecture
    backend, lowest = load_backend(flow), minimum_width or checkpoint.minimum_width
    steps = option_steps(checkpoint, backend, precision)
    least_groups, least_neurons = steps.kept(full, lowest, lowest)
    groups = [count for count in steps.groups if count >= max(least_groups, 1)]
    neurons = _neuron_counts(full, least_neurons, steps)

    def legal(kv_heads: int, count: int) -> bool:
        subnet = full.subnet(full.depth, kv_heads, count)
        refused = backend.takes.count_refusal(full, kv_heads * full.group, count, precision)
        return (refused or backend.refusal(subnet, precision, options)) is None

    pairs = [pair for g in groups for n in neurons if legal(*(pair := (g, n)))]
    whole = (full.kv_heads, full.neurons)
    if whole not in pairs:
        refused = backend.refusal(full, precision, options) or "no pair of its heads and neurons is taken"
        raise BadInput(f"{checkpoint.name} cannot be lowered to {flow} {precision}: {refused}")
    uniform = [steps.kept(full, width, width) for width in subnet_widths(full, lowest, steps)]
    chosen = _thinned(pairs, [pair for pair in uniform if pair in pairs], most - 1)
    return (DROPPED, *(BlockOption(*pair) for pair in sorted(chosen)))


def _neuron_counts(full: Architecture, least: int, steps: Steps) -> list[int]:
    counts = {kept_units(full.neurons, Fraction(n, full.neurons), steps.multiple) for n in range(1, full.neurons + 1)}
    return sorted(count for count in counts if count >= least)


def _thinned(pairs: Sequence[tuple[int, int]], uniform: Sequence[tuple[int, int]], most: int) -> set[tuple[int, int]]:
    """At most so many of the pairs: the whole block, some of uniform width, and an even grid of the others."""
    if len(pairs) <= most:
        return set(pairs)
    chosen = {max(pairs), *_evenly(uniform, most // 3)}
    groups, neurons = (sorted({pair[place] for pair in pairs}) for place in (0, 1))
    rows = len(groups)
    while rows > 1 and rows * rows > most - len(chosen):
        rows -= 1
    columns = len(neurons)
    while columns > 1 and rows * columns > most - len(chosen):
        columns -= 1
    grid = [(g, n) for g in _evenly(groups, rows) for n in _evenly(neurons, columns)]
    chosen |= {pair for pair in grid if pair in set(pairs)}
    rest = [pair for pair in pairs if pair not in chosen]
    return chosen | set(_evenly(rest, most - len(chosen)))


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, both ends among them where there is room; all where there are fewer."""
    if count >= len(items):
        return list(items)
    if count < 1:
        return []
    if count == 1:
        return [items[-1]]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def require_varying(checkpoint: Checkpoint, flow: str, precision: str, options: BuildOptions) -> None:
    """Raise BadInput where blocks of different widths cannot come out of a checkpoint, or cannot go into an engine."""
    checkpoint.require_whole_blocks()
    if checkpoint.selection.masks is not None:
        raise BadInput(
            f"{checkpoint.path}: holds imported masks, which say at a few widths what every block keeps; a search per "
            f"block needs scores, from amoeba select"
        )
    backend = load_backend(flow)
    backend.takes.check_precision(precision)
    if takes_varying(checkpoint, backend, precision, options):
        return
    others = [name for name in flow_names() if name != flow and _other_takes(checkpoint, name, options)]
    said = f"flows that take varying ones are {', '.join(others)}" if others else "no flow here takes varying ones"
    raise BadInput(
        f"'{flow}' takes blocks of one width only of this {checkpoint.architecture.family} in {precision}; {said}"
    )


def _other_takes(checkpoint: Checkpoint, flow: str, options: BuildOptions) -> bool:
    """Whether another flow takes varying blocks in any precision, its settings at their defaults."""
    try:
        backend = load_backend(flow)
        defaults = {name: setting.default for name, setting in backend.settings.items()}
        own = BuildOptions(options.context, options.batch, None, defaults)
        return any(takes_varying(checkpoint, backend, precision, own) for precision in backend.precisions())
    except AmoebaError:
        return False


def takes_varying(checkpoint: Checkpoint, backend: Backend, precision: str, options: BuildOptions) -> bool:
    """Whether an engine holds each block of a model in its own size, unpadded."""
    full = checkpoint.architecture
    if not {"kv_heads", "neurons"} <= backend.takes.varying or full.depth < 2:
        return False
    if checkpoint.bias and not backend.takes.biases:
        return False
    if "ragged" not in backend.layouts(full, precision, options):
        return False
    steps = option_steps(checkpoint, backend, precision)
    kept = steps.kept(full, Fraction(1, 2), Fraction(1, 2))
    blocks = [block_plan(full, 0, range(full.kv_heads), range(full.neurons))]
    blocks.append(block_plan(full, 1, range(max(kept[0], 1)), range(kept[1])))
    sizes = backend.block_sizes(Plan(Shape(2, Fraction(1), "adaptive"), tuple(blocks)), full, steps.multiple)
    differ = kept != (full.kv_heads, full.neurons)
    return sizes is None or len(set(sizes)) > 1 or not differ


def one_block(checkpoint: Checkpoint, index: int, option: BlockOption) -> BlockPlan:
    """The plan of one kept block under an option: its best-scored units."""
    heads, neurons = checkpoint.selection.scores(index)
    kept = best_units(heads, option.kv_heads), best_units(neurons, option.neurons)
    return block_plan(checkpoint.architecture, index, *(units.tolist() for units in kept))


def options_plan(checkpoint: Checkpoint, chosen: Sequence[BlockOption]) -> Plan:
    """The plan that gives every block of the full model its option.

    Its shape names the blocks kept, and for its width the share of their matrix parameters that is kept, to four
    digits: what adapters that know of widths are told (checkpoint.learnt).
    """
    blocks = [one_block(checkpoint, index, option) for index, option in enumerate(chosen) if not option.dropped]
    if not blocks:
        raise BadInput("the plan keeps no block; keep at least one")
    return Plan(Shape(len(blocks), options_width(checkpoint.architecture, chosen), "adaptive"), tuple(blocks))


def options_width(full: Architecture, chosen: Sequence[BlockOption]) -> Fraction:
    """The share of the kept blocks' matrix parameters that options keep, rounded to four digits."""
    kept = [full.subnet(1, option.kv_heads, option.neurons) for option in chosen if not option.dropped]
    share = Fraction(sum(s.block_matrix_parameters for s in kept), full.block_matrix_parameters * len(kept))
    scale = 10**WIDTH_DIGITS
    return Fraction(max(round(share * scale), 1), scale)
