"""Plots need no font and cut no label off; the page stands alone, in a real browser too."""

import json
import re

import pytest
from browser import CHROMIUM, Browser
from made_results import ab, ladder

from report import documents, kinds, page, plots, results


def test_plots_are_outlines_and_the_same_each_time(house):
    """No viewer needs a font; the same numbers give the same bytes."""
    drawn = [p.read_text(encoding="utf-8") for p in (house / "docs").glob("*.svg")]
    assert len(drawn) == 6
    assert not any("<text" in svg or "font-family" in svg for svg in drawn)
    source = house / "results" / "a-machine" / "scale.json"
    result = results.load(source)
    again = plots.svg_text(plots.plot_isoflop(result), source)
    assert again == (house / "docs" / "isoflop-a-machine.svg").read_text(encoding="utf-8")
    for found in (result["held_out"]["predicted"], *(level["law"] for level in result["fit"]["levels"])):
        found.update(dict.fromkeys({"low", "high", "N_interval", "ratio_interval"} & found.keys()))
    assert plots.svg_text(plots.plot_isoflop(result), source) != again  # too few points for intervals


def test_no_label_is_cut_off():
    result = ladder()
    result["rungs"][2]["changes"] = {
        "a_setting_with_a_name_that_is_far_too_long_for_a_label": ["what it was before", "what it is now"]
    }
    figure = plots.plot_speed(result)
    figure.draw_without_rendering()
    inside = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert min(inside.x0, inside.y0, figure.bbox.x1 - inside.x1, figure.bbox.y1 - inside.y1) >= 0


def test_page_holds_everything_and_asks_for_nothing(house):
    html = (house / "docs" / "index.html").read_text(encoding="utf-8")
    assert '<html lang="en">' in html
    assert "default-src &#39;none&#39;; style-src &#39;unsafe-inline&#39;; img-src data:" in html
    assert html.count("<svg") == html.count('role="img" aria-label="') == 6
    assert page.SECTIONS.keys() >= kinds.KINDS.keys()
    for path in documents.result_files(house):
        assert f"<h3>{page.SECTIONS[results.load(path)['kind']][0]}</h3>" in html
    asks = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", html)
    assert all(a.startswith(("#", "data:,")) or b.strip("\"'").startswith("#") for a, b in asks)


def test_headings_are_unique(house, root):
    """Of two configs measured by one command, of two machines, and of two that call themselves the same."""
    for place, hardware, name, which in (
        ("a-machine", "A machine, 2 cores", "ab_a_b.json", ab()),
        ("a-machine", "A machine, 2 cores", "ab_a_c_T32.json", ab()),
        ("another", "Another machine, 4 cores", "ladder.json", ladder()),
        ("another", "Another machine, 4 cores", "ab_a_b.json", ab()),
        ("another-2", "Another machine, 4 cores", "ladder.json", ladder()),
    ):
        which["machine"]["hardware"] = hardware
        path = house / "results" / place / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(which), encoding="utf-8")
    html = page.page(documents.result_files(house), house / "docs")
    headings = re.findall(r"<(h[123])>(.*?)</\1>", html)
    assert len(headings) == len(set(headings)) == 1 + 3 + 14
    assert ("h3", "Two configs: a_c_T32, A machine, 2 cores") in headings
    assert ("h2", "Another machine, 4 cores (another-2)") in headings
    ours = re.findall(r"<h[123]>(.*?)</h", (root / "docs" / "index.html").read_text(encoding="utf-8"))
    assert len(ours) == len(set(ours)) > 10


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium on the PATH (Debian: apt install chromium): the page is not looked at")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_page_in_a_browser(house, browser, width, scheme):
    """As wide as the window, in the asked scheme, readable, and without a request but for the page itself."""
    url = (house / "docs" / "index.html").as_uri()
    browser.show(url, width, scheme)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.requests() == [url]
    assert browser.complaints() == []
    ground, text = (
        [int(n) for n in re.findall(r"\d+", browser.value(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("backgroundColor", "color")
    )
    assert (sum(ground) > sum(text)) == (scheme == "light")
    assert abs(sum(ground) - sum(text)) > 3 * 150
    glyph = "[...document.querySelectorAll('svg use')].find(u => u.getAttribute('xlink:href').includes('DejaVu'))"
    letters = browser.value(f"getComputedStyle({glyph}).fill")
    assert [int(n) for n in re.findall(r"\d+", letters)[:3]] == text  # plots write in the page's colour
    assert browser.value("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)")
    assert browser.value("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == browser.value(
        "document.querySelectorAll('[id]').length"
    )
