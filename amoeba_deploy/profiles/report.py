"""How latency tables look to people, and what commands on them print as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy.console import amount, columns

if TYPE_CHECKING:
    from amoeba_deploy.profiles.curve import Curve
    from amoeba_deploy.profiles.latency_model import LatencyModel
    from amoeba_deploy.profiles.local import Profiled
    from amoeba_deploy.profiles.table import Table


def print_table(table: Table, file: Path) -> None:
    """All rows of a latency table."""
    rows = [
        [
            f"{row.flow} {row.precision} {row.shape}" + "".join(f" {k}={v}" for k, v in sorted(row.settings.items())),
            f"{row.prompt}",
            f"{row.ttft_ms:.2f}",
            f"{row.tpot_ms:.3f}",
            f"{row.p10:.3f}",
            f"{row.p90:.3f}",
            "" if row.tpot_error is None else f"±{row.tpot_error:.1%}",
            f"{row.repeats}" + (" (noisy)" if row.noisy else ""),
            amount(row.peak_memory_bytes),
            amount(row.artifact_bytes),
        ]
        for row in table.rows
    ]
    head = ["measured", "prompt", "TTFT ms", "TPOT ms", "p10", "p90", "TPOT ±", "repeats", "peak memory", "artefact"]
    columns(rows, head)
    noisy = sum(row.noisy for row in table.rows)
    if noisy:
        click.echo(
            f"{noisy} of {len(rows)} rows are noisy: their medians are not known to within 3 % (95 % confidence)"
        )
    click.echo(str(file))


KINDS = {
    "additive": "additive over blocks",
    "corrected": "not additive enough: additive, with what is left over interpolated",
    "linear": "not additive enough: interpolated linearly",
    "proportional": "in proportion to the parameters read, from one shape",
}


def print_models(models: Mapping[str, LatencyModel]) -> None:
    """How shapes that were not measured are predicted, and how far off that was for measured ones left out."""
    for name, model in models.items():
        click.echo(f"{name}: {len(model.rows)} shapes measured; the others are predicted")
        for metric, curve in (("TPOT", model.tpot), ("TTFT", model.ttft)):
            held, said = curve.held_out, KINDS[curve.kind]
            error = "too few shapes to tell the error"
            if held is not None:
                error = (
                    f"each left out once: median error {held.median:.1%}, p90 {held.p90:.1%}, worst {held.worst:.1%}"
                )
            click.echo(f"  {metric} {said}; {error}")


def models_json(models: Mapping[str, LatencyModel]) -> dict[str, Any]:
    """How each flow and precision is predicted, and with what held-out errors."""
    return {
        name: {
            "shapes": len(model.rows),
            "noisy": sum(row.noisy for row in model.rows.values()),
            "tpot": _curve_json(model.tpot),
            "ttft": _curve_json(model.ttft),
        }
        for name, model in models.items()
    }


def _curve_json(curve: Curve) -> dict[str, Any]:
    held = curve.held_out
    errors = {} if held is None else {name: round(getattr(held, name), 4) for name in ("median", "p90", "worst")}
    return {"kind": curve.kind, "held_out": errors or None}


def profiled_json(done: Profiled) -> dict[str, Any]:
    """The object that ``profile --json`` prints."""
    return {
        "path": str(done.file),
        "rows": len(done.table.rows),
        "measured": len(done.rows),
        "noisy": sum(row.noisy for row in done.rows),
        "predictions": models_json(done.models()),
    }


def print_profiled(done: Profiled) -> None:
    """What the table holds now, and how well it predicts."""
    print_table(done.table, done.file)
    print_models(done.models())


def draw_profiled(done: Profiled, file: Path, force: bool) -> None:
    """Write curves and heat maps of what was measured and of what is predicted from it, as a picture."""
    from amoeba_deploy.pictures.page import write_page
    from amoeba_deploy.pictures.table import table_sections

    sections = table_sections(done.predictors(), done.workload.tokens, done.shapes())
    write_page(file, f"Latency of {done.source.name} on {done.table.device}", sections, force)
    click.echo(f"drawn: {file}", err=True)
