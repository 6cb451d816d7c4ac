"""README.md, and its picture nbs/index.png, from nbs/index.ipynb:  python .ci/readme.py  writes them,  --check  exits 1 when they are stale."""
import argparse
import base64
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from nbformat.v4 import new_code_cell, new_markdown_cell

root = Path(__file__).resolve().parents[1]
picture = root/"nbs"/"index.png"
shown = ["text/markdown", "text/plain"]  # Of an output's representations, the first there is


def has(cell, directive: str) -> bool: return bool(re.search(rf"^#\|\s*{directive}\s*$", cell.source, re.MULTILINE))

def relinked(text: str) -> str:
    "A link relative to nbs/ becomes one relative to the root."
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)", lambda m: f"]({posixpath.normpath('nbs/' + m[1])}", text)


class Readme(Preprocessor):
    "Leaves of a notebook what a reader of the README is to see."

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; the code fences need it
        nb.cells = [self.shown(cell) for cell in nb.cells if not has(cell, "hide")]
        return nb, resources

    def shown(self, cell):
        if cell.cell_type == "markdown": return new_markdown_cell(relinked(cell.source))
        if alt := re.search(r"^#\|\s*alt:\s*(.+)$", cell.source, re.MULTILINE): return new_markdown_cell(f"![{alt[1]}]({picture.relative_to(root).as_posix()})")
        for output in cell.outputs:
            kinds = {*output.get("data", {})} - {"text/html"}
            if output.get("name") != "stdout" and not (kinds and kinds <= {*shown}):
                sys.exit(f"nbs/index.ipynb: a README shows text and tables only, not\n{output}")
        if has(cell, "echo: false"): return new_markdown_cell("\n\n".join(relinked(o.data["text/markdown"]) for o in cell.outputs))
        return new_code_cell(re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE), outputs=cell.outputs)


def readme() -> tuple[str, bytes]: # Its text and its picture, which is the output of the cell with an `#| alt:`
    exporter = MarkdownExporter(preprocessors=[Readme])
    exporter.display_data_priority = shown
    nb = nbformat.read(root/"nbs"/"index.ipynb", as_version=4)
    text = exporter.from_notebook_node(nb)[0]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
    drawn = [o.data["image/png"] for cell in nb.cells if re.search(r"^#\|\s*alt:", cell.source, re.MULTILINE) for o in cell.outputs if "image/png" in o.get("data", {})]
    if len(drawn) != 1: sys.exit(f"nbs/index.ipynb: one picture was expected in the cell with `#| alt:`, not {len(drawn)}")
    return f"<!-- Generated from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n{text}\n", base64.b64decode(drawn[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md is stale")
    check = parser.parse_args().check
    file, (text, png) = root/"README.md", readme()
    if file.exists() and file.read_text(encoding="utf-8") == text and picture.exists() and picture.read_bytes() == png: return
    if check: sys.exit("README.md or nbs/index.png is stale: run `python .ci/readme.py`")
    file.write_text(text, encoding="utf-8")
    picture.write_bytes(png)
    print("README.md written")


if __name__ == "__main__": main()
