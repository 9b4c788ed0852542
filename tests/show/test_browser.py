"""The page in a real browser: it is opened, moved over, clicked and typed at; it says no error and loads nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from factormix.show.page import write_page
from factormix.show.trace import Trace
from tests.show.browser import NAMES, Page, find_browser, opened
from tests.show.tiny import PIECES

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None or shutil.which("bash") is None,
    reason=f"no browser: none of {', '.join(NAMES)} is on the path, and FACTORMIX_CHROMIUM names none (or no bash)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(str(BROWSER), tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def no_error_and_no_request(browser: Page) -> Iterator[None]:
    browser.events.clear()
    yield
    browser.js("1")  # fetches what has been said until now
    said = {event.get("method"): event for event in browser.events}
    assert "Runtime.exceptionThrown" not in said, said["Runtime.exceptionThrown"]
    assert "Log.entryAdded" not in said, said["Log.entryAdded"]
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith("file:") and url.endswith("page.html") for url in asked), asked


@pytest.fixture
def experts(browser: Page, small: Trace, tmp_path: Path) -> Page:
    write_page(replace(small, sites=small.sites[:2]), tmp_path / "page.html", "</title><b>Title</b>")
    browser.open(tmp_path / "page.html")
    return browser


@pytest.fixture
def domains(browser: Page, small: Trace, tmp_path: Path) -> Page:
    write_page(replace(small, sites=small.sites[2:]), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    return browser


def text(page: Page, selector: str) -> str:
    return page.js(f"document.querySelector({selector!r}).textContent")


def strength(page: Page, token: int) -> float:
    return float(page.js(f"spans[{token}].style.getPropertyValue('--a')"))


def hue(page: Page, token: int) -> str:
    return page.js(f"spans[{token}].style.getPropertyValue('--h')")


def test_the_text_is_shown_as_text(experts: Page) -> None:
    assert experts.js("Array.from(document.querySelectorAll('.document p'), (p) => p.textContent)") == [
        "".join(PIECES[:4]),
        "".join(PIECES[4:]),
    ]
    assert text(experts, "h1") == experts.js("document.title") == "</title><b>Title</b>"
    assert experts.js("document.querySelectorAll('#text b, #text script, h1 b').length") == 0
    assert text(experts, "#facts") == "6 tokens, 2 documents, 2 sites"
    assert experts.js("getComputedStyle(spans[5], '::before').content") == '"<s>"'


def test_a_click_shows_experts_scores_and_ranks(experts: Page) -> None:
    experts.click('[data-t="2"]')
    rows = "Array.from(document.querySelectorAll('#token tr'), (r) => Array.from(r.children, (c) => c.textContent))"
    assert experts.js(rows)[1:] == [
        ["1", "", "0", "2.00", "fired"],
        ["2", "", "2", "1.00", "fired"],
        ["3", "", "1", "0.00", ""],
    ]
    assert experts.js("document.querySelector('.selected').dataset.t") == "2"
    experts.choose("#site", "1")
    assert [row[2] for row in experts.js(rows)[1:]] == ["2", "0", "1"]  # the other site's order, the token stays
    experts.key("ArrowRight")
    assert experts.js("document.querySelector('.selected').dataset.t") == "3"
    experts.click('[data-t="3"]')
    assert text(experts, "#token h2") == "No token selected"


def test_the_keyboard_reaches_every_token(experts: Page) -> None:
    for token in ("0", "1", "2"):
        experts.key("ArrowRight")
        assert experts.js("document.querySelector('.selected').dataset.t") == token
    experts.key("ArrowLeft")
    assert experts.js("document.querySelector('.selected').dataset.t") == "1"


def test_the_mouse_over_a_token_tells_its_experts(experts: Page) -> None:
    assert experts.js("document.getElementById('tip').hidden")
    experts.move('[data-t="4"]')
    assert not experts.js("document.getElementById('tip').hidden")
    assert text(experts, "#tip") == '"{{data}}"  experts 1 (2.00), 2 (1.00)'
    experts.move("h1")
    assert experts.js("document.getElementById('tip').hidden")


def test_colours_follow_the_first_expert_or_one_that_is_clicked(experts: Page) -> None:
    first = [hue(experts, t) for t in range(6)]
    assert first[0] == first[1] == first[2] == first[5] and len({first[0], first[3], first[4]}) == 3
    experts.click('[data-column="2"]')
    assert [strength(experts, t) > 0 for t in range(6)] == [False, False, True, True, True, False]
    assert len({hue(experts, t) for t in range(6)}) == 1
    assert strength(experts, 3) > strength(experts, 2)  # score 2 and score 1
    experts.click('[data-column="2"]')
    assert [hue(experts, t) for t in range(6)] == first


def test_loads_and_averages_are_the_traces(experts: Page) -> None:
    assert experts.js("Array.from(document.querySelectorAll('#columns .value'), (v) => v.textContent)") == [
        "83 %", "67 %", "50 %",
    ]  # fmt: skip
    assert "entropy 1.55 of 1.58 bits" in text(experts, "#columns .soft")
    rows = "Array.from(document.querySelectorAll('#averages tr'), (r) => Array.from(r.children, (c) => c.textContent))"
    assert experts.js(rows)[:3] == [
        ["By text", "tokens", "0", "1", "2"],
        ["one", "4", "100", "50", "50"],
        ["two", "2", "50", "100", "50"],
    ]


def test_all_sites_of_experts_colour_by_overlap(experts: Page) -> None:
    experts.choose("#site", "all-experts")
    assert "average token" in text(experts, "#legend")
    experts.click('[data-t="0"]')
    assert "selected token" in text(experts, "#legend")
    # tokens 1 and 5 share both experts with token 0, the others one of two
    assert [strength(experts, t) for t in (1, 5)] == [1, 1] and [strength(experts, t) for t in (2, 3, 4)] == [0, 0, 0]
    assert experts.js("document.querySelectorAll('#token tr').length") == 3
    experts.click("#columns .bar:last-child")
    assert experts.js("document.getElementById('site').value") == "1"
    experts.click("#after")
    assert experts.js("document.getElementById('site').value") == "all-experts"


def test_domains_begin_with_the_mean_of_all_sites(domains: Page) -> None:
    assert domains.js("document.getElementById('site').value") == "all-domains"
    domains.click('[data-t="4"]')
    assert "0.375" in text(domains, "#token table")  # the mean of 0.5 and 0.25
    domains.choose("#site", "0")
    assert strength(domains, 0) > strength(domains, 4)
    domains.click('[data-column="1"]')
    assert [strength(domains, t) for t in (0, 1, 5)] == [0, 0.5, 0]
    domains.move('[data-t="4"]')
    assert text(domains, "#tip") == '"{{data}}"  law 0.500, <i>medicine</i> 0.250'
    assert domains.js("document.querySelectorAll('i:not([data-mark])').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_colour(browser: Page, small: Trace, tmp_path: Path, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG AA) between the ink and every hue at full strength."""
    write_page(small, tmp_path / "page.html")
    browser.open(tmp_path / "page.html", scheme=scheme)
    worst = browser.js(
        """(() => {
          const light = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).map((x) => x / 255)
              .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          let worst = 99;
          spans[0].style.setProperty('--a', 1);
          for (let hue = 0; hue < 360; hue += 5) {
            spans[0].style.setProperty('--h', hue);
            const style = getComputedStyle(spans[0]);
            const pair = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
            worst = Math.min(worst, (pair[0] + 0.05) / (pair[1] + 0.05));
          }
          return worst;
        })()"""
    )
    assert worst >= 4.5


def test_a_narrow_window_does_not_scroll_sideways(experts: Page) -> None:
    experts.call("Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1, mobile=False)
    assert experts.js("document.documentElement.scrollWidth <= innerWidth")
