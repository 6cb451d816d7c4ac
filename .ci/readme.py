"""README.md, and its picture nbs/index.png, from nbs/index.ipynb.

    python .ci/readme.py          writes them
    python .ci/readme.py --check  writes nothing; exits 1 when they are stale"""
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


def alt_text(cell) -> str | None:
    "What stands for the picture that a cell shows."
    found = re.search(r"^#\|\s*alt:\s*(.+)$", cell.source, re.MULTILINE)
    return found[1] if found else None


def relinked(text: str) -> str:
    "A link relative to nbs/ becomes one relative to the root."
    def address(match): return f"]({posixpath.normpath('nbs/' + match[1])}"
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)", address, text)


def check_output(output) -> None:
    "A README shows text and tables only."
    kinds = {*output.get("data", {})} - {"text/html"}
    if output.get("name") == "stdout" or kinds and kinds <= {*shown}: return
    sys.exit(f"nbs/index.ipynb: a README shows text and tables only, not\n{output}")


class Readme(Preprocessor):
    "Leaves of a notebook what a reader of the README is to see."

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; the code fences need it
        nb.cells = [self.shown(cell) for cell in nb.cells if not has(cell, "hide")]
        return nb, resources

    def shown(self, cell):
        if cell.cell_type == "markdown": return new_markdown_cell(relinked(cell.source))
        if alt := alt_text(cell): return new_markdown_cell(f"![{alt}]({picture.relative_to(root).as_posix()})")
        for output in cell.outputs: check_output(output)
        if has(cell, "echo: false"):
            return new_markdown_cell("\n\n".join(relinked(o.data["text/markdown"]) for o in cell.outputs))
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
        return new_code_cell(source, outputs=cell.outputs)


def drawn(nb) -> bytes:
    "The picture: the output of the cell with an `#| alt:`."
    outputs = [o for cell in nb.cells if alt_text(cell) for o in cell.outputs]
    found = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    if len(found) != 1: sys.exit(f"nbs/index.ipynb: the cell with `#| alt:` shows {len(found)} pictures, not one")
    return base64.b64decode(found[0])


def readme() -> tuple[str, bytes]:
    "Its text and its picture."
    exporter = MarkdownExporter(preprocessors=[Readme])
    exporter.display_data_priority = shown
    nb = nbformat.read(root/"nbs"/"index.ipynb", as_version=4)
    png, text = drawn(nb), exporter.from_notebook_node(nb)[0]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
    note = "<!-- Generated from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->"
    return f"{note}\n\n{text}\n", png


def is_stale(file: Path, text: str, png: bytes) -> bool:
    if not (file.exists() and picture.exists()): return True
    return file.read_text(encoding="utf-8") != text or picture.read_bytes() != png


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md is stale")
    check = parser.parse_args().check
    file, (text, png) = root/"README.md", readme()
    if not is_stale(file, text, png): return
    if check: sys.exit("README.md or nbs/index.png is stale: run `python .ci/readme.py`")
    file.write_text(text, encoding="utf-8")
    picture.write_bytes(png)
    print("README.md written")


if __name__ == "__main__": main()
