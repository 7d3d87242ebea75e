"""The built book, opened in a real browser without a network: nothing is missing, broken or too wide."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

HTML = Path(__file__).resolve().parent.parent / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
WIDTHS = {"desktop": 1280, "phone": 390}
PAGES = sorted(file.relative_to(HTML).as_posix() for file in HTML.rglob("*.html") if "_static" not in file.parts)

# What a reader would see as broken. Each function of the page returns a list of complaints.
FIND_FAULTS = r"""() => {
  const faults = [], article = document.querySelector('article') || document.body;
  const shown = element => (element.outerHTML || '').slice(0, 120);
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    faults.push(`the page is ${document.documentElement.scrollWidth} px wide on a screen of ${width}`);
  const scrolls = element => {
    for (let up = element.parentElement; up && up !== article; up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible') return true;
    return getComputedStyle(element).overflowX !== 'visible';
  };
  for (const element of article.querySelectorAll('*')) {
    const box = element.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(element)) { faults.push(`sticks out: ${shown(element)}`); break; }
  }
  for (const math of document.querySelectorAll('.math'))
    if (!math.querySelector('mjx-container')) faults.push(`maths not rendered: ${shown(math)}`);
  for (const error of document.querySelectorAll('mjx-merror')) faults.push(`maths with an error: ${error.textContent}`);
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    if (!text.parentElement.closest('pre, code, script, style, mjx-container') && /\\\(|\\\[|\$\$|\\[a-z]+\{/.test(text.data))
      faults.push(`raw TeX: ${text.data.slice(0, 80)}`);
  }
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) faults.push(`image did not load: ${shown(image)}`);
    const alt = image.getAttribute('alt') || '';
    if (!alt.trim() || /\.(png|svg|jpe?g|gif)$/i.test(alt)) faults.push(`image without alt text: ${shown(image)}`);
  }
  return faults;
}"""


def missing(reason: str) -> None:
    """Skip where a reader's machine lacks something; fail in CI, which promises to have it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def site():
    """The address of a local server for the built book."""
    if not PAGES:
        missing("the book is not built: make book")
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing("there is no Chromium or Chrome; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, address: str, width: int) -> list[str]:
    """Open a page as a reader would and return everything that is wrong with it."""
    host, faults = urlsplit(address).netloc, []
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = context.new_page()
    page.on("console", lambda message: faults.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"request failed: {request.url}"))
    page.on(
        "response", lambda answer: faults.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None
    )

    def stay_at_home(route):
        if urlsplit(route.request.url).netloc == host:
            return route.continue_()
        faults.append(f"asks another host: {route.request.url}")
        return route.abort()

    page.route(re.compile("^https?:"), stay_at_home)
    page.goto(address, wait_until="load")
    page.wait_for_load_state("networkidle")
    page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => null) : null")
    faults += page.evaluate(FIND_FAULTS)
    context.close()
    return faults


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("place", PAGES or ["index.html"])
def test_page_is_whole(site, browser, place, device):
    assert open_page(browser, f"{site}/{place}", WIDTHS[device]) == []


def test_a_broken_page_is_noticed(browser, tmp_path):
    tmp_path.joinpath("bad.html").write_text(
        "<article><p>raw \\(x\\)</p><p class='math'>y</p><img src='gone.png'><div style='width:900px'>wide</div>"
        "<script src='https://example.org/a.js'></script><script>undefined.x</script></article>"
    )
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        faults = "\n".join(open_page(browser, f"http://127.0.0.1:{server.server_port}/bad.html", WIDTHS["phone"]))
        server.shutdown()
    for expected in (
        "raw TeX", "not rendered", "did not load", "without alt text", "px wide", "sticks out",
        "another host", "script error", "404",
    ):  # fmt: skip
        assert expected in faults


def test_maths_is_on_the_pages(site):
    """Otherwise the check that maths is rendered would check nothing."""
    assert sum('class="math' in (HTML / place).read_text(encoding="utf-8") for place in PAGES) >= 2


class Outline(HTMLParser):
    """The anchors and the links of one page."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors, self.links = {"", "top"}, []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.update(filter(None, (values.get("id"), values.get("name"))))
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def broken_links(root: Path) -> list[str]:
    """Links below ``root`` that lead to a file or an anchor that is not there."""
    outlines = {file: Outline(file) for file in root.rglob("*.html") if "_static" not in file.relative_to(root).parts}
    faults = []
    for file, outline in outlines.items():
        for link in outline.links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            path, anchor = urldefrag(link.split("?")[0] if "#" not in link else link)
            target = (file.parent / unquote(path.split("?")[0])).resolve() if path else file.resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults.append(f"{file.relative_to(root)}: {link} is not there")
            elif target in outlines and unquote(anchor) not in outlines[target].anchors:
                faults.append(f"{file.relative_to(root)}: {link} has no such anchor")
    return faults


def test_no_broken_links(site):
    assert broken_links(HTML.resolve()) == []


def test_broken_links_are_noticed(tmp_path):
    tmp_path.joinpath("a.html").write_text(
        "<p id='here'></p><a href='b.html'></a><a href='#gone'></a><a href='a.html#here'></a>"
    )
    assert sorted(broken_links(tmp_path)) == ["a.html: #gone has no such anchor", "a.html: b.html is not there"]
