"""The pages in a browser: loaded, drawn, pointed at; nothing asked of the network.

Any Chromium of the system will do (Debian: `apt-get install chromium`, 20 seconds), driven by the
package playwright (extra `browser`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import metrics, sample, write_run

from spec_rollout.report import Run, render_page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install 'spec-rollout[browser]'"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Without the sandbox: containers run tests as root.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page's HTML; afterwards fails on errors of the console and on requests."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))

    def open_page(html: str) -> Any:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        page.goto(path.as_uri())
        return page

    yield open_page
    assert told == []
    assert asked == [(tmp_path / "page.html").as_uri()]
    page.close()


def runs(tmp_path: Path) -> list[Run]:
    from spec_rollout.report import load_run

    found = []
    for name, reused in (("plain", 0), ("lenient", 60)):
        run = load_run(write_run(tmp_path / name, metrics(8, reused)))
        run.summary = {"reuse": reused > 0, "drafting": False}
        found.append(run)
    found[1].samples = [sample(3, 0, 0, None), sample(3, 1, 1, "axyz")]
    return found


def test_every_figure_is_drawn(opened: Any, tmp_path: Path) -> None:
    page = opened(render_page(runs(tmp_path)))
    boxes = [svg.bounding_box() for svg in page.locator("figure svg").all()]
    assert len(boxes) > 15
    assert all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    # The curves of both runs have an extent of their own.
    paths = page.locator("figure svg").first.evaluate(
        "svg => [...svg.querySelectorAll('path')].filter(p => {"
        "const b = p.getBBox(); return b.width > 20 && b.height > 1}).length"
    )
    assert paths >= 2
    # The page itself is not wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_pointing_at_a_token_tells_how_it_fared(opened: Any, tmp_path: Path) -> None:
    page = opened(render_page(runs(tmp_path)))
    cut = page.locator("pre.gone b.cut")
    style = "b => getComputedStyle(b, '::after').content"
    assert cut.evaluate(style) == "none"
    cut.hover()
    told = cut.evaluate(style).replace("attr(data-i)", cut.get_attribute("data-i"))
    for name in ("q", "p", "h", "u"):
        told = told.replace(f"attr(data-{name})", cut.get_attribute(f"data-{name}") or "")
    for text in ("token ", "1", "old log-prob ", "-0.250", "draw ", "0.125"):
        assert text in told
    assert cut.evaluate("b => getComputedStyle(b, '::after').position") == "absolute"
    kept, new = page.locator("pre.kept b").first, page.locator("pre.new b").last
    assert kept.evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(211, 235, 217)"
    new.hover()
    assert "log-prob " in new.evaluate(style)
    assert cut.evaluate(style) == "none"  # one at a time
