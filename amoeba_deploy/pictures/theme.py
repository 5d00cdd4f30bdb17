"""How charts look: colours that readers with any colour vision can tell apart, thin lines, no boxes."""

from __future__ import annotations

from typing import Any

from amoeba_deploy.pictures.section import HALO, LABEL, REFERENCE

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c", "#b3a100")
"""Okabe and Ito's colours (Color Universal Design, 2008), with grey for their black and a darker yellow: both must be
seen on white and on black."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def config(ink: str, paper: str, narrow: bool = False) -> dict[str, Any]:
    """A Vega-Lite configuration; ``ink`` and ``paper`` are any CSS colours, so that a page can leave them to its style
    sheet."""
    size = 11 if narrow else 12
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": size, "titleFontSize": size, "titleFontWeight": 500}
    legend = {"orient": "top", "columns": 2 if narrow else 4, "columnPadding": 14, "symbolBaseFillColor": ink}
    legend |= {"titleOrient": "top" if narrow else "left", "titleAnchor": "start"}
    layout = {"top": {"anchor": "start", "direction": "vertical", "margin": 6}}
    return {
        "background": paper,
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "range": {"category": list(PALETTE), "ramp": {"scheme": "viridis"}, "heatmap": {"scheme": "viridis"}},
        "axis": text
        | {
            "domainColor": ink,
            "domainOpacity": 0.5,
            "tickColor": ink,
            "tickOpacity": 0.5,
            "gridColor": ink,
            "gridOpacity": 0.12,
            "labelOverlap": "greedy",
            "labelSeparation": 5,
        },
        "legend": text | legend | {"layout": layout},
        "title": {"color": ink, "subtitleColor": ink, "anchor": "start", "subtitlePadding": 6, "subtitleFontSize": 12},
        "text": {"color": ink, "fontSize": size},
        "rule": {"color": ink},
        "point": {"color": ink},
        "style": {
            HALO: {"stroke": paper, "strokeWidth": 4, "strokeJoin": "round", "strokeOpacity": 0.85},
            LABEL: {"fill": ink},
            REFERENCE: {"color": ink, "stroke": ink, "opacity": 0.7},
        },
    }
