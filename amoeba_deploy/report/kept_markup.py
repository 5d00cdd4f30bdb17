"""Which units shapes keep, as HTML: a picture of one shape at a time, and all of them as tables."""

from __future__ import annotations

from amoeba_deploy.report.document import Report
from amoeba_deploy.report.kept import Kept
from amoeba_deploy.report.markup import escaped, folded, paragraph, section, table


def kept_markup(report: Report) -> str:
    """A picture of one shape at a time, which a script draws, and tables of all."""
    said = (
        "A row is a block of the full model; its squares are query heads, the strip beside them its neurons in "
        "equal parts, the darker the more of a part is kept. What is removed is hollow."
    )
    engines = "".join(
        f'<option value="{number}">{escaped(", ".join(kept.engines))}</option>'
        for number, kept in enumerate(report.kept)
    )
    choose = f'<label>Sizes for <select id="kept-engine">{engines}</select></label>\n' if len(report.kept) > 1 else ""
    content = (
        f'{paragraph(said)}<div class="controls">\n{choose}<label>Shape <select id="kept-shape"></select></label>\n'
        f'</div>\n<p id="kept-said" aria-live="polite"></p>\n<div id="kept-picture"></div>\n'
    )
    return section("kept", "What each shape keeps", content + "".join(_tables(kept) for kept in report.kept))


def _tables(kept: Kept) -> str:
    of = f"for {', '.join(kept.engines)}"
    rows = []
    for name, blocks in kept.shapes.items():
        indices = [index for index, _ in blocks]
        patterns = [kept.patterns[number] for _, number in blocks]
        heads = _range([pattern.heads.count("1") for pattern in patterns])
        neurons = _range([pattern.count for pattern in patterns])
        rows.append([name, f"{heads} of {kept.heads}", f"{neurons} of {kept.neurons}", ", ".join(map(str, indices))])
    head = ["shape", "heads a block", "neurons a block", "blocks kept (the first is 0)"]
    caption = f"What shapes keep, {of}"
    return folded(f"{caption}, as a table", table(caption, head, rows, 4))


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
