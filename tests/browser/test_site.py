"""The site in a browser: words are found, formulas and pictures are there, nothing is loaded from elsewhere."""
import json
import re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[2]
MATH = "() => window.MathJax?.startup?.promise?.then(() => true)"  # all formulas of the page are set
PICTURES = "() => [...document.querySelectorAll('.cell_output img')].map(i => i.complete && i.naturalWidth > 0)"


def chapter(room: str, name: str) -> str:
    "Path of a chapter under nbs/, and of its page under the site's top, without the suffix."
    found, = (root/"nbs"/room).glob(f"[0-9][0-9]_{name}.ipynb")
    return f"{room}/{found.stem}"


SCORES, INVERT = chapter("core", "scores"), chapter("inversion", "invert")
LOOP, LAYERWISE = chapter("inversion", "loop"), chapter("posthoc", "layerwise")


def at_ease(page, address):
    "No error, nothing from elsewhere."
    assert not page.wrong, page.wrong
    assert {u for u in page.asked if not u.startswith((address, "data:", "blob:"))} == set()


def committed_pictures(notebook: str) -> int:
    cells = json.loads((root/"nbs"/f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [o for c in cells if "#| hide" not in "".join(c["source"]) for o in c.get("outputs", ())]
    return sum("image/" in " ".join(o.get("data", ())) for o in shown)


def test_start_page(page, site):
    page.goto(f"{site}/index.html")
    assert page.title().startswith("nioodd") and page.locator("article h1").inner_text().startswith("nioodd")
    parts = page.locator(".bd-sidebar-primary p.caption").all_inner_texts()
    assert {"Foundations", "Network inversion", "Trust intervals", "Explorers", "Reference"} <= set(parts)
    page.locator(".bd-sidebar-primary a", has_text=re.compile("^layerwise$")).click()
    page.wait_for_url(f"**/{LAYERWISE}.html")
    assert page.locator("article h1").inner_text().startswith("layerwise")
    at_ease(page, site)


def test_search(page, site):
    page.goto(f"{site}/index.html")
    page.locator(".bd-sidebar-primary .search-button-field").click()
    box = page.locator("dialog input[type=search]")
    box.fill("garbage")
    box.press("Enter")
    page.wait_for_url("**/search.html?q=garbage*")
    page.wait_for_function("() => /found \\d+ page/.test(document.querySelector('#search-results')?.innerText ?? '')")
    found = page.locator("#search-results li > a").evaluate_all("links => links.map(a => new URL(a.href).pathname)")
    assert f"/{LOOP}.html" in found and any(f.startswith("/api/inversion.") for f in found)
    page.locator(f"#search-results li > a[href*='{LOOP}.html']").first.click()
    page.wait_for_url(f"**/{LOOP}.html*")
    at_ease(page, site)


@pytest.mark.parametrize("notebook", [INVERT, LAYERWISE, "papers/network_inversion"])
def test_notebook(page, site, notebook):
    page.goto(f"{site}/{notebook}.html")
    page.wait_for_load_state("load")
    shown = page.evaluate(PICTURES)
    assert len(shown) == committed_pictures(notebook) > 0 and all(shown)
    if page.locator(".math").count():
        page.evaluate(MATH)
        assert page.locator("mjx-container").count() >= page.locator(".math").count()
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    else: assert notebook.startswith("papers/")
    assert page.locator(".cell_input").count() > 3
    at_ease(page, site)


def test_api_page(page, site):
    "Signature, sentence, parameters with their comments, and the way to the cell that defines it."
    page.goto(f"{site}/api/core.scores.html")
    entry = page.locator("dl.py:has(> dt[id='nioodd.core.scores.uncertainty'])")
    assert re.sub(r"\s+", "", entry.locator("dt.sig").first.inner_text()).startswith("uncertainty(logits,n_known=None)")
    assert "rescaled Gini index" in entry.inner_text()
    table = entry.locator("dl.parameters")
    heads = [t.split(":")[0] for t in table.locator("dt").all_inner_texts()]
    assert heads == ["logits", "n_known", "→ Tensor"] and "[N, K]" in table.inner_text()
    entry.locator("a:has(.viewcode-link)").click()
    page.wait_for_url(f"**/{SCORES}.html#cell-*")
    cell = page.locator(".exported:target + .cell")
    assert "def uncertainty(" in cell.inner_text()
    page.locator(".exported:target a", has_text="uncertainty").click()
    page.wait_for_url("**/api/core.scores.html#nioodd.core.scores.uncertainty")
    at_ease(page, site)


@pytest.mark.parametrize("name", ["index", LAYERWISE, "api/posthoc.layerwise", "papers/scoreboard"])
def test_narrow_window(page, site, name):
    "On a telephone, wide tables and code scroll by themselves, not the page."
    page.set_viewport_size(dict(width=400, height=800))
    page.goto(f"{site}/{name}.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    at_ease(page, site)


def test_from_disk(page, site_folder):
    "Without a server and without a network: a page opened as a file has its formulas and pictures."
    page.goto((site_folder/f"{LAYERWISE}.html").as_uri())
    page.evaluate(MATH)
    assert page.locator("mjx-container").count() and all(page.evaluate(PICTURES))
    assert all(u.startswith(("file:", "data:")) for u in page.asked)
