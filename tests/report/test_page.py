"""Plots need no font and cut no label off; the page stands alone, in a real browser too."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from made_results import ab, ladder

from report import documents, kinds, page, plots, results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_plots_are_outlines_and_the_same_each_time(house):
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
    result["rungs"][2]["changes"] = {"a_setting_with_a_name_that_is_far_too_long_for_a_label": ["this", "that it is now"]}
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


LOOK = """<iframe src="docs/index.html" style="width: WIDTHpx; height: 900px; border: 0; color-scheme: SCHEME"></iframe><script>
onload = () => {
  const page = frames[0].document, style = (element) => frames[0].getComputedStyle(element);
  const letter = [...page.querySelectorAll("svg use")].find((use) => use.getAttribute("xlink:href").includes("DejaVu"));
  document.body.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, ground: style(page.body).backgroundColor, text: style(page.body).color,
    letters: style(letter).fill, plots: [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().height),
    loaded: frames[0].performance.getEntriesByType("resource").length,
    ids: [...page.querySelectorAll("[id]")].map((element) => element.id),
  });
};</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH (Debian: apt install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_page_in_a_browser(house, width, scheme):
    """As wide as the window, in the asked scheme, readable, and without a request; looked at in a frame of another page."""
    (house / "look.html").write_text(LOOK.replace("WIDTH", str(width)).replace("SCHEME", scheme))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += ["--allow-file-access-from-files", f"--user-data-dir={house}/profile", "--window-size=1700,1000"]
    line = [CHROMIUM, *flags, "--dump-dom", (house / "look.html").as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr  # refused loads, broken styles, errors
    found = json.loads(unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))
    assert found["width"] <= width
    assert found["loaded"] == 0
    ground, text = (sum(int(n) for n in re.findall(r"\d+", found[name])[:3]) for name in ("ground", "text"))
    assert (ground > text) == (scheme == "light")
    assert abs(ground - text) > 3 * 150
    assert found["letters"] == found["text"]  # plots write in the page's colour
    assert min(found["plots"]) > 100
    assert len(found["ids"]) == len(set(found["ids"]))
