#!/usr/bin/env python
"""The site:  python .ci/site.py  makes all notebooks browsable pages with search, and API pages from the modules, in _docs/.

Nothing is executed: a page shows the outputs that were committed. Sphinx's warnings are errors, and so is a link that leads nowhere."""
import argparse
import ast
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from configparser import ConfigParser
from html import escape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
from nbformat.v4 import new_markdown_cell

here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
sys.path.insert(0, str(here/"site"))
from api import Links, Pages, read_package  # noqa: E402

# A part of the book begins with this number and ends before the next one
PARTS = {"00": "Foundations", "07": "Network inversion", "12": "Trust intervals", "16": "Pictures and reports",
         "18": "Speed, runs, comparisons", "22": "Detectors side by side", "28": "In use", "30": "Explorers"}
FOLDERS = {"tutorials": "Tutorials", "papers": "The papers, and what came out"}
CODE = re.compile(r"(`+)(.+?)\1(?!`)")  # a code span
WIDGET = "application/vnd.jupyter.widget-view+json"


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters="=", interpolation=None)
    parser.read(root/"settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def parts(nbs: Path) -> list[tuple[str, list[str]]]:
    "Captions and notebooks (names under nbs/), in the order of reading."
    chapters, found = sorted(p.stem for p in nbs.glob("[0-9]*.ipynb")), {}
    for stem in chapters:
        caption = [c for first, c in PARTS.items() if first <= stem][-1]
        found.setdefault(caption, []).append(f"{stem}.ipynb")
    first, last = ((c, sorted(f"{d}/{p.name}" for p in (nbs/d).glob("*.ipynb"))) for d, c in FOLDERS.items())
    return [p for p in (first, *found.items(), last) if p[1]]


def directives(source: str) -> set[str]: return {m.strip() for m in re.findall(r"^#\|\s*(.*)$", source, re.MULTILINE)}
def only_imports(source: str) -> bool:
    try: return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)
    except SyntaxError: return False  # a magic


def without_loose_ends(html: str) -> str:
    "An output that is part of a larger page: its links to other parts of that page become plain words."
    ids = Addresses(html).ids
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', lambda m: m[0] if m[1] in ids else m[2], html)


class Page:
    "A notebook as its page shows it."

    def __init__(self, name: str, nb, links: Links, pages: set[str], repository: str):
        self.name, self.nb, self.links, self.pages, self.repository = name, nb, links, pages, repository
        self.up = "../" * name.count("/")
        code = [c.source for c in nb.cells if c.cell_type == "code"]
        exported = [m[1] for s in code for m in [re.search(r"^#\|\s*default_exp\s+(\w+)", s, re.MULTILINE)] if m]
        self.module = links.modules.get(exported[0]) if exported else None
        self.names = dict(self.module.names) if self.module else {}
        for source in code:  # what the notebook itself imports
            for module, words in re.findall(rf"^\s*from {links.package}\.(\w+) import ([\w, ]+)", source, re.MULTILINE):
                self.names |= {w.strip(): f"{links.package}.{module}.{w.strip()}" for w in words.split(",")}

    def title(self) -> str: return re.match(r"#\s+(.+)", self.nb.cells[0].source)[1].strip()

    def target(self, address: str) -> str:
        "A link's address on the site: a page stays, another file of the repository is shown where the repository is."
        if re.match(r"[a-z]+:|#", address): return address
        path, fragment = urldefrag(address)
        path = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(self.name), unquote(path)))
        if path.removeprefix("nbs/") in self.pages: return address
        if not (root/path).exists(): sys.exit(f"nbs/{self.name}: a link to {address}, where there is nothing")
        return f"{self.repository.replace('/blob/', '/tree/') if (root/path).is_dir() else self.repository}/{path}" + (f"#{fragment}" if fragment else "")

    def markdown(self, text: str) -> str:
        "Links as the site needs them, and names of the API in code font as links; fenced code stays."
        fenced = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.MULTILINE | re.DOTALL)
        return "".join(part if i % 2 else "\n".join(map(self.line, part.split("\n"))) for i, part in enumerate(fenced))

    def line(self, line: str) -> str:
        def name(match):
            before, after = line[:match.start()], line[match.end():]
            to = None if line.startswith("#") or before.endswith("[") or after.startswith("](") else self.links.target(match[2], self.names)
            return f'<a class="api" href="{self.links.url(to, self.up)}"><code>{escape(match[2])}</code></a>' if to else match[0]
        spans = list(CODE.finditer(line))
        inside = lambda i: any(s.start() < i < s.end() for s in spans)
        made, last = [], 0
        for m in sorted([*spans, *re.finditer(r"\]\(([^)\s]+)\)", line)], key=lambda m: m.start()):
            link = m.re is not CODE
            if m.start() < last or link and inside(m.start()): continue
            made += [line[last:m.start()], f"]({self.target(m[1])})" if link else name(m)]
            last = m.end()
        return "".join([*made, line[last:]])

    def outputs(self, cell) -> list:
        kept = [o for o in cell.outputs if o.get("name") != "stderr" and not (set(o.get("data", ())) <= {WIDGET, "text/plain"} and WIDGET in o.get("data", ()))]
        for o in kept:
            if WIDGET in o.get("data", {}): del o.data[WIDGET]
            if "text/markdown" in o.get("data", {}): o.data["text/markdown"] = self.markdown(o.data["text/markdown"])
            if "text/html" in o.get("data", {}): o.data["text/html"] = without_loose_ends(o.data["text/html"])
        return kept

    def exported(self, cell) -> str:
        "Before an exported cell: its anchor, and links to the entries of what it defines."
        made = [o for o in self.module.objects if o.cell == cell.id] if self.module else []
        made = [f'<a class="api" href="{self.links.url(f"{self.links.package}.{self.module.name}.{o.name}", self.up)}">{o.name}</a>' for o in made]
        return f'<div class="exported" id="cell-{cell.id}">{" ".join(made)}</div>'

    def finished(self):
        "The notebook for myst-nb."
        cells, heading, collapsed = [], self.title(), None
        for cell in self.nb.cells:
            if cell.cell_type != "code":
                if cell.cell_type == "markdown":
                    heading = next(iter(reversed(re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE))), heading)
                    cell.source = self.markdown(cell.source)
                cells.append(cell)
                collapsed = None
                continue
            said = directives(cell.source)
            source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
            hidden, imports = "hide" in said, only_imports(source) and source
            if not source or hidden and (cell.outputs or not (collapsed and re.match(r"(import|from) ", source))): continue
            if collapsed and (hidden or imports) and not cell.outputs:
                collapsed.source += "\n\n" + source
                continue
            cell.source, cell.outputs, tags = source, self.outputs(cell), []
            if "export" in said: cells.append(new_markdown_cell(self.exported(cell)))
            if "echo: false" in said: tags.append("remove-input")
            collapsed = cell if imports and not cell.outputs and "export" in said else None
            if collapsed: tags.append("hide-cell")
            cell.metadata = {"tags": tags, "mystnb": {"image": {"alt": f"{self.title()}: {re.sub(r'[`$*]', '', heading)}"}}}
            cells.append(cell)
        self.nb.cells, self.nb.metadata = cells, {"kernelspec": self.nb.metadata.get("kernelspec", {}), "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
        return self.nb


def toctrees(book: list[tuple[str, list[str]]]) -> str:
    tree = lambda caption, names: "```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(names) + "\n```"
    return "\n\n".join([*(tree(c, [n.removesuffix(".ipynb") for n in names]) for c, names in book), tree("Reference", ["api/index", "command_line"])])


def command_line() -> str:
    "What `nioodd COMMAND --help` says, of every command, on one page."
    os.environ["COLUMNS"] = "92"
    sys.path.insert(0, str(root))
    from nioodd.cli import parser

    def commands(p):
        subs = [a for a in p._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
        yield p
        for a in subs:
            for sub in a.choices.values(): yield from commands(sub)
    shown = [f"## {p.prog}\n\n```text\n{p.format_help().strip()}\n```" for p in commands(parser())]
    return "\n\n".join(["# Command line", '<p class="lead">What <code>nioodd --help</code> and <code>nioodd COMMAND --help</code> say. '
                        'How the commands are made, and a walk through them: <a href="28_cli.html">the chapter on them</a>.</p>', *shown]) + "\n"


def write_sources(to: Path) -> dict[str, int]:
    "Everything Sphinx reads, into a folder; returns how many pages of which kind."
    cfg, nbs = settings(), root/"nbs"
    book, modules = parts(nbs), read_package(root/cfg["lib_path"])
    names = ["index.ipynb", *(n for _, part in book for n in part)]
    links, repository = Links(modules, cfg["lib_path"]), f"{cfg['git_url']}/blob/{cfg['branch']}"
    pages = {n: Page(n, nbformat.read(nbs/n, as_version=4), links, set(names), repository) for n in names}
    titles = {n: p.title() for n, p in pages.items()}
    shutil.copy(here/"site"/"conf.py", to)
    (to/"_static"/"mathjax").mkdir(parents=True)
    mathjax = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0])/"static"/"mathjax"
    for part in ("tex-chtml.js", "input/tex", "output/chtml"):  # what a page of formulas loads; the extension itself would copy four times as much
        (shutil.copy if (mathjax/part).is_file() else shutil.copytree)(mathjax/part, to/"_static"/"mathjax"/part)
    for file in ("style.css", "search.js", "favicon.svg"): shutil.copy(here/"site"/file, to/"_static")
    for name, page in pages.items():
        nb = page.finished()
        if name == "index.ipynb": nb.cells.append(new_markdown_cell(toctrees(book)))
        (to/name).parent.mkdir(exist_ok=True)
        nbformat.write(nb, to/name)
    (to/"api").mkdir()
    api = Pages(modules, cfg["lib_path"], titles)
    (to/"api"/"index.md").write_text(api.index(book), encoding="utf-8")
    for m in modules.values(): (to/"api"/f"{m.name}.md").write_text(api.page(m), encoding="utf-8")
    (to/"command_line.md").write_text(command_line(), encoding="utf-8")
    known = {k: cfg[k] for k in ("title", "author", "copyright", "version", "git_url", "branch")}
    (to/"site.json").write_text(json.dumps(known | {"sources": api.sources()}), encoding="utf-8")
    return {"notebooks": len(names), "API pages": len(modules) + 1}


class Addresses(HTMLParser):
    "What a page has: ids, links, and what it loads by itself."

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("canonical", "author"): self.loads.append(a["href"])


def check_links(site: Path) -> tuple[list[str], Counter, int]:
    "What leads nowhere or is loaded from elsewhere; external addresses and how often they occur; number of internal links."
    pages = {p.relative_to(site).as_posix(): Addresses(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    wrong, external, n = [], Counter(), 0
    for name, page in pages.items():
        if name.startswith("_static/"): continue
        for address, loaded in [(x, False) for x in page.links] + [(x, True) for x in page.loads]:
            if address.startswith(("data:", "mailto:", "javascript:")): continue
            if re.match(r"[a-z]+:|//", address):
                if loaded: wrong.append(f"{name}: loads {address}; the site is to work offline")
                external[address] += 1
                continue
            path, fragment = urldefrag(address)
            path, fragment = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path.partition("?")[0]))) if path else name, unquote(fragment)
            n += 1
            if not (site/path).is_file(): wrong.append(f"{name}: {address}: no such file")
            elif fragment and path in pages and fragment not in pages[path].ids: wrong.append(f"{name}: {address}: no such place on that page")
    return wrong, external, n


def build(out: Path, jobs: str = "auto") -> str:
    "The site in `out`, which is replaced only when all went well; returns what was made, in a line."
    with tempfile.TemporaryDirectory(prefix="nioodd-site-") as work:
        source, made = Path(work)/"source", Path(work)/"site"
        source.mkdir()
        counts = write_sources(source)
        done = subprocess.run([sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", jobs, "-d", f"{work}/doctrees", str(source), str(made)],
                              env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{done.stdout}{done.stderr}\nthe site was not built: Sphinx says why above".replace(str(source), "nbs"))
        wrong, external, n = check_links(made)
        if wrong: sys.exit("\n".join([*wrong, f"the site was not built: {len(wrong)} links are wrong"]))
        (made/"external-links.txt").write_text("".join(f"{c:4d}  {a}\n" for a, c in external.most_common()), encoding="utf-8")
        for leftover in (".buildinfo", ".buildinfo.bak"): (made/leftover).unlink(missing_ok=True)
        (made/".nojekyll").touch()  # GitHub Pages: folders that begin with _ are part of the site
        size = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
        if out.exists(): shutil.rmtree(out)
        shutil.copytree(made, out)
    kinds = ", ".join(f"{c} {k}" for k, c in counts.items())
    return f"{kinds}, {n} internal links checked, {len(external)} external ones listed in external-links.txt, {size / 1e6:.0f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=root/"_docs", help="folder, replaced (default: _docs)")
    parser.add_argument("--jobs", default="auto", help="processes (default: one per core)")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out/"searchindex.js").is_file():
        sys.exit(f"{args.out} is not empty and holds no site; expected a folder that may be replaced")
    started = time.perf_counter()
    print(build(args.out, args.jobs))
    print(f"{args.out}/index.html, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__": main()
