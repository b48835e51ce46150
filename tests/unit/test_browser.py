"""Pages in a real browser: a report has to be readable on any screen, offline."""

import copy
import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from random_networks import NetworkBuilder, Quantized

from qcnn_py.inspection import html_page
from qcnn_py.report_page import render, render_index

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "example-report").glob("*/report.json"))
BROWSERS = ("google-chrome", "chromium", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: {', '.join(BROWSERS)}"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # As root, as in many containers, it does not start with its sandbox.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def report_page(path: Path) -> str:
    report = json.loads(path.read_text())
    picture = BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    examples = report["examples"]["images"] if "examples" in report else ()
    return render(report, [picture.getvalue()] * len(examples))


def inspection_page() -> str:
    builder = NetworkBuilder((3, 6, 5))
    builder.conv(6, 3, name="a_convolution_with_a_long_name" * 2)
    builder.fc(8, quantized=Quantized(16, 4))
    return html_page(builder.build().compile(), "model.qcnn")


def index_page() -> str:
    reports = [json.loads(path.read_text()) for path in REPORTS]
    for report in [each for each in reports if each["kind"] != "activations"]:
        for number in range(4):
            other = copy.deepcopy(report)
            other["title"] = f"a run with a rather long name, number {number}"
            other["speed"]["contenders"][1]["average_ms"] *= 1 + number
            if report["kind"] == "pipeline":
                other["size"]["file"]["after"] *= 1 + number / 10
                other["accuracy"]["stages"][-1]["top1"]["mean"] += number / 20
            reports.append(other)
    return render_index([("somewhere/report.html", each) for each in reports])


PAGES = {path.parent.name: lambda path=path: report_page(path) for path in REPORTS}
PAGES["inspect"] = inspection_page
PAGES["index"] = index_page


@pytest.fixture(scope="module", params=PAGES)
def file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    path.write_text(PAGES[request.param](), encoding="utf-8")
    return path


def opened(browser: Browser, file: Path, width: int, **options: Any) -> Page:
    """Open a page without network; what it complains of becomes an error here."""
    context = browser.new_context(
        viewport={"width": width, "height": 844}, offline=True, **options
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda each: complaints.append(each.url))
    page.goto(file.as_uri())
    inside = (file.as_uri(), "data:")
    assert [text for text in complaints if not text.startswith(inside)] == []
    return page


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, file: Path, width: int
) -> None:
    page = opened(browser, file, width)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_figures_are_drawn(browser: Browser, file: Path) -> None:
    page = opened(browser, file, 390)
    boxes = [chart.bounding_box() for chart in page.locator("svg.chart").all()]
    assert all(box["width"] > 100 and box["height"] > 10 for box in boxes)
    # A page that compares networks has no charts of layers.
    fewer = {"inspect": 0, "index": 2, "digits-qnn": 5}
    assert len(boxes) >= fewer.get(file.stem, 6)
    sizes = page.locator("img").evaluate_all("all => all.map(e => e.naturalWidth)")
    assert 0 not in sizes


def luminance(colour: str) -> float:
    """Return the relative luminance of a CSS colour (WCAG 2.2)."""
    channels = [int(part) / 255 for part in colour.strip("rgb()").split(",")]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return sum(
        weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(
    browser: Browser, file: Path, scheme: str
) -> None:
    if file.stem == "inspect":
        pytest.skip("this page states no colours: the browser's own are legible")
    page = opened(browser, file, 390, color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    colours = page.locator("h1, h2, p, figcaption, svg.chart text").evaluate_all(
        "all => [...new Set(all.map(e => { const style = getComputedStyle(e);"
        " return e.tagName === 'text' ? style.fill : style.color; }))]"
    )
    for colour in colours:
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        # Of normal text, level AA.
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_pages_are_small(file: Path) -> None:
    assert file.stat().st_size < 2_000_000
