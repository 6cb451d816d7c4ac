"""README.md and its picture nbs/index.png from nbs/index.ipynb; .github/CONTRIBUTING.md from nbs/contributing.ipynb;
.github/SECURITY.md from nbs/trusted.ipynb.

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


def relinked(text: str, folder: str) -> str:
    "A link relative to nbs/ becomes one relative to a folder of the root."
    def address(match): return f"]({posixpath.relpath(posixpath.normpath('nbs/' + match[1]), folder or '.')}"
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)", address, text)


def check_output(output) -> None:
    "A README shows text and tables only."
    kinds = {*output.get("data", {})} - {"text/html"}
    if output.get("name") == "stdout" or kinds and kinds <= {*shown}: return
    sys.exit(f"nbs/index.ipynb: a README shows text and tables only, not\n{output}")


class Shown(Preprocessor):
    "Leaves of a notebook what a reader of its page is to see."
    folder = ""  # Of the page, under the root

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; the code fences need it
        nb.cells = [self.shown(cell) for cell in nb.cells if not has(cell, "hide")]
        return nb, resources

    def shown(self, cell):
        if cell.cell_type == "markdown": return new_markdown_cell(relinked(cell.source, self.folder))
        if alt := alt_text(cell): return new_markdown_cell(f"![{alt}]({picture.relative_to(root).as_posix()})")
        for output in cell.outputs: check_output(output)
        if has(cell, "echo: false"):
            return new_markdown_cell("\n\n".join(relinked(o.data["text/markdown"], self.folder) for o in cell.outputs))
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
        return new_code_cell(source, outputs=cell.outputs)


def drawn(nb) -> bytes:
    "The picture: the output of the cell with an `#| alt:`."
    outputs = [o for cell in nb.cells if alt_text(cell) for o in cell.outputs]
    found = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    if len(found) != 1: sys.exit(f"nbs/index.ipynb: the cell with `#| alt:` shows {len(found)} pictures, not one")
    return base64.b64decode(found[0])


def page(name: str, folder: str = "") -> str:
    "The text of nbs/NAME.ipynb as Markdown for a folder of the root."
    shown_there = Shown()
    shown_there.folder = folder
    exporter = MarkdownExporter(preprocessors=[shown_there])
    exporter.display_data_priority = shown
    text = exporter.from_notebook_node(nbformat.read(root/"nbs"/f"{name}.ipynb", as_version=4))[0]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
    return f"<!-- Generated from nbs/{name}.ipynb by .ci/readme.py: edit the notebook. -->\n\n{text}\n"


def pages() -> dict[Path, bytes]:
    "Each file with what it has to hold."
    return {root/"README.md": page("index").encode(),
            picture: drawn(nbformat.read(root/"nbs"/"index.ipynb", as_version=4)),
            root/".github"/"CONTRIBUTING.md": page("contributing", ".github").encode(),
            root/".github"/"SECURITY.md": page("trusted", ".github").encode()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args().check
    stale = {file: content for file, content in pages().items() if not file.exists() or file.read_bytes() != content}
    if stale and check:
        names = ", ".join(file.relative_to(root).as_posix() for file in stale)
        sys.exit(f"stale: {names}; run `python .ci/readme.py`")
    for file, content in stale.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        print(f"{file.relative_to(root).as_posix()} written")


if __name__ == "__main__": main()
