#!/usr/bin/env python
"""The site: all notebooks as browsable pages with search, and API pages from the modules.

    python .ci/site.py               makes it in _docs/
    python .ci/site.py --out FOLDER  elsewhere

Nothing is executed: a page shows the outputs that were committed. Sphinx's warnings are errors, and so is a link that
leads nowhere. Beside the pages lies llms.txt, the book's table of contents for a reader that is a program."""
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
from api import Links, Pages, api_link, read_package  # noqa: E402

# The parts of the book, in the order of reading: folder under nbs/ → caption
PARTS = {
    "tutorials": "Tutorials",
    "core": "Foundations",
    "inversion": "Network inversion",
    "trust": "Trust intervals",
    "posthoc": "Detectors for trained networks",
    "neighbours": "The neighbours of paper 1",
    "benchmark": "Benchmarks",
    "speed": "Speed",
    "explore": "Explorers",
    "app": "In use",
    "papers": "The papers, and what came out",
    "": "The project",  # directly under nbs/
}
# Where names alone do not give the order of reading; the others follow
ORDER = [
    "tutorials/three_ways", "tutorials/your_classifier", "tutorials/say_no",
    "papers/results", "papers/network_inversion", "papers/trust_intervals", "papers/scoreboard",
    "papers/notation", "papers/bibliography",
]
CODE = re.compile(r"(`+)(.+?)\1(?!`)")  # a code span
LINK = re.compile(r"\]\(([^)\s]+)\)")  # the end of a Markdown link
HEAD = "<!-- head -->"  # the cell below a title that .ci/heads.py writes
WIDGET = "application/vnd.jupyter.widget-view+json"


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters="=", interpolation=None)
    parser.read(root/"settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def place_in_part(name: str) -> tuple[int, str]:
    "To sort by."
    stem = name.removesuffix(".ipynb")
    return (ORDER.index(stem) if stem in ORDER else len(ORDER)), name


def parts(nbs: Path) -> list[tuple[str, list[str]]]:
    "Captions and notebooks (names under nbs/), in the order of reading."
    hidden = {p for p in nbs.rglob("*.ipynb") if any(x.startswith((".", "_")) for x in p.relative_to(nbs).parts)}
    names = [p.relative_to(nbs).as_posix() for p in {*nbs.rglob("*.ipynb")} - hidden]
    found = {folder: [] for folder in PARTS}
    for name in sorted(names, key=place_in_part):
        if name == "index.ipynb": continue
        folder = posixpath.dirname(name)
        if folder not in found: sys.exit(f"nbs/{name} is in no part of the book: {', '.join(filter(None, PARTS))}")
        found[folder].append(name)
    return [(PARTS[folder], chapters) for folder, chapters in found.items() if chapters]


# ---- Pages of notebooks

def directives(source: str) -> set[str]:
    return {m.strip() for m in re.findall(r"^#\|\s*(.*)$", source, re.MULTILINE)}


def without_directives(source: str) -> str:
    return re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")


def parsed(source: str) -> list:
    "Statements of a cell; none if there is a magic."
    try: return ast.parse(source).body
    except SyntaxError: return []


def only_imports(source: str) -> bool:
    body = parsed(source)
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def without_loose_ends(html: str) -> str:
    "An output that is part of a larger page: its links to other parts of that page become plain words."
    ids = Addresses(html).ids
    def shown(match): return match[0] if match[1] in ids else match[2]
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', shown, html)


def is_widget_only(output) -> bool:
    kinds = set(output.get("data", ()))
    return WIDGET in kinds and kinds <= {WIDGET, "text/plain"}


def slug(heading: str) -> str:
    "A heading's place on its page, from how GitHub (`two-commands`) or Jupyter (`Two-commands`) writes it."
    words = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*$]", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", words.strip().lower().replace(" ", "-"))


class Page:
    "A notebook as its page shows it; `pages` has all of the book by name, once they are made."

    def __init__(self, name: str, nb, links: Links, pages: dict[str, "Page"], repository: str):
        self.name, self.nb, self.links, self.pages, self.repository = name, nb, links, pages, repository
        self.up = "../" * name.count("/")
        prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
        self.slugs = {*map(slug, re.findall(r"^#+\s+(.+)$", prose, re.MULTILINE))}
        self.ids = {*re.findall(r'<\w+ (?:id|name)="([^"]+)"', prose)}
        self.broken: list[str] = []  # links that lead nowhere
        code = [c.source for c in nb.cells if c.cell_type == "code"]
        self.module = links.modules.get(self.exported_to(code))
        self.names = dict(self.module.names) if self.module else {}
        for source in code: self.names |= self.imported(source)

    def exported_to(self, code: list[str]) -> str | None:
        "Name of the notebook's module: core.scores; empty for the package itself."
        found = [m[1] for source in code if (m := re.search(r"^#\|\s*default_exp\s+([\w.]+)", source, re.MULTILINE))]
        return re.sub(r"\.?__init__$", "", found[0]) if found else None

    def imported(self, source: str) -> dict[str, str]:
        "What a cell imports from the package."
        found = {}
        for node in parsed(without_directives(source)):
            if not isinstance(node, ast.ImportFrom) or node.level: continue
            if node.module.partition(".")[0] != self.links.package: continue
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return found

    def first_lines(self) -> str: return self.nb.cells[0].source
    def title(self) -> str: return re.match(r"#\s+(.+)", self.first_lines())[1].strip()

    def subtitle(self) -> str:
        "The line in a quotation below the title, in plain words."
        found = re.search(r"^>\s*(.+)$", self.first_lines(), re.MULTILINE)
        return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", found[1]).strip() if found else ""

    def target(self, address: str) -> str:
        "A link's address on the site: a page stays, another file is shown where the repository is."
        if re.match(r"[a-z]+:", address): return address
        written, fragment = map(unquote, urldefrag(address))
        if not written: return self.place(fragment, "")
        path = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(self.name), written))
        if page := self.pages.get(path.removeprefix("nbs/")): return page.place(fragment, written)
        if not (root/path).exists():
            self.broken.append(f"nbs/{self.name}: a link to {address}, where there is nothing")
            return address
        shown = self.repository.replace("/blob/", "/tree/") if (root/path).is_dir() else self.repository
        return f"{shown}/{path}" + (f"#{fragment}" if fragment else "")

    def place(self, fragment: str, address: str) -> str:
        "The address of a heading or of an HTML id on this page; Sphinx knows only headings, so see conf.py's `page:`."
        if fragment in self.ids: return f"page:{address.replace('.ipynb', '.html')}#{fragment}"
        if slug(fragment) in self.slugs: fragment = slug(fragment)
        return f"{address}#{fragment}" if fragment else address

    def markdown(self, text: str) -> str:
        "Links as the site needs them, and names of the API in code font as links; fenced code stays."
        fenced = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.MULTILINE | re.DOTALL)
        return "".join(part if i % 2 else "\n".join(map(self.line, part.split("\n"))) for i, part in enumerate(fenced))

    def name_link(self, line: str, span) -> str:
        "A code span as a link to the API; as it is in headings and in what is a link already."
        linked = line[:span.start()].endswith("[") or line[span.end():].startswith("](")
        to = None if linked or line.startswith("#") else self.links.target(span[2], self.names)
        return api_link(self.links.url(to, self.up), f"<code>{escape(span[2])}</code>") if to else span[0]

    def line(self, line: str) -> str:
        "One line of Markdown; a link within code is no link."
        spans = [*CODE.finditer(line)]
        made, last = [], 0
        for m in sorted([*spans, *LINK.finditer(line)], key=lambda m: m.start()):
            link = m.re is LINK
            if m.start() < last: continue
            if link and any(s.start() < m.start() < s.end() for s in spans): continue
            made += [line[last:m.start()], f"]({self.target(m[1])})" if link else self.name_link(line, m)]
            last = m.end()
        return "".join([*made, line[last:]])

    def outputs(self, cell) -> list:
        kept = [o for o in cell.outputs if o.get("name") != "stderr" and not is_widget_only(o)]
        for o in kept:
            data = o.get("data", {})
            if WIDGET in data: del o.data[WIDGET]
            if "text/markdown" in data: o.data["text/markdown"] = self.markdown(o.data["text/markdown"])
            if "text/html" in data: o.data["text/html"] = without_loose_ends(o.data["text/html"])
        return kept

    def exported(self, cell) -> str:
        "Before an exported cell: its anchor, and links to the entries of what it defines."
        defined = self.links.of_cell.get((self.name, cell.id), [])
        links = [api_link(self.links.url(full, self.up), name) for name, full in defined]
        return f'<div class="exported" id="cell-{cell.id}">{" ".join(links)}</div>'

    def words(self, cell) -> None:
        "A Markdown cell as the site shows it, in place."
        cell.source = self.markdown(cell.source)
        if cell.source.startswith(HEAD):
            cell.source = f":::{{container}} head\n{cell.source.removeprefix(HEAD).strip()}\n:::"

    def finished(self):
        "The notebook for myst-nb."
        cells, heading, collapsed = [], self.title(), None
        for cell in self.nb.cells:
            if cell.cell_type != "code":
                if cell.cell_type == "markdown":
                    heading = next(reversed(re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE)), heading)
                    self.words(cell)
                cells.append(cell)
                collapsed = None
                continue
            said, source = directives(cell.source), without_directives(cell.source)
            hidden, imports = "hide" in said, only_imports(source)
            if not source: continue
            if hidden and (cell.outputs or not (collapsed and re.match(r"(import|from) ", source))): continue
            if collapsed and (hidden or imports) and not cell.outputs:
                collapsed.source += "\n\n" + source
                continue
            cell.source, cell.outputs, tags = source, self.outputs(cell), []
            if "export" in said: cells.append(new_markdown_cell(self.exported(cell)))
            if "echo: false" in said: tags.append("remove-input")
            collapsed = cell if imports and not cell.outputs and "export" in said else None
            if collapsed: tags.append("hide-cell")
            alt = f"{self.title()}: {re.sub(r'[`$*]', '', heading)}"
            cell.metadata = {"tags": tags, "mystnb": {"image": {"alt": alt}}}
            cells.append(cell)
        kernel = self.nb.metadata.get("kernelspec", {})
        language = {"name": "python", "pygments_lexer": "ipython3"}
        self.nb.cells, self.nb.metadata = cells, {"kernelspec": kernel, "language_info": language}
        return self.nb


# ---- Pages that no notebook stands for

REFERENCE = {"api/index": "API", "command_line": "Command line"}  # Page → title


def toctree(caption: str, names: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def toctrees(book: list[tuple[str, list[str]]]) -> str:
    trees = [toctree(caption, [n.removesuffix(".ipynb") for n in names]) for caption, names in book]
    return "\n\n".join([*trees, toctree("Reference", [*REFERENCE])])


def commands(parser):
    "A parser of arguments and, below it, those of its commands."
    yield parser
    for action in parser._actions:
        if not isinstance(getattr(action, "choices", None), dict): continue
        for sub in action.choices.values(): yield from commands(sub)


def command_line(chapter: str) -> str:
    "What `nioodd COMMAND --help` says, of every command, on one page."
    os.environ["COLUMNS"] = "92"
    sys.path.insert(0, str(root))
    from nioodd.app.cli import parser
    lead = ("What <code>nioodd --help</code> and <code>nioodd COMMAND --help</code> say. How the commands are made, "
            f'and a walk through them: <a href="{chapter}">the chapter on them</a>.')
    shown = [f"## {p.prog}\n\n```text\n{p.format_help().strip()}\n```" for p in commands(parser())]
    return "\n\n".join(["# Command line", f'<p class="lead">{lead}</p>', *shown]) + "\n"


def llms_txt(pages: dict[str, Page], book: list[tuple[str, list[str]]]) -> str:
    "The table of contents as https://llmstxt.org wants it: title, one line, and links with a line each."
    def entry(name):
        page = pages[name]
        link = f"- [{page.title()}]({name.removesuffix('.ipynb')}.html)"
        return f"{link}: {page.subtitle()}" if page.subtitle() else link
    start = pages["index.ipynb"]
    made = [f"# {start.title()}", f"> {start.subtitle()}", f"## Start\n\n{entry('index.ipynb')}"]
    for caption, names in book: made.append("\n".join([f"## {caption}", "", *map(entry, names)]))
    made.append("\n".join(["## Reference", "", *(f"- [{title}]({page}.html)" for page, title in REFERENCE.items())]))
    return "\n\n".join(made) + "\n"


# ---- The site

def copy_mathjax(to: Path) -> None:
    "What a page of formulas loads; the extension itself would copy four times as much."
    mathjax = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0])/"static"/"mathjax"
    to.mkdir(parents=True)
    shutil.copy(mathjax/"tex-chtml.js", to)
    for folder in ("input/tex", "output/chtml"): shutil.copytree(mathjax/folder, to/folder)


def write_sources(to: Path) -> dict[str, int]:
    "Everything Sphinx reads, into a folder; returns how many pages of which kind."
    cfg, nbs = settings(), root/"nbs"
    book, modules = parts(nbs), read_package(root/cfg["lib_path"])
    names = ["index.ipynb", *(n for _, part in book for n in part)]
    links, repository = Links(modules, cfg["lib_path"]), f"{cfg['git_url']}/blob/{cfg['branch']}"
    pages: dict[str, Page] = {}
    for n in names: pages[n] = Page(n, nbformat.read(nbs/n, as_version=4), links, pages, repository)
    titles = {n: p.title() for n, p in pages.items()}
    (to/"llms.txt").write_text(llms_txt(pages, book), encoding="utf-8")
    shutil.copy(here/"site"/"conf.py", to)
    copy_mathjax(to/"_static"/"mathjax")
    for file in ("style.css", "search.js", "favicon.svg"): shutil.copy(here/"site"/file, to/"_static")
    for name, page in pages.items():
        nb = page.finished()
        if name == "index.ipynb": nb.cells.append(new_markdown_cell(toctrees(book)))
        (to/name).parent.mkdir(exist_ok=True)
        nbformat.write(nb, to/name)
    if broken := [line for p in pages.values() for line in p.broken]:
        sys.exit("\n".join([*broken, f"the site was not built: {len(broken)} links are wrong"]))
    (to/"api").mkdir()
    api = Pages(modules, cfg["lib_path"], titles)
    (to/"api"/"index.md").write_text(api.index(book), encoding="utf-8")
    for m in modules.values(): (to/"api"/f"{m.page}.md").write_text(api.page(m), encoding="utf-8")
    chapter = modules["app.cli"].notebook.removesuffix(".ipynb") + ".html"
    (to/"command_line.md").write_text(command_line(chapter), encoding="utf-8")
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


class TextLinks:
    "A text file's Markdown links, as `Addresses` has those of a page."

    def __init__(self, text: str): self.ids, self.links, self.loads = set(), LINK.findall(text), []


def site_pages(site: Path) -> dict[str, Addresses | TextLinks]:
    "By their names, all files of a site that have links."
    files = [p for p in [*site.rglob("*.html"), site/"llms.txt"] if p.is_file()]
    texts = {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in files}
    return {name: (Addresses if name.endswith(".html") else TextLinks)(text) for name, text in texts.items()}


def check_links(site: Path) -> tuple[list[str], Counter, int]:
    "What leads nowhere or is loaded from elsewhere; external addresses, how often each; number of internal links."
    pages = site_pages(site)
    wrong, external, n = [], Counter(), 0
    for name, page in pages.items():
        if name.startswith("_static/"): continue
        for address, loaded in [(x, False) for x in page.links] + [(x, True) for x in page.loads]:
            if address.startswith(("data:", "mailto:", "javascript:")): continue
            if re.match(r"[a-z]+:|//", address):
                if loaded: wrong.append(f"{name}: loads {address}; the site is to work offline")
                external[address] += 1
                continue
            path, fragment = map(unquote, urldefrag(address))
            path = path.partition("?")[0]
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            n += 1
            if not (site/path).is_file(): wrong.append(f"{name}: {address}: no such file")
            elif fragment and path in pages and fragment not in pages[path].ids:
                wrong.append(f"{name}: {address}: no such place on that page")
    return wrong, external, n


def build(out: Path, jobs: str = "auto") -> str:
    "The site in `out`, which is replaced only when all went well; returns what was made, in a line."
    with tempfile.TemporaryDirectory(prefix="nioodd-site-") as work:
        source, made = Path(work)/"source", Path(work)/"site"
        source.mkdir()
        counts = write_sources(source)
        sphinx = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", jobs]
        done = subprocess.run([*sphinx, "-d", f"{work}/doctrees", str(source), str(made)],
                              env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
        if done.returncode:
            said = f"{done.stdout}{done.stderr}".replace(str(source), "nbs")
            sys.exit(f"{said}\nthe site was not built: Sphinx says why above")
        wrong, external, n = check_links(made)
        if wrong: sys.exit("\n".join([*wrong, f"the site was not built: {len(wrong)} links are wrong"]))
        listed = "".join(f"{c:4d}  {a}\n" for a, c in external.most_common())
        (made/"external-links.txt").write_text(listed, encoding="utf-8")
        for leftover in (".buildinfo", ".buildinfo.bak"): (made/leftover).unlink(missing_ok=True)
        (made/".nojekyll").touch()  # GitHub Pages: folders that begin with _ are part of the site
        size = sum(p.stat().st_size for p in made.rglob("*") if p.is_file()) / 1e6
        if out.exists(): shutil.rmtree(out)
        shutil.copytree(made, out)
    kinds = ", ".join(f"{c} {k}" for k, c in counts.items())
    outside = f"{len(external)} external ones listed in external-links.txt"
    return f"{kinds}, {n} internal links checked, {outside}, {size:.0f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root/"_docs", help="folder, replaced (default: _docs)")
    parser.add_argument("--jobs", default="auto", help="processes (default: one per core)")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out/"searchindex.js").is_file():
        sys.exit(f"{args.out} is not empty and holds no site; expected a folder that may be replaced")
    started = time.perf_counter()
    print(build(args.out, args.jobs))
    print(f"{args.out}/index.html, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__": main()
