"""How results look to people, and what commands print as JSON where that is more than the result itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy.shape import format_width, width_to_json

if TYPE_CHECKING:
    from amoeba_deploy.checkpoint import Checkpoint
    from amoeba_deploy.extraction.folder import Extraction
    from amoeba_deploy.extraction.layout_cost import LayoutCost
    from amoeba_deploy.profiles.device import Device
    from amoeba_deploy.profiles.table import Table
    from amoeba_deploy.selection import DepthChoice, Selection


def columns(rows: Sequence[Sequence[str]], head: Sequence[str]) -> None:
    """A plain table: left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


def amount(count: float) -> str:
    """Bytes in MB or GB, decimal.

    >>> amount(4.6e6), amount(2.5e9)
    ('4.6 MB', '2.50 GB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def device_summary(device: Device) -> dict[str, Any]:
    """One line of the catalogue."""
    return {
        "name": device.name,
        "description": device.description,
        "memory_bytes": int(device.memory_visible.base),
        "bandwidth": None if device.bandwidth is None else device.bandwidth.base,
        "flows": [f"{flow.flow} {flow.precision}" for flow in device.flows],
    }


def print_devices(devices: Sequence[Device]) -> None:
    """The catalogue as a table."""
    rows = [
        [
            d.name,
            amount(d.memory_visible.base),
            f"{d.bandwidth.value:g} {d.bandwidth.unit}" if d.bandwidth else "profiled",
            d.description,
        ]
        for d in devices
    ]
    columns(rows, ["device", "memory", "bandwidth", "what it is"])


def _figures(device: Device) -> dict[str, Any]:
    named = {
        "memory.total": device.memory_total,
        "memory.visible": device.memory_visible,
        "bandwidth.peak": device.bandwidth,
        **{f"compute.{k}": v for k, v in device.compute.items()},
        "efficiency.bandwidth_full": device.efficiency_bandwidth_full,
        "efficiency.bandwidth_quantised": device.efficiency_bandwidth_quantised,
        "efficiency.compute": device.efficiency_compute,
    }
    return {name: asdict(figure) for name, figure in named.items() if figure is not None}


def device_json(device: Device) -> dict[str, Any]:
    """Everything known of a device."""
    from amoeba_deploy.profiles.known_tables import known_tables

    flows = [asdict(flow) for flow in device.flows]
    head = {"name": device.name, "description": device.description, "architecture": device.architecture}
    return head | {"figures": _figures(device), "flows": flows, "tables": known_tables(device.name)}


def print_device(device: Device) -> None:
    """All figures of a device with their sources, and what was measured of it."""
    from amoeba_deploy.profiles.known_tables import known_tables

    click.echo(f"{device.name}: {device.description} ({device.architecture})")
    for name, figure in _figures(device).items():
        click.echo(f"  {name} = {figure['value']:g} {figure['unit']}  [{figure['confidence']}: {figure['source']}]")
    for flow in device.flows:
        overheads = f"{flow.block_overhead.value:g} {flow.block_overhead.unit} a block, "
        overheads += (
            f"{flow.fixed_overhead.value:g} {flow.fixed_overhead.unit} a step [{flow.block_overhead.confidence}]"
        )
        click.echo(f"  flow {flow.flow} {flow.precision}: overhead {overheads}")
    for table in known_tables(device.name):
        model, engines = table["model"], ", ".join(table["engines"])
        of = "{family} of {depth} blocks, hidden size {hidden}".format(**model) if model else "model"
        click.echo(f"  table {table['file']}: {table['rows']} measurements of a {of}, {table['date'][:10]}: {engines}")


def print_selection(selection: Selection, output: Path) -> None:
    """Kept blocks and the calibration metric of each depth."""
    facts = selection.facts
    rows = [
        [str(depth), "unknown" if choice.metric is None else f"{choice.metric:.4f}", kept_text(choice)]
        for depth, choice in sorted(selection.depths.items(), reverse=True)
    ]
    columns(rows, ["depth", facts["metric"], "kept blocks"])
    spent = facts["block_evaluations"]
    plain = f" where the plain recurrence takes {spent['naive']}" if "naive" in spent else ""
    click.echo(f"{output}: written in {facts['seconds']:.1f} s, {spent['measured']:g} block evaluations{plain}")


def kept_text(choice: DepthChoice) -> str:
    """Kept blocks for people; ``3a`` is the attention alone of block 3, ``3f`` its feed-forward alone."""
    marks = dict.fromkeys(choice.without_feed_forward, "a") | dict.fromkeys(choice.without_attention, "f")
    return " ".join(f"{index}{marks.get(index, '')}" for index in choice.kept)


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds."""
    quality = checkpoint.quality
    return {
        "path": str(checkpoint.path),
        "name": checkpoint.name,
        "digest": checkpoint.digest,
        "architecture": asdict(checkpoint.architecture),
        "parameters": checkpoint.architecture.parameters,
        "policy": checkpoint.policy,
        "bias": _on(checkpoint.bias),
        "adapters": checkpoint.adapters is not None,
        "tuning": checkpoint.tuning or None,
        "masked_widths": None
        if checkpoint.selection.masks is None
        else [width_to_json(width) for width in checkpoint.selection.masks.widths],
        "min_depth": checkpoint.minimum_depth,
        "shapes": len(checkpoint.shapes()),
        "depth": {str(d): list(c.kept) for d, c in sorted(checkpoint.selection.depths.items(), reverse=True)},
        "quality": None
        if quality is None
        else {
            "text": quality.text,
            "precisions": list(quality.precisions),
            "rows": [
                r.shape.to_json() | {"precision": r.precision, "loss": r.loss, "accuracy": r.accuracy}
                for r in quality.rows
            ],
        },
    }


def print_extraction(done: Extraction, output: Path, cost: LayoutCost | None) -> None:
    """What an extraction wrote; where blocks differ also what padding them costs."""
    click.echo(f"{output}: {done.plan.shape}, {done.bytes / 1e6:.1f} MB of weights in {done.seconds:.2f} s")
    if done.quality:
        found = done.quality
        others = {k: v for k, v in found.items() if k.startswith("after_with")}
        said = "".join(f", {v:.4f} {k.removeprefix('after_').replace('_', ' ')}" for k, v in others.items())
        click.echo(f"  loss {found['after']:.4f}{said}; full model {found['before']:.4f} ({found['source']})")
    if done.layout_bytes:
        uniform, ragged = done.layout_bytes["uniform"], done.layout_bytes["ragged"]
        padded = "held by no stock class when padded" if uniform is None else f"{amount(uniform)} of weights padded"
        click.echo(f"  blocks differ: {padded}, {amount(ragged or 0)} ragged")
    if cost is not None:
        times = [
            f"TPOT {found.tpot_ms:.3f} ms, TTFT {found.ttft_ms:.1f} ms {what}"
            for found, what in ((cost.layouts["uniform"], "padded"), (cost.layouts["ragged"], "ragged"))
        ]
        click.echo(f"  on {cost.device} in {cost.flow} {cost.precision}: {'; '.join(times)} (estimated)")


def print_checkpoint(checkpoint: Checkpoint) -> None:
    """Sizes, kept blocks, and quality in float32."""
    sizes, quality = checkpoint.architecture, checkpoint.quality
    click.echo(f"{checkpoint.name} ({checkpoint.path})")
    click.echo(
        f"  {sizes.family}, {sizes.parameters / 1e6:.1f} M parameters: {sizes.depth} blocks, "
        f"hidden {sizes.hidden}, {sizes.heads} query heads of size {sizes.head_dim} over {sizes.kv_heads} key/value "
        f"heads, {sizes.neurons} neurons"
    )
    click.echo(
        f"  {len(checkpoint.shapes())} distinct shapes: depth {checkpoint.minimum_depth} to {sizes.depth}, "
        f"width {float(checkpoint.minimum_width):g} to 1"
    )
    if checkpoint.selection.masks is None:
        alone = checkpoint.tuning.get("settings", {}).get("shape")
        tuned = "tuned" if checkpoint.adapters or checkpoint.tuning else "untuned"
        tuned += f" for {alone} alone" if alone else ""
        click.echo(
            f"  {tuned}, policy {checkpoint.policy}, bias {_on(checkpoint.bias)}; base model {checkpoint.model.path}"
        )
    if checkpoint.selection.masks is not None:
        widths = ", ".join(format_width(width) for width in checkpoint.selection.masks.widths)
        click.echo(f"  imported masks: only the widths {widths}, policy adaptive, bias {_on(checkpoint.bias)}")
    if checkpoint.adapters is not None:
        experts = checkpoint.adapters.experts
        many = f"{experts} experts" if experts > 1 else "one LoRA"
        click.echo(f"  tuned adapters: {many} of rank {checkpoint.adapters.rank}")
    for depth, choice in sorted(checkpoint.selection.depths.items(), reverse=True):
        click.echo(f"  depth {depth}: keeps blocks {kept_text(choice)}")
    if quality is None:
        click.echo("  quality: not measured; shapes are ranked by parameters kept")
        return
    click.echo(f"  loss on {quality.text['tokens']} held-out tokens:")
    for precision in quality.precisions:
        _print_quality(checkpoint, precision)


def _on(value: bool) -> str:
    return "on" if value else "off"


def _print_quality(checkpoint: Checkpoint, precision: str) -> None:
    assert checkpoint.quality is not None
    rows = [row for row in checkpoint.quality.rows if row.precision == precision]
    widths = list(dict.fromkeys(row.shape.width for row in rows))
    table = []
    for depth in dict.fromkeys(row.shape.depth for row in rows):
        losses = [f"{row.loss:.3f}" for row in rows if row.shape.depth == depth]
        table.append([f"  {depth}", *losses])
    columns(table, [f"  {precision}: depth", *(f"x{float(width):g}" for width in widths)])


def print_evaluation(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Loss, perplexity and accuracy, one line each."""
    for name, result in results.items():
        if "loss" in result:
            click.echo(
                f"{name}: perplexity {result['perplexity']:.3f} (loss {result['loss']:.4f}, {result['tokens']} tokens)"
            )
        for task, found in result.get("tasks", {}).items():
            click.echo(f"{name}: {task} {_task_words(found)}")


def _task_words(found: Mapping[str, Any]) -> str:
    """The main metric of a task with its standard error, and over how many questions."""
    if "accuracy" in found:
        value, error, unit = 100 * found["accuracy"], found["accuracy_se"], "%"
        error = None if error is None else 100 * error
        of = f" of {found['n']} questions right"
        chance = f" (chance {100 * found['chance']:.1f}%)" if "chance" in found else ""
        return f"{value:.1f}{'' if error is None else f' ± {error:.1f}'}{unit}{of}{chance}"
    metric = found["metric"]
    error = found[f"{metric}_se"]
    spread = "" if error is None else f" ± {error:.4g}"
    return f"{metric.replace('_', ' ')} {found[metric]:.4g}{spread} over {found['n']} documents"


def print_device_test(table: Table, file: Path) -> None:
    """What came out of each item of a device test, and its latencies."""
    measured = {(row.precision, row.depth, str(row.shape)): row for row in table.rows}
    rows = []
    for item in table.facts["items"]:
        row = measured.get((item["precision"], item["depth"], f"{item['depth']}x{item['width']}"))
        times = ["", ""] if row is None else [f"{row.ttft_ms:.2f}", f"{row.tpot_ms:.3f}"]
        checked = "verified" if item["verified"] else "self-test" if item["selftest_tokens"] else "no"
        name = f"{item['flow']} {item['precision']} {item['depth']}x{item['width']}"
        rows.append([name, item["outcome"], checked, *times])
    columns(rows, ["engine", "outcome", "checked", "TTFT ms", "TPOT ms"])
    for item in table.facts["items"]:
        if item["error"]:
            click.echo(f"{item['precision']} {item['depth']}x{item['width']}, {item['stage']}: {item['error']}")
    click.echo(str(file))
