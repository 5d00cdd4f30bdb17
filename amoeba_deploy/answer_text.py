"""How the answers of searches and exports look to people."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from amoeba_deploy.console import amount, columns
from amoeba_deploy.files import folder_bytes
from amoeba_deploy.search.quantity import three_digits

if TYPE_CHECKING:
    from amoeba_deploy.comparison import Comparison
    from amoeba_deploy.export_all import AllExports
    from amoeba_deploy.exported import ExportAnswer
    from amoeba_deploy.profiles.prediction import Interval
    from amoeba_deploy.request import Answer
    from amoeba_deploy.search import Candidate
    from amoeba_deploy.several import SeveralAnswers
    from amoeba_deploy.verification import Verification

LOSS = "loss"


def _quality_text(candidate: Candidate) -> str:
    quality = candidate.quality
    if quality.metric == LOSS:
        return f"{quality.value:.4f}"
    return f"{100 * quality.value:.1f}%"


def _quality_name(candidate: Candidate) -> str:
    return LOSS if candidate.quality.metric == LOSS else "block parameters kept"


def _candidate_row(candidate: Candidate) -> list[str]:
    prediction = candidate.prediction
    return [
        f"{candidate.shape} {candidate.flow} {candidate.precision}",
        f"{prediction.tpot_ms:.3f}",
        f"{prediction.ttft_ms:.1f}",
        prediction.source,
        amount(prediction.memory_bytes),
        amount(candidate.artifact_bytes),
        _quality_text(candidate),
        candidate.quality.source,
    ]


def _print_candidates(candidates: Sequence[Candidate]) -> None:
    quality = _quality_name(candidates[0]).split()[-1]
    head = ["shape", "TPOT ms", "TTFT ms", "latency", "memory", "size", quality, "quality"]
    columns([_candidate_row(candidate) for candidate in candidates], head)


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" ({three_digits(interval[0])} to {three_digits(interval[1])})"


def print_answer(answer: Answer, top: int = 5) -> None:
    """The choice, what bound it, and the best few shapes."""
    for remark in answer.remarks:
        answer.request.progress.say(f"note: {remark}")
    result, request = answer.result, answer.request
    best = result.best
    full = request.space.architecture
    prediction = best.prediction
    click.echo(
        f"{request.space.name} on {request.target.device.name}: {best.shape} in {best.flow} {best.precision} "
        f"(of {full.depth} blocks; {result.considered} shapes considered)"
    )
    click.echo(
        f"  TPOT {prediction.tpot_ms:.3f} ms{_between(prediction.tpot_interval)}, TTFT {prediction.ttft_ms:.1f} ms"
        f"{_between(prediction.ttft_interval)}, memory {amount(prediction.memory_bytes)} ({prediction.source})"
    )
    click.echo(f"  {_quality_name(best)} {_quality_text(best)} ({best.quality.source})")
    _print_equals(answer)
    _print_held_out(answer)
    if best.quality.metric != LOSS:
        click.echo("  no quality is known here: shapes are ranked by the parameters they keep")
    _print_binding(answer)
    _print_levels(answer)
    if request.shape is None:
        click.echo(f"\nbest {min(top, len(result.ranked))} within the budget")
        _print_candidates(result.ranked[:top])
    _print_measured(answer)


def _print_equals(answer: Answer) -> None:
    """Whether the choice's quality can be told apart from that of the others within the budget."""
    from amoeba_deploy.search.choice import comparison

    result, metric = answer.result, answer.request.budget.metric
    equals = [(other, found) for other in result.equals if (found := comparison(result.best, other)) is not None]
    if equals:
        other, found = equals[0]
        more = f", nor from {len(result.equals) - 1} more" if len(result.equals) > 1 else ""
        click.echo(
            f"  its quality cannot be told apart from that of {other.shape} {other.flow} {other.precision} "
            f"({_difference(found)}){more}: of these it has the lowest {metric.upper()}"
        )
        return
    following = next((one for one in result.ranked[1:] if comparison(result.best, one) is not None), None)
    if following is not None and (found := comparison(result.best, following)) is not None and found.significant:
        name = f"{following.shape} {following.flow} {following.precision}"
        click.echo(f"  significantly better than {name}, the next that was measured ({_difference(found)})")


def _difference(found: Comparison) -> str:
    return f"{found.difference:+.4f} ± {found.standard_error:.4f} over {found.pairs} rows of text"


def _print_held_out(answer: Answer) -> None:
    found = answer.held_out
    if found is not None:
        click.echo(
            f"  interpolated losses are off by {found['median']:.4f} (median) and {found['worst']:.4f} (worst), each "
            f"measured shape predicted from the others"
        )


def _print_binding(answer: Answer) -> None:
    budget = answer.request.budget
    if answer.request.shape is not None:
        return
    limits = ", ".join(f"{limit.quantity.title} {limit.allowed}" for limit in budget.limits)
    if answer.result.binding is None:
        click.echo(f"  the budget ({limits}) does not bind: the best of all shapes fits")
    else:
        binds = "bind" if " and " in answer.result.binding else "binds"
        click.echo(f"  {answer.result.binding} {binds} (budget: {limits}): better shapes exceed it")


def _print_levels(answer: Answer) -> None:
    """What each level of a hierarchical search asked for."""
    for number, level in enumerate(answer.levels, 1):
        best = level.best
        said = "none fits" if best is None else f"best {best.shape} {best.flow} {best.precision}, {_quality_text(best)}"
        click.echo(f"  level {number}: asked for {level.asked}, {said}")
    if answer.levels and answer.gap:
        click.echo(f"  a shape that was not measured could be better by {answer.gap:.4f} at most")
    elif answer.levels and answer.gap is not None:
        click.echo("  no shape that was not measured can be better, where latency and size grow with shapes")


def _print_measured(answer: Answer) -> None:
    if not answer.measured:
        return
    click.echo("\nlosses as predicted and as measured")
    rows = []
    for one in answer.measured:
        candidate, predicted = one.candidate, one.predicted
        shown = f"{predicted.value:.4f}" if predicted.metric == LOSS else "-"
        off = f"{candidate.quality.value - predicted.value:+.4f}" if predicted.metric == LOSS else "-"
        name = f"{candidate.shape} {candidate.flow} {candidate.precision}"
        rows.append([name, shown, predicted.source, f"{candidate.quality.value:.4f}", f"{one.standard_error:.4f}", off])
    columns(rows, ["shape", "predicted", "from", "measured", "error", "off by"])


def print_front(answer: Answer, most: int = 12) -> None:
    """The Pareto front, thinned evenly to ``most`` shapes with both ends kept."""
    front = answer.result.front
    steps = max(min(most, len(front)) - 1, 1)
    shown = [front[round(i * (len(front) - 1) / steps)] for i in range(min(most, len(front)))]
    names = [_axis(name, front[0]) for name in answer.result.axes]
    click.echo(f"\nPareto front in {' and '.join(names)} ({len(shown)} of {len(front)})")
    _print_candidates(shown)


def _axis(name: str, candidate: Candidate) -> str:
    from amoeba_deploy.search import QUANTITIES

    return _quality_name(candidate) if name == LOSS else QUANTITIES[name].title


def print_search(answer: Answer, top: int) -> None:
    """The choice, the best few, and the front."""
    print_answer(answer, top)
    print_front(answer)


def print_several(several: SeveralAnswers, top: int) -> None:
    """The search of each device, and the best shape for all."""
    for answer in several.answers:
        print_answer(answer, top)
        click.echo("")
    if several.shared is None:
        click.echo(several.why_none)
        return
    shape = several.shared.candidates[0].shape
    click.echo(f"best for all {len(several.answers)} devices: {shape}")
    rows = [
        [device, *_candidate_row(candidate)]
        for device, candidate in zip(several.shared.devices, several.shared.candidates, strict=True)
    ]
    quality = _quality_name(several.shared.worst).split()[-1]
    columns(rows, ["device", "shape", "TPOT ms", "TTFT ms", "latency", "memory", "size", quality, "quality"])


def _print_overrun(done: ExportAnswer) -> None:
    """Say so where the engine, now measured, exceeds a latency that its prediction kept."""
    found = done.measured_candidate
    for limit in done.answer.request.budget.limits:
        factor = 1.0 if found is None else limit.factor(found, done.answer.request.target.workload.tokens)
        if limit.quantity.name in ("tpot", "ttft", "e2e") and factor > 1:
            click.echo(
                f"note: {limit.quantity.title} is {factor - 1:.0%} over the budget of {limit.allowed}, which the "
                f"prediction kept; leave a margin, or profile again on a quiet machine"
            )


def print_verification(verified: Verification) -> None:
    """What an engine was held to, and how far it is from that."""
    found, held = verified.perplexity, verified.held_to_logits
    if held:
        click.echo(
            f"verified: logits within {verified.max_logit_error:.2g} of the reference "
            f"(allowed {verified.tolerance:.2g}), {verified.greedy_tokens} greedy tokens equal"
        )
    if found is not None:
        head = "" if held else "verified by perplexity alone, as its dequantised weights cannot be had: "
        click.echo(
            f"{head}perplexity {found.engine:.4g} on {found.tokens} tokens where the unquantised subnet has "
            f"{found.reference:.4g} ({found.rise:+.2%}, allowed {found.allowed_rise:+.1%})"
        )
    if not held:
        click.echo(f"logits differ from the unquantised subnet's by up to {verified.max_logit_error:.2g}, not bounded")


def print_commands(done: ExportAnswer, of: str = "") -> None:
    """The steps that are still to be run, and the commands that serve or measure the engine once it is finished."""
    artefact = done.export.artefact
    places = {"device": "the device", "host": "a host"}
    named = [(f"step {number}{of} on {places[step.where]}", step) for number, step in enumerate(artefact.steps, 1)]
    for name, one in (*named, *((f"use{of} on the device", command) for command in artefact.usage)):
        needs = f" (needs {one.needs})" if one.needs else ""
        click.echo(f"{name}{needs}, {one.does}:\n  {shlex.join(one.command)}")


def print_export(done: ExportAnswer) -> None:
    """The choice, how the engine was verified, and where the bundle is."""
    print_answer(done.answer, top=3)
    verified = done.export.verification
    click.echo("")
    if verified is None:
        why = f": it cannot run here, {done.export.cannot_run}" if done.export.cannot_run else ""
        click.echo(f"not verified{why}")
    else:
        print_verification(verified)
    artefact = done.export.artefact
    for note in artefact.notes:
        click.echo(f"note: {note}")
    print_commands(done)
    if done.export.timing is not None:
        timing = done.export.timing
        click.echo(f"measured: TPOT {timing.tpot_ms:.3f} ms, TTFT {timing.ttft_ms:.1f} ms on this machine")
        _print_overrun(done)
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in done.seconds.items())
    click.echo(f"bundle: {done.export.path} ({amount(done.export.bytes)}; {phases})")


def print_all_exports(done: AllExports) -> None:
    """One row a bundle, and why the other engines were passed over."""
    from amoeba_deploy.bundle import ENGINE

    rows = []
    for one in done.bundles:
        best, timing = one.answer.best, one.export.timing
        found = timing or best.prediction
        on_device = one.export.cannot_run or one.export.artefact.steps
        rows.append(
            [
                f"{best.flow} {best.precision}",
                str(best.shape),
                amount(folder_bytes(one.export.path / ENGINE)),
                f"{one.seconds['build']:.2f}",
                "yes" if one.export.verification else "on the device" if on_device else "no",
                f"{found.ttft_ms:.2f}",
                f"{found.tpot_ms:.3f}",
                "measured" if timing else best.prediction.source,
            ]
        )
    if rows:
        columns(rows, ["engine", "shape", "artefact", "build s", "verified", "TTFT ms", "TPOT ms", "latency"])
    for passed in done.passed_over:
        name = passed.flow if passed.precision is None else f"{passed.flow} {passed.precision}"
        click.echo(f"passed over {name}: {passed.reason}")
    for one in done.bundles:
        for note in one.export.artefact.notes:
            click.echo(f"note: {one.export.path.name}: {note}")
        if one.export.cannot_run:
            click.echo(f"note: {one.export.path.name} cannot run here: {one.export.cannot_run}")
        print_commands(one, f" of {one.export.path.name}")
    if done.bundles:
        click.echo(f"{len(done.bundles)} bundles: {done.output}")
