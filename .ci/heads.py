#!/usr/bin/env python
"""The head of each chapter: what it needs, what it gives, how long it takes.

    python .ci/heads.py                     writes the heads that are missing or stale
    python .ci/heads.py --check             writes nothing; exits 1 when a head is missing or stale
    python .ci/heads.py --time [NOTEBOOK…]  executes chapters (all) and writes their seconds to .ci/seconds.json

A chapter is a notebook in a folder under nbs/ whose name begins with two digits. Its head is one Markdown cell directly
below the title, known by its first line, `<!-- head -->`. What the chapter needs are the modules that its exported
cells import; what it gives is `__all__` of its module, so export first. How long it takes to read: 200 words of prose
a minute, 20 lines of code a minute."""
import argparse
import ast
import hashlib
import json
import math
import posixpath
import re
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

here = Path(__file__).resolve().parents[1]
HEAD = "<!-- head -->"
MOST = 8  # names that are listed
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 20


def settings(root: Path) -> dict[str, str]:
    parser = ConfigParser(delimiters="=", interpolation=None)
    parser.read(root/"settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def chapters(root: Path) -> list[Path]:
    return sorted((root/"nbs").glob("[!._]*/[0-9][0-9]_*.ipynb"))


def seconds_file(root: Path) -> Path: return root/".ci"/"seconds.json"


def known_seconds(root: Path) -> dict[str, float]:
    "Notebook (its path under nbs/) → seconds to execute it."
    file = seconds_file(root)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---- What a notebook says

def code_cells(nb) -> list[str]: return [c.source for c in nb.cells if c.cell_type == "code"]
def is_head(cell) -> bool: return cell.cell_type == "markdown" and cell.source.startswith(HEAD)
def is_exported(source: str) -> bool: return bool(re.search(r"^#\|\s*exporti?s?\s*$", source, re.MULTILINE))


def module_of(nb) -> str | None:
    "The module a notebook exports to: core.scores; `__init__` is the package itself."
    found = (re.search(r"^#\|\s*default_exp\s+([\w.]+)", source, re.MULTILINE) for source in code_cells(nb))
    return next((m[1] for m in found if m), None)


def imports(source: str, package: str) -> list[str]:
    "Modules of the package that a cell imports, as core.scores, in its order."
    found, start = [], f"{package}."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level: full = [node.module, *joined(node)]
        elif isinstance(node, ast.Import): full = [a.name for a in node.names]
        else: continue
        found += [name.removeprefix(start) for name in full if name.startswith(start)]
    return found


def joined(node: ast.ImportFrom) -> list[str]:
    "`from a.b import c` may mean the module a.b.c."
    return [f"{node.module}.{a.name}" for a in node.names]


def needed(nb, package: str, notebooks: dict[str, str]) -> list[str]:
    "Modules that the exported cells import and that have a chapter, each once."
    own, found = module_of(nb), []
    for source in filter(is_exported, code_cells(nb)): found += imports(source, package)
    return [name for name in dict.fromkeys(found) if name in notebooks and name != own]


def given(root: Path, package: str, module: str | None) -> list[str]:
    "Names in `__all__` of a module."
    file = root/package/f"{(module or '').replace('.', '/')}.py"
    if module is None or not file.is_file(): return []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_all: return ast.literal_eval(node.value)
    return []


def minutes_to_read(nb) -> int:
    "Of its prose and its code, without the head."
    prose = [c.source for c in nb.cells if c.cell_type == "markdown" and not is_head(c)]
    words = sum(len(text.split()) for text in prose)
    lines = [x for source in code_cells(nb) for x in source.splitlines() if x.strip() and not x.startswith("#|")]
    return max(1, math.ceil(words / WORDS_A_MINUTE + len(lines) / LINES_A_MINUTE))


# ---- The head

def counted(n: int, unit: str) -> str: return f"{n} {unit}" + ("" if n == 1 else "s")


def run_time(seconds: float) -> str:
    "In words, no finer than matters."
    if seconds >= 90: return counted(round(seconds / 60), "minute")
    if seconds > 10: seconds = 5 * round(seconds / 5)
    return counted(max(1, round(seconds)), "second")


def listed(names: list[str]) -> str:
    "At most `MOST` of them."
    return ", ".join(names[:MOST]) + (" …" if len(names) > MOST else ".")


def colab(cfg: dict[str, str], name: str) -> str:
    address = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs/{name}"
    return f"[Open in Colab]({address})"


def head(root: Path, cfg: dict[str, str], name: str, nb, notebooks: dict[str, str], seconds: dict[str, float]) -> str:
    "The source of the head of the chapter `name` (its path under nbs/)."
    def link(module): return f"[`{module}`]({posixpath.relpath(notebooks[module], posixpath.dirname(name))})"
    needs = needed(nb, cfg["lib_path"], notebooks)
    gives = sorted(given(root, cfg["lib_path"], module_of(nb)), key=str.isupper)  # constants last
    needs = f"**Needs** {', '.join(map(link, needs))}." if needs else "**Needs** no other chapter."
    gives = f" **Gives** {listed([f'`{x}`' for x in gives])}" if gives else ""
    takes = [f"{counted(minutes_to_read(nb), 'minute')} to read"]
    if name in seconds: takes.append(f"{run_time(seconds[name])} to run")
    line_break = "\\\n"
    return f"{HEAD}\n{needs}{gives}{line_break}{', '.join(takes)}. {colab(cfg, name)}"


def head_id(name: str) -> str:
    "The id of a head's cell: of its notebook's path, so that it stays."
    return hashlib.sha256(f"head of {name}".encode()).hexdigest()[:8]


def with_head(nb, name: str, source: str):
    "The notebook with this head below its title, in place."
    cells = [c for c in nb.cells if not is_head(c)]
    nb.cells = [*cells[:1], new_markdown_cell(source, id=head_id(name)), *cells[1:]]
    return nb


def stale(root: Path) -> dict[Path, str]:
    "Chapters whose head is not as it should be → the text of the file as it should be."
    cfg, seconds, found = settings(root), known_seconds(root), {}
    names = {path: path.relative_to(root/"nbs").as_posix() for path in chapters(root)}
    read = {path: nbformat.read(path, as_version=4) for path in names}
    notebooks = {module_of(nb): names[path] for path, nb in read.items() if module_of(nb)}
    for path, nb in read.items():
        before = nbformat.writes(nb)
        after = nbformat.writes(with_head(nb, names[path], head(root, cfg, names[path], nb, notebooks, seconds)))
        if after != before: found[path] = after + "\n"
    return found


def measure(root: Path, paths: list[Path]) -> int:
    "Executes chapters, notes their seconds, and returns how many did not run."
    from outputs import execute  # beside this file
    bad = 0
    for path in [p.resolve() for p in paths] or chapters(root):
        name, started = path.relative_to(root/"nbs").as_posix(), time.perf_counter()
        try: execute(path)
        except Exception as e:  # whatever a notebook raises: the others go on
            bad += 1
            print(f"FAILED {name}: {str(e).strip().splitlines()[-1]}", flush=True)
            continue
        known = known_seconds(root) | {name: round(time.perf_counter() - started)}
        seconds_file(root).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{known[name]:5d} s  {name}", flush=True)
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="with --time: these only")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a head is stale")
    parser.add_argument("--time", action="store_true", help="execute chapters and note their seconds")
    parser.add_argument("--root", type=Path, default=here, help="another checkout")
    args = parser.parse_args()
    root = args.root.resolve()
    if args.time:
        bad = measure(root, args.notebooks)
        sys.exit(f"{bad} notebooks did not run" if bad else 0)
    if args.notebooks: parser.error("notebooks are named with --time only")
    found = stale(root)
    names = [path.relative_to(root).as_posix() for path in found]
    if args.check: sys.exit("\n".join([*names, "their heads are stale: run `python .ci/heads.py`"]) if found else 0)
    for path, text in found.items(): path.write_text(text, encoding="utf-8")
    print("\n".join([*names, f"{len(names)} heads written"]))


if __name__ == "__main__": main()
