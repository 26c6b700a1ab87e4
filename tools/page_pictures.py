"""Makes docs/report.png and docs/viewer.png from a page, with a Chromium of the system.

    python tools/page_pictures.py runs/ablation_small/report.html

It needs the extra `browser`, and `chromium` on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 200_000


def pictures(page_path: Path, folder: Path) -> list[Path]:
    """Plots of the page, and one response with the pointer on the
    token that was rejected.

    Raises:
        ValueError: without a browser, or a page that shows no such token.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise ValueError("expected chromium on the path, found none")
    top, viewer = folder / "report.png", folder / "viewer.png"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1000})
        page.goto(page_path.resolve().as_uri())
        start = page.locator("h2", has_text="Against log_lenience")
        if start.count():  # a grid: behind its tables
            start.evaluate("h => window.scrollTo(0, h.getBoundingClientRect().top - 12)")
        page.screenshot(path=top)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        article = page.locator("article.sample.wide", has=page.locator("b.cut")).first
        if not article.count():
            raise ValueError(f"{page_path}: expected a response that left its draft, found none")
        # As little as shows it: the prompt, and the first epoch with a rejection.
        article.evaluate(
            "a => { const fork = a.querySelector('.fork'); let n = fork.nextElementSibling;"
            " while (n) { const next = n.nextElementSibling; n.remove(); n = next; }"
            " a.style.paddingBottom = '110px'; }"
        )
        article.locator("pre.gone b.cut").first.hover()
        article.screenshot(path=viewer)
        browser.close()
    return [top, viewer]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a picture is too large for a page."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("page", type=Path, help="report.html of a run or a grid")
    options.add_argument("--out", type=Path, default=ROOT / "docs")
    args = options.parse_args(argv)
    status = 0
    for path in pictures(args.page, args.out):
        size = path.stat().st_size
        print(f"{path}: {size:,} bytes")
        if size > MOST_BYTES:
            print(f"error: {path}: expected at most {MOST_BYTES:,} bytes", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
