"""Draw docs/images/report-*.png anew: the report of the checkpoint that ships, as docs/report.md shows it.

    .venv/bin/python tools/report_screenshots.py

Needs chromium (tools/install_test_servers) and the extra ``test``. Two engines measured on epyc-zen4-2, one estimated
on orin-nx; the pictures are of a desk's window in light and dark colours, of a phone's, and of the first printed page.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
OPTIONS = ("--device", "epyc-zen4-2", "--device", "orin-nx", "--flow", "onnx,openvino", "--precision", "int8")
BUDGET = "0.8"

sys.path.insert(0, str(ROOT / "tests"))
from browser import Page, browser_page  # noqa: E402


def top_of(page: Page, selector: str) -> float:
    """How far from the top of the page an element begins."""
    return float(page.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().top + window.scrollY"))


def draw(page: Page, file: Path, selector: str, width: int, height: int) -> None:
    """Write what a window shows from an element on."""
    page.screenshot(file, {"x": 0, "y": max(top_of(page, selector) - 16, 0), "width": width, "height": height})


def open_at(page: Page, file: Path, width: int, height: int, scheme: str, *, touch: bool = False) -> None:
    """Open the report in a window of that size, with a budget typed into its first board."""
    page.size(width, height, touch=touch)
    page.media(scheme=scheme)
    page.open(file)
    page.until("document.documentElement.dataset.drawn === 'yes'")
    page.type("#board0 .budget", BUDGET)
    page.evaluate("document.activeElement.blur()")


def main() -> None:
    """Write the report into a folder that is left empty again, and all pictures into docs/images."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser_page(Path(folder) / "profile") as page:
        file = Path(folder) / "report.html"
        amoeba = [sys.executable, "-m", "amoeba_deploy", "report", *OPTIONS, "-o", str(file), "--quiet"]
        subprocess.run(amoeba, check=True, stdout=subprocess.DEVNULL)
        open_at(page, file, 1280, 900, "light")
        draw(page, IMAGES / "report-light.png", "h1", 1265, 1000)
        open_at(page, file, 1280, 900, "dark")
        draw(page, IMAGES / "report-dark.png", "#latency", 1265, 1400)
        open_at(page, file, 390, 844, "light", touch=True)
        draw(page, IMAGES / "report-phone.png", "#board0", 390, 1180)
        open_at(page, file, 760, 1000, "light")
        page.media(kind="print")
        draw(page, IMAGES / "report-print.png", "h1", 760, 1000)
        assert page.complaints == [], page.complaints


if __name__ == "__main__":
    main()
