#!/usr/bin/env python
"""What notebooks show is what they give.

    python .ci/outputs.py NOTEBOOK...            executes them in place, and leaves them as they are committed
    python .ci/outputs.py --check [NOTEBOOK...]  executes them (all) in memory, and says where what is committed differs
    python .ci/outputs.py --check --at-most 10   of all only those that took 10 seconds at most, by .ci/seconds.json

As committed: cleaned by nbdev_clean, no progress bars, and no widgets, which need a kernel: what stands beside them
(a picture) stays.

Compared, cell by cell: text (printed, values, tables) word for word; numbers by size, to `--tolerance` of their value,
to two points where a % follows, or to the last digit shown (another processor rounds otherwise, and a network that was
trained on it differs a little); below 1e-5 all numbers are one, for they are rounding errors. Pictures: as many as
there were.

Not compared: how long something took (a number with a unit of time, or after "seconds"), any number of a line that
names a rate (images/s), in the notebooks of `SPEEDS` all numbers, temporary paths, progress bars."""
import argparse
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from html import unescape
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parents[1]
MAX_BYTES = 1_500_000
# Notebooks are named by their path under nbs/
SPEEDS = {"speed/00_loop", "speed/01_siblings", "speed/02_detectors"}  # they show how fast a machine is
NEEDS = {"tutorials/say_no": ("fashion_mnist",)}  # image sets without which a notebook shows something else
WIDGET = "application/vnd.jupyter.widget-view+json"
MAGIC = {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8"}
BAR = re.compile(r"\d+%\|.*\||\d+(?:\.\d+)?[a-zA-Z]* ?\[\d+:\d\d[<,]")  # tqdm's, with and without a total
BAR_WIDGET = re.compile(r"HBox\(|FloatProgress\(|IntProgress\(")
TOKEN = re.compile(r"""
    (?P<number>(?<![\w.])[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]*\w))
        (?P<after>\s?(?:[µun]?s|ms|min|h|seconds?|minutes?|hours?)\b|%|)
    |(?P<time>(?<![\w.])\d[\d,.]*(?:[µun]?s|ms|min|h)\b)
    |(?P<word>[^\W\d]\w*|\d\w*|\S)""", re.VERBOSE)
RATE = re.compile(r"\w/s\b|\bper second\b")
TEMPORARY = re.compile(r"(?:/private)?/(?:tmp|var/folders)/[^\s'\",)]+|\w*tmp\w{8}\b")


# ---- As committed

def is_bar(text: str) -> bool:
    "Nothing but progress bars."
    lines = [x for x in re.split(r"[\r\n]", text) if x.strip(" \x1b[A")]
    return bool(lines) and all(map(BAR.search, lines))


def is_kept(output, widget) -> bool:
    "Is an output, whose widget was taken away, still worth showing?"
    data = output.get("data", {})
    if output.output_type == "stream" and is_bar(output.text): return False
    if not widget: return True
    if set(data) - {"text/plain"}: return True
    return bool(data) and not (is_bar(data["text/plain"]) or BAR_WIDGET.match(data["text/plain"]))


def joined_streams(outputs: list) -> list:
    "Text that was printed in pieces as one output: how it was cut depends on the moment."
    joined = []
    for o in outputs:
        last = joined[-1] if joined else None
        if last and o.output_type == last.output_type == "stream" and o.name == last.name: last.text += o.text
        else: joined.append(o)
    return joined


def committed_form(nb):
    "Without widgets and progress bars, in place; returns the notebook."
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        widgets = [o.get("data", {}).pop(WIDGET, None) for o in cell.outputs]
        cell.outputs = joined_streams([o for o, widget in zip(cell.outputs, widgets) if is_kept(o, widget)])
    return nb


def execute(path: Path, timeout: float = 1800):
    "The notebook at `path`, executed in its folder against this checkout, in the form in which it is committed."
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}
    env.pop("MPLBACKEND", None)  # else no picture is shown
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=place).execute(env=env)
    return committed_form(nb)


def write(nb, path: Path) -> None:
    "In place of the file at `path`, whole or not at all, then cleaned by nbdev."
    kwargs = dict(dir=path.parent, suffix=".part", delete=False, encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", **kwargs) as f: nbformat.write(nb, f)
    os.chmod(f.name, path.stat().st_mode)
    os.replace(f.name, path)
    clean = "import sys; from nbdev.clean import nbdev_clean; nbdev_clean(fname=sys.argv[1])"
    subprocess.run([sys.executable, "-c", clean, str(path)], cwd=root, check=True)


# ---- Comparison

def shown(output) -> tuple[str, str]:
    "(kind, text) of an output: picture, text, stderr or error."
    if output.output_type == "stream": return ("stderr" if output.name == "stderr" else "text"), output.text
    if output.output_type == "error": return "error", f"{output.ename}: {output.evalue}"
    data = output.data
    if picture := next((k for k in data if k.startswith("image/")), None): return "picture", picture
    plain = data.get("text/plain", "")
    if "text/markdown" in data: return "text", data["text/markdown"]
    if "text/html" in data and re.fullmatch(r"<[^<>]*>|", plain.strip()):
        return "text", unescape(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", data["text/html"], flags=re.DOTALL))
    return "text", plain


def gathered(outputs) -> tuple[str, int, list[str]]:
    "A cell's text, number of pictures, and what else it said."
    kinds = [shown(o) for o in outputs]
    other = [f"{k}: {t.strip()}" for k, t in kinds if k == "error" or k == "stderr" and not is_bar(t)]
    return "\n".join(t for k, t in kinds if k == "text"), sum(k == "picture" for k, _ in kinds), other


def number(text: str, is_share: bool) -> tuple[float, float, bool]:
    "(value, unit in the last place, is it a share in %)"
    digits = text.replace(",", "").replace("−", "-").rstrip(".")
    mantissa, _, power = digits.lower().partition("e")
    places = len(mantissa.partition(".")[2])
    return float(digits), 10.0 ** min(int(power or 0) - places, 300), is_share


def tokens(line: str, speeds: bool = False) -> list:
    "Words as they are; numbers as of `number`; None for what is not compared."
    line = TEMPORARY.sub(" … ", re.sub(r" at 0x[0-9a-f]+", "", line))
    any_number, found = speeds or bool(RATE.search(line)), []
    for m in TOKEN.finditer(line):
        if m["number"]:
            is_time = m["after"].strip() not in ("", "%") or re.search(r"seconds\W*$", line[:m.start()])
            found.append(None if any_number or is_time else number(m["number"], m["after"] == "%"))
        elif m["time"] or speeds and m["word"] in ("met", "MISSED"): found.append(None)
        elif not (speeds and re.fullmatch(r"[-+−×]", m["word"])): found.append(m["word"])
    return found


def same(a, b, tolerance: float) -> bool:
    if not (isinstance(a, tuple) and isinstance(b, tuple)): return a == b
    (x, ulp_x, share), (y, ulp_y, _) = a, b
    larger = max(abs(x), abs(y))
    if larger < 1e-5: return True
    slack = max(0, tolerance * larger, *(1.0001 * u for u in (ulp_x, ulp_y) if u < 1))
    return abs(x - y) <= (max(slack, 2) if share else slack)


def same_line(a: str, b: str, tolerance: float, speeds: bool) -> bool:
    x, y = tokens(a, speeds), tokens(b, speeds)
    return len(x) == len(y) and all(same(i, j, tolerance) for i, j in zip(x, y))


def compared_lines(text: str) -> list[str]:
    return [x.strip() for x in text.splitlines() if x.strip() and not BAR.search(x)]


def paired(was: list[str], now: list[str]) -> list[tuple[str, str]]:
    "Lines that belong together; where one side has more, nothing stands on the other."
    if len(was) == len(now): return [*zip(was, now)]
    pairs, shape = [], [[re.sub(r"\d+", "0", x) for x in side] for side in (was, now)]
    for _, a, b, c, d in SequenceMatcher(None, *shape, autojunk=False).get_opcodes():
        left, right = was[a:b], now[c:d]
        more = len(right) - len(left)
        pairs += zip(left + [""] * more, right + [""] * -more)
    return pairs


def difference(was, now) -> str: return f"committed: {was or '(nothing)'}\n      now: {now or '(nothing)'}"


def text_differences(was: str, now: str, tolerance: float, speeds: bool = False) -> list[str]:
    "One line per line of text that differs."
    pairs = paired(compared_lines(was), compared_lines(now))
    return [difference(a, b) for a, b in pairs if not same_line(a, b, tolerance, speeds)]


def differences(committed, executed, tolerance: float = 0.05, speeds: bool = False) -> list[str]:
    "Where the outputs of two notebooks with the same cells differ; each with its cell's number and first line."
    found = []
    for i, (a, b) in enumerate(zip(committed.cells, executed.cells)):
        if a.cell_type != "code": continue
        (was, pictures, said), (now, drawn, says) = gathered(a.outputs), gathered(b.outputs)
        here = text_differences(was, now, tolerance, speeds)
        if pictures != drawn: here.append(difference(f"{pictures} pictures", f"{drawn} pictures"))
        here += [difference("", x) for x in says if x not in said]
        first = next((x for x in a.source.splitlines() if x.strip() and not x.startswith("#")), "")
        found += [f"cell {i}, {first[:80]}\n{x}" for x in here]
    return found


def output_faults(o) -> list[str]:
    data, found = o.get("data", {}), []
    if o.output_type == "error": found.append(f"an error, {o.ename}")
    if WIDGET in data: found.append("a widget, which shows nothing without a kernel")
    text = "".join(map(str, [o.get("text", ""), data.get("text/plain", "")]))
    if is_bar(text): found.append("a progress bar")
    if place := re.search(r"/(?:tmp|var/folders)/[^\s'\",)]*", text): found.append(f"a temporary folder, {place[0]}")
    wrong = [kind for kind in MAGIC.keys() & data.keys() if not base64.b64decode(data[kind]).startswith(MAGIC[kind])]
    return found + [f"a picture that is not {kind}" for kind in sorted(wrong)]


def faults(nb, size: int) -> list[str]:
    "What must not be committed, whatever the notebook gives."
    found = [f"{size:,} bytes; at most {MAX_BYTES:,} are wanted"] if size > MAX_BYTES else []
    if "widgets" in nb.metadata: found.append("the state of widgets in its metadata")
    for i, cell in enumerate(nb.cells):
        for o in cell.get("outputs", []): found += [f"cell {i}: {x}" for x in output_faults(o)]
    return found


# ---- Notebooks

def notebook_name(path: Path) -> str:
    "Its path under nbs/, without the suffix."
    nbs = root/"nbs"
    return path.with_suffix("").relative_to(nbs).as_posix() if nbs in path.parents else path.stem


def missing_data(name: str) -> str:
    "Why a notebook cannot be judged here, or nothing."
    if name not in NEEDS: return ""
    sys.path.insert(0, str(root))
    from nioodd.core.datasets import available
    there = {f.name for f in available() if f.found}
    lacking = [n for n in NEEDS[name] if n not in there]
    return f"needs {', '.join(lacking)}, not found here" if lacking else ""


def check(path: Path, name: str, tolerance: float) -> list[str]:
    from nbclient.exceptions import CellExecutionError
    committed = nbformat.read(path, as_version=4)
    found = faults(committed, path.stat().st_size)
    try: return found + differences(committed, execute(path), tolerance, name in SPEEDS)
    except CellExecutionError as e: return found + [f"does not run: {str(e).strip().splitlines()[-1]}"]


def execute_in_place(path: Path) -> list[str]:
    write(execute(path), path)
    return faults(nbformat.read(path, as_version=4), path.stat().st_size)


def all_notebooks() -> list[Path]:
    nbs = root/"nbs"
    hidden = [p for p in nbs.rglob("*.ipynb") if any(x.startswith((".", "_")) for x in p.relative_to(root).parts)]
    return [p for p in sorted(nbs.rglob("*.ipynb")) if p not in hidden]


def quick(paths: list[Path], seconds: float) -> list[Path]:
    "Those that `.ci/heads.py --time` found to take `seconds` at most; one that it has not timed is none."
    known = json.loads((root / ".ci" / "seconds.json").read_text(encoding="utf-8"))
    return [p for p in paths if known.get(f"{notebook_name(p)}.ipynb", seconds + 1) <= seconds]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when an output differs")
    parser.add_argument("--tolerance", type=float, default=0.05, metavar="SHARE",
                        help="by which numbers may differ (default %(default)s)")
    parser.add_argument("--at-most", type=float, metavar="SECONDS",
                        help="of all notebooks only those that .ci/seconds.json says are as quick")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default %(default)s)")
    args = parser.parse_args()
    if not (args.notebooks or args.check): parser.error("name the notebooks to execute in place (or --check)")
    paths = [p.absolute() for p in args.notebooks or all_notebooks()]
    if args.at_most is not None: paths = quick(paths, args.at_most)
    if gone := [p for p in paths if not p.is_file()]: sys.exit(f"{gone[0]} is not there")

    def one(path: Path) -> bool:  # Is it at fault?
        name, started = notebook_name(path), time.perf_counter()
        if why := missing_data(name):
            print(f"skipped {name}: {why}", flush=True)
            return False
        found = check(path, name, args.tolerance) if args.check else execute_in_place(path)
        verdict = ("DIFFERS" if args.check else "FAULTY") if found else "ok"
        took = f"{time.perf_counter() - started:.0f} s"
        print("\n  ".join([f"{verdict} {name}, {took}", *found]), flush=True)
        return bool(found)

    with ThreadPoolExecutor(args.jobs) as pool:  # each notebook is executed in a process of its own
        bad = sum(pool.map(one, paths))
    sys.exit(f"{bad} notebooks are not as they should be" if bad else 0)


if __name__ == "__main__": main()
