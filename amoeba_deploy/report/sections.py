"""The sections of a report below its boards, as HTML with the charts in them."""

from __future__ import annotations

from collections.abc import Iterator

from amoeba_deploy.console import amount
from amoeba_deploy.pictures.curves import Curve, curves_of, curves_section
from amoeba_deploy.pictures.equal_size import WAYS, SizePoint, equal_size_panel
from amoeba_deploy.pictures.heatmap import Heatmap, heatmap_of, heatmap_section
from amoeba_deploy.pictures.prediction import Pair, prediction_section
from amoeba_deploy.pictures.quality import LossCell, quality_section
from amoeba_deploy.pictures.section import Section
from amoeba_deploy.report.built import Built
from amoeba_deploy.report.case import Case
from amoeba_deploy.report.document import Report
from amoeba_deploy.report.left_out import Prediction
from amoeba_deploy.report.markup import Charts, folded, paragraph, section, table
from amoeba_deploy.report.quality import ShapeQuality
from amoeba_deploy.report.wording import metric_title, percent
from amoeba_deploy.search.quantity import three_digits


def _by_device(report: Report) -> Iterator[tuple[str, list[Case]]]:
    """Every device with its cases of one engine each."""
    for device in report.devices:
        yield device.boards[0].device, [case for board in device.boards for case in board.singles]


# Latency


def _heatmap(case: Case) -> Heatmap:
    request, known = case.request, {candidate.shape: candidate.prediction for candidate in case.found}
    metric, tokens = request.budget.metric, request.target.workload.tokens
    return heatmap_of(*case.pairs[0], metric, tokens, list(known), known.__getitem__)


def latency_section(report: Report, charts: Charts) -> str:
    """A heatmap of each device and engine."""
    caption, drawn = "", []
    for device, cases in _by_device(report):
        found = heatmap_section(report.request.budget.metric, [_heatmap(case) for case in cases])
        caption = found.caption
        drawn.append(charts.figures(found, device))
    said = f"{caption} The tables of all shapes above have the same figures."
    return section("latency", "Latency by depth and width", paragraph(said) + "".join(drawn))


# Curves


def _curves(case: Case) -> list[Curve]:
    request, known = case.request, {candidate.shape: candidate.prediction for candidate in case.found}
    metric, tokens = request.budget.metric, request.target.workload.tokens
    return curves_of(*case.pairs[0], metric, tokens, list(known), known.__getitem__)


def _size_points(case: Case) -> list[SizePoint]:
    """The shapes along which depth alone and width alone shrink, by the share of parameters that they keep."""
    space, pair = case.request.space, case.pairs[0]
    steps = space.steps(*pair)
    whole = max(case.found, key=lambda c: (c.shape.depth, c.shape.width))
    largest, reference = space.sized(whole.shape, steps).kept, case.latency(whole)
    points = []
    for candidate in case.found:
        shape = candidate.shape
        for way, along in zip(WAYS, (shape.width == whole.shape.width, shape.depth == whole.shape.depth), strict=True):
            if along:
                kept, ms = space.sized(shape, steps).kept / largest, case.latency(candidate)
                own = " ".join(pair), way, str(shape), kept, ms / reference, ms, candidate.prediction.source
                points.append(SizePoint(*own))
    return points


def curves_sections(report: Report, charts: Charts) -> str:
    """How latency falls with depth and with width, on each device."""
    latency = metric_title(report.request.budget.metric)
    drawn, caption = [], ""
    for device, cases in _by_device(report):
        curves = [curve for case in cases for curve in _curves(case)]
        if not curves:
            continue
        points = [point for case in cases for point in _size_points(case)]
        own = curves_section(report.request.budget.metric, curves)
        panels = (equal_size_panel("At equal size", latency, points), *own.panels)
        drawn.append(charts.figures(Section(own.heading, own.caption, panels), device))
        caption = own.caption
    if not drawn:
        return ""
    said = (
        f"Devices and engines differ in what makes them faster. At equal size, the lower of an engine's two lines is "
        f"the faster way to shrink: fewer blocks, or narrower ones. {caption}"
    )
    return section("curves", "Depth against width", paragraph(said) + "".join(drawn))


# Quality


def quality_markup(report: Report, charts: Charts) -> str:
    """The loss of every shape in every precision that was measured."""
    heading = "Quality over shapes"
    quality = report.checkpoint.quality
    if quality is None:
        said = (
            "No quality is known of this checkpoint: shapes are ranked by the block parameters that they keep. Measure "
            "it with 'amoeba checkpoint create --quality-text FILE'."
        )
        return section("quality", heading, paragraph(said))
    cells = {
        precision: [LossCell(one.shape, one.loss, one.source, one.error) for one in shapes]
        for precision, shapes in report.qualities.items()
    }
    drawn = quality_section(cells)
    tokens = quality.text.get("tokens")
    said = drawn.caption + (f" Measured on {tokens} tokens of text." if isinstance(tokens, int) else "")
    said += " The standard error is over rows of text; two shapes differ by far less on one text than texts differ."
    errors = [
        f"{precision}: median {held.median:.4f}, worst {held.worst:.4f} over {held.rows} shapes"
        for precision in quality.precisions
        if (held := quality.held_out(precision)) is not None
    ]
    if errors:
        said += f" Interpolated losses, each measured shape left out once, are off by: {'; '.join(errors)}."
    content = paragraph(said) + charts.figures(drawn) + folded("Losses and accuracies, as a table", _qualities(report))
    return section("quality", heading, content)


def _qualities(report: Report) -> str:
    rows = [_quality_row(precision, one) for precision, shapes in report.qualities.items() for one in shapes]
    head = ["shape", "precision", "source", "loss", "standard error", "accuracy", "questions"]
    return table("Losses and accuracies", head, rows, 3)


def _quality_row(precision: str, one: ShapeQuality) -> list[str]:
    error = "" if one.error is None else f"{one.error:.4f}"
    accuracy = "" if one.accuracy is None else percent(one.accuracy)
    if one.accuracy_error is not None:
        accuracy += f" ± {percent(one.accuracy_error)}"
    return [str(one.shape), precision, one.source, f"{one.loss:.4f}", error, accuracy, str(one.questions or "")]


# Predictions


def prediction_markup(report: Report, charts: Charts) -> str:
    """How well latencies are predicted, by what was measured."""
    panels = []
    for device, _ in _by_device(report):
        for metric in ("TPOT", "TTFT"):
            own = [one for one in report.predictions if (one.device, one.metric) == (device, metric)]
            panels.append((f"{device}: {metric}", [pair for one in own for pair in _pairs(one)]))
    panels.append(("Bundles: TPOT", [pair for built in report.bundles for pair in _built_pairs(built)]))
    caption = (
        "Each measured shape is predicted from the others, as if it had not been measured. On the dashed line "
        "prediction and measurement are equal."
    )
    content = paragraph(caption)
    rows = [_prediction_row(one) for one in report.predictions]
    if rows:
        head = ["engine", "device", "figure", "shapes", "median error", "p90", "worst"]
        content += table("Errors of shapes left out, as shares of what was measured", head, rows, 3)
    else:
        content += paragraph("None of these latencies was measured: all are estimated from data sheets.")
    content += charts.figures(prediction_section(panels, caption))
    points = [
        [point.shape, one.device, one.engine, one.metric, f"{point.measured:.4g}", f"{point.predicted:.4g}"]
        for one in report.predictions
        for point in one.points
    ]
    if points:
        head = ["shape", "device", "engine", "figure", "measured ms", "predicted ms"]
        content += folded("Every measured shape, as a table", table("Measured shapes left out", head, points, 4))
    return section("prediction", "Prediction against measurement", content)


def _pairs(one: Prediction) -> list[Pair]:
    return [Pair(point.shape, one.engine, point.predicted, point.measured) for point in one.points]


def _built_pairs(built: Built) -> list[Pair]:
    if built.measured_tpot_ms is None:
        return []
    return [Pair(f"{built.shape} on {built.device}", built.engine, built.tpot_ms, built.measured_tpot_ms)]


def _prediction_row(one: Prediction) -> list[str]:
    if one.error is None:
        return [one.engine, one.device, one.metric, str(len(one.points)), "too few", "", ""]
    error = one.error
    return [
        one.engine,
        one.device,
        one.metric,
        str(error.shapes),
        *map(percent, (error.median, error.p90, error.worst)),
    ]


# Bundles


def bundles_markup(report: Report) -> str:
    """What was built; the section says so where nothing was given."""
    heading = "Bundles"
    if not report.bundles:
        return section("bundles", heading, paragraph("None was given; name those that were built with --bundle DIR."))
    said = (
        "Every file of each is what its manifest lists. TPOT is measured where a bundle was built on the machine that "
        "it is for."
    )
    head = ["bundle", "device", "shape", "engine", "checkpoint", "verified", "signed", "size", "predicted TPOT ms"]
    head += ["latency", "measured TPOT ms", "off by", "workload"]
    rows = [_bundle_row(built, report.checkpoint.name) for built in report.bundles]
    return section("bundles", heading, paragraph(said) + table("Bundles", head, rows, 7))


def _bundle_row(built: Built, name: str) -> list[str]:
    checkpoint = "this one" if built.own else f"another: {built.checkpoint}"
    if not built.own and built.checkpoint == name:
        checkpoint = f"another of that name: {name}"
    measured = "not measured" if built.measured_tpot_ms is None else f"{built.measured_tpot_ms:.3f}"
    off = "" if built.off is None else f"{built.off:+.1%}"
    signed = "yes, not checked" if built.signed else "no"
    batch, prompt, tokens = built.workload
    workload = f"{batch} x ({prompt} + {tokens} tokens)"
    what = [str(built.path), built.device, built.shape, built.engine, checkpoint, built.verified, signed]
    return [*what, amount(built.bytes), three_digits(built.tpot_ms), built.source, measured, off, workload]
