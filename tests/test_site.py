"""The documentation as a reader has it: in a browser, on a phone and on a desktop, light and dark (`make browser`)."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

playwright = pytest.importorskip("playwright.sync_api", reason="playwright not installed: run `make browser`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt install chromium)"),
    # A browser is many processes, and the pipes and sockets to them end when the garbage collector finds them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ROOT = Path(__file__).parent.parent
WIDTHS = {"phone": 390, "desktop": 1280}
# Nothing that a page does not need, and nothing that asks the world.
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file, to one that may have gone to the next page meanwhile."""
        with contextlib.suppress(ConnectionError):
            super().copyfile(source, outputfile)


@pytest.fixture(scope="module")
def nothing_left_behind() -> None:
    """Not here: these tests share a browser."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site, built as for a release, at an address."""
    directory = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all."""
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(params=list(WIDTHS))
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A page of a certain width, that fails the test if a script or a request on it fails."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    # Who leaves a page stops what it still loads: that is no trouble.
    page.on("requestfailed", lambda it: troubles.append(it.url) if it.failure != "net::ERR_ABORTED" else None)
    yield page
    context.close()
    assert not troubles


def addresses(page: Any, site: str) -> list[str]:
    """The pages that the navigation names."""
    page.goto(f"{site}/index.html")
    found = page.eval_on_selector_all(".md-nav--primary > .md-nav__list > .md-nav__item > a", "a => a.map(a => a.href)")
    return list(dict.fromkeys(address.partition("#")[0] for address in found))


def test_every_page_fits_and_is_whole(page: Any, site: str) -> None:
    """Each page has one heading, all its pictures, and needs no sideways scrolling."""
    pages = addresses(page, site)
    assert len(pages) > 10
    for address in pages:
        page.goto(address)
        assert page.locator("h1").count() == 1, address
        # What is too wide, a table or a code block, scrolls by itself, inside of the page.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), address
        broken = page.eval_on_selector_all("img", "all => all.filter(i => !i.naturalWidth).map(i => i.src)")
        assert broken == [], address
        for figure in page.locator("figure svg").all():
            assert figure.bounding_box()["width"] > 200, address


def test_every_link_leads_somewhere(page: Any, site: str) -> None:
    """Each link into the site leads to a page that is there, and its anchor is on it."""
    for address in addresses(page, site):
        page.goto(address)
        links = page.eval_on_selector_all("article a[href]", "all => all.map(a => a.href)")
        for link in {link for link in links if link.startswith(site)}:
            target, _, anchor = link.partition("#")
            if target != address:
                assert page.request.get(target).ok, (address, link)
            elif anchor:
                assert page.evaluate("name => !!document.getElementById(name)", anchor), (address, link)


def test_navigation_is_clicked_through(page: Any, site: str) -> None:
    """From the first page to each of the others, by the menu: on a phone it is behind a button."""
    names = [address.rsplit("/", 1)[1] for address in addresses(page, site)]
    for name in names[1:]:
        page.goto(f"{site}/index.html")
        if page.viewport_size["width"] < 1000:
            page.locator("label.md-header__button[for=__drawer]").click()
        page.locator(f".md-nav--primary a[href='{name}']").first.click()
        page.wait_for_url(f"**/{name}")
        assert page.locator("h1").is_visible()


def test_search_finds_and_leads_there(page: Any, site: str) -> None:
    """Who types "zombie" gets pages that speak of it, and a click leads to one."""
    page.goto(f"{site}/index.html")
    if page.viewport_size["width"] < 1000:
        page.locator("label.md-header__button[for=__search]").click()
    else:
        page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").press_sequentially("zombie")
    first = page.locator(".md-search-result__item a").first
    first.wait_for(state="visible")
    first.click()
    page.wait_for_load_state()
    assert "zombie" in page.locator("article").inner_text().lower()


def test_dark_and_light(page: Any, site: str) -> None:
    """The button changes the palette, and a diagram's text changes with it."""
    page.goto(f"{site}/design.html")
    label = page.locator("figure svg text").first

    def look() -> tuple[str, str]:
        scheme = page.locator("body").get_attribute("data-md-color-scheme")
        return scheme, label.evaluate("e => getComputedStyle(e).fill")

    before = look()
    page.locator("form.md-header__option label:visible").first.click()
    page.wait_for_function("scheme => document.body.dataset.mdColorScheme != scheme", arg=before[0])
    after = look()
    assert {before[0], after[0]} == {"default", "slate"}
    assert before[1] != after[1]
