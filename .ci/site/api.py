"""API pages from the exported modules' source.

It is read by `ast`, nothing is imported, so neither PyTorch nor a data set is needed. Documentation stands beside the
code (docments): a comment after a parameter is its description, one after the closing parenthesis is what is returned.
Each object links to the notebook cell it was exported from.

A module is named by its room: `core.scores` is nioodd/core/scores.py, and the empty name is the package itself."""
import ast
import io
import json
import re
import textwrap
import tokenize
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

CELL = re.compile(r"^# %% (?:\.\./)+nbs/(\S+\.ipynb) #(\w+)$")
PRIVATE = {"_modidx.py"}  # Made by nbdev for itself


@dataclass
class Parameter:
    name: str  # With its stars
    type: str = ""
    default: str = ""
    words: str = ""


@dataclass
class Object:
    "A function, method, property, class or constant as its page shows it."
    kind: str  # py:KIND of Sphinx
    name: str  # Without the module: `f`, `Class`, `Class.method`
    call: str = ""  # "(x, *, n=3)"
    doc: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    type: str = ""  # Of what is returned, or of a constant's value
    words: str = ""  # What is returned
    note: str = ""  # A comment on parameters and result at once
    bases: list[str] = field(default_factory=list)
    members: list["Object"] = field(default_factory=list)
    notebook: str = ""  # core/01_scores.ipynb
    cell: str = ""  # Its cell id


@dataclass
class Module:
    name: str  # core.scores; empty for the package itself
    full: str  # nioodd.core.scores
    doc: str
    notebook: str
    objects: list[Object]
    names: dict[str, str]  # What a name means in this module: own and imported nioodd names → full name
    shortcuts: dict[str, str]  # Of the package itself: a name at its top → the module that has it

    @property
    def page(self) -> str: return self.name or self.full  # Its page is api/PAGE.html

    def full_name(self, o: Object) -> str: return f"{self.full}.{o.name}"


# ---- Syntax

def elements(node) -> list: return [*node.elts] if isinstance(node, ast.Tuple) else [node]


def signature_rows(a: ast.arguments) -> list[tuple]:
    "(stars, parameter, default or None) in the order of the source."
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [("", p, d) for p, d in zip(plain, defaults)]
    if a.vararg: rows.append(("*", a.vararg, None))
    rows += [("", p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append(("**", a.kwarg, None))
    return rows


def last_line(row: tuple) -> int:
    "Of a row of a signature."
    return max(x.end_lineno for x in row[1:] if x)


def bare_call(node, without_first: bool) -> str:
    "The signature without types; a method's without `self`."
    a = ast.parse(ast.unparse(node)).body[0].args
    for _, p, _ in signature_rows(a): p.annotation = None
    if without_first and a.args: a.args.pop(0)
    return f"({ast.unparse(a)})"


def method_kind(decorators: set[str]) -> str:
    if decorators & {"property", "cached_property"}: return "property"
    return next((d for d in ("classmethod", "staticmethod") if d in decorators), "method")


def decorator_names(node) -> set[str]:
    "Of a function; `@patch(property)` counts as `@property`, too."
    found = set()
    for d in node.decorator_list:
        found.add(ast.unparse(d.func if isinstance(d, ast.Call) else d))
        if is_patch(d) and isinstance(d, ast.Call): found |= {*map(ast.unparse, d.args)}
    return found


def is_patch(decorator) -> bool:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(call, ast.Name) and call.id == "patch"


def patched_class(node) -> str | None:
    "The class that a function is made a method of: `@patch` above, and `self: Class` or `cls: type[Class]` first."
    if not isinstance(node, ast.FunctionDef) or not any(map(is_patch, node.decorator_list)): return None
    annotation = [*node.args.posonlyargs, *node.args.args][0].annotation
    if isinstance(annotation, ast.Subscript): annotation = annotation.slice
    return ast.unparse(annotation).strip("'\"")


def text_of(node) -> str: return ast.unparse(node) if node else ""


class Reader:
    "One module's source as a `Module`."

    def __init__(self, path: Path, package: Path):
        self.source, self.package = path.read_text(encoding="utf-8"), package.name
        parts = path.relative_to(package).with_suffix("").parts
        self.is_init = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_init else parts)
        self.full = f"{self.package}.{self.name}".rstrip(".")
        self.tree = ast.parse(self.source)
        self.comments = self.comments_beside_code()
        matches = [(i, CELL.match(line)) for i, line in enumerate(self.source.splitlines(), 1)]
        self.cells = [(i, *m.groups()) for i, m in matches if m]
        defined = [n for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        self.nodes = {n.name: n for n in defined if not patched_class(n)}
        self.added = self.methods_added_later()

    def comments_beside_code(self) -> dict[int, str]:
        "Line number → the comment that follows code on that line."
        found = {}
        for t in tokenize.generate_tokens(io.StringIO(self.source).readline):
            beside = t.line[:t.start[1]].strip()
            if t.type == tokenize.COMMENT and beside: found[t.start[0]] = t.string.lstrip("# ").rstrip()
        return found

    def methods_added_later(self) -> dict[str, dict[str, ast.FunctionDef]]:
        "`@patch`, or Class.name = _function after the class: class → name → function."
        added: dict[str, dict] = {}
        for node in self.tree.body:
            if owner := patched_class(node): added.setdefault(owner, {})[node.name] = node
            if not isinstance(node, ast.Assign) or len(node.targets) != 1: continue
            for target, value in zip(elements(node.targets[0]), elements(node.value)):
                if not (isinstance(target, ast.Attribute) and isinstance(value, ast.Name)): continue
                function = self.nodes.get(value.id)
                if not isinstance(function, ast.FunctionDef): continue
                added.setdefault(ast.unparse(target.value), {})[target.attr] = function
        return added

    def at(self, node) -> dict[str, str]:
        "Notebook and cell that a node was exported from."
        _, notebook, cell = max(c for c in self.cells if c[0] <= node.lineno)
        return dict(notebook=notebook, cell=cell)

    def end_of_signature(self, node, rows: list[tuple]) -> int:
        "The line whose comment says what is returned."
        if node.returns: return node.returns.end_lineno
        end, first = max([node.lineno, *map(last_line, rows)]), node.body[0].lineno
        closing = self.comments.get(end) is None and first > end + 1  # ): # comment
        return first - 1 if closing else end

    def function(self, node, prefix: str = "") -> Object:
        "A function, or with a prefix (`Class.`) a method."
        decorators, bound = decorator_names(node), False
        kind, rows = "function", signature_rows(node.args)
        if prefix:
            kind, bound = method_kind(decorators), "staticmethod" not in decorators
            rows = rows[1:] if bound else rows
        end = self.end_of_signature(node, rows)
        parameters = []
        for stars, p, d in rows:
            last = last_line((stars, p, d))
            words = "" if last == end else self.comments.get(last, "")
            parameters.append(Parameter(stars + p.arg, text_of(p.annotation), text_of(d), words))
        words, note = self.comments.get(end, ""), ""
        if any(last_line(row) == end for row in rows) and is_note(words, parameters): words, note = "", words
        call = "" if kind == "property" else bare_call(node, bound)
        doc, returned = ast.get_docstring(node) or "", text_of(node.returns)
        return Object(kind, prefix + node.name, call, doc, parameters, returned, words, note, **self.at(node))

    def fields(self, node: ast.ClassDef) -> list[Parameter]:
        "Of a dataclass or NamedTuple, also those of bases in the same module that are private."
        found = []
        for base in map(ast.unparse, node.bases):
            if base.startswith("_") and base in self.nodes: found += self.fields(self.nodes[base])
        for n in node.body:
            if isinstance(n, ast.AnnAssign): found.append(self.field(n))
        return found

    def field(self, n: ast.AnnAssign) -> Parameter:
        default, words = n.value, self.comments.get(n.end_lineno, "")
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "option":  # option(default, words, choices)
            words = words or ast.literal_eval(default.args[1])
            if len(default.args) > 2: words += f"; {choices_in_words(default.args[2])}"
            default = default.args[0]
        text = text_of(default)
        if made := re.fullmatch(r"field\(default_factory=(\w+)\)", text):
            text = {"list": "[]", "dict": "{}"}.get(made[1], f"{made[1]}()")
        return Parameter(n.target.id, ast.unparse(n.annotation), text, words)

    def methods_of(self, owner: str) -> list[Object]:
        "Those that a class gets after it was defined, here or elsewhere."
        found = []
        for name, node in self.added.get(owner, {}).items():
            if name.startswith("_"): continue
            made = self.function(node, f"{owner}.")
            made.name = f"{owner}.{name}"
            found.append(made)
        return found

    def klass(self, node: ast.ClassDef) -> Object:
        functions = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        bases = [*map(ast.unparse, node.bases)]
        parameters, call, prefix = [], "", f"{node.name}."
        if init := functions.get("__init__") or self.added.get(node.name, {}).get("__init__"):
            made = self.function(init, prefix)
            parameters, call = made.parameters, made.call
        elif "dataclass" in decorators or "NamedTuple" in bases:
            parameters = self.fields(node)
            said = [p.name + (f"={p.default}" if p.default else "") for p in parameters]
            call = f"({', '.join(said)})" if len(said) < 12 else "(...)"
        members = [self.function(n, prefix) for name, n in functions.items() if not name.startswith("_")]
        members += self.methods_of(node.name)
        bases = [b for b in bases if not b.startswith("_") and b not in ("NamedTuple", "object")]
        doc = ast.get_docstring(node) or ""
        return Object("class", node.name, call, doc, parameters, bases=bases, members=members, **self.at(node))

    def assigned(self) -> dict[str, tuple]:
        "Name → statement and value, of all that is assigned at the top, `A, B = 1, 2` too."
        found = {}
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign): targets = [node.target]
            for t in targets:
                names, values = elements(t), [node.value]
                if isinstance(t, ast.Tuple): values = elements(node.value)
                if len(names) != len(values): values = [node.value] * len(names)
                found |= {n.id: (node, v) for n, v in zip(names, values) if isinstance(n, ast.Name)}
        return found

    def constant(self, name: str) -> Object:
        if name not in (known := self.assigned()):
            raise SystemExit(f"{self.full}: __all__ has {name!r}, which is nowhere defined")
        node, what = known[name]
        value = ast.unparse(what)
        if keys := keys_of(what): value = f"{{{', '.join(f'{k!r}: …' for k in keys)}}}"
        if len(value) > 300: value = value[:300].rsplit(",", 1)[0] + ", …"
        words = self.comments.get(node.lineno) or self.comments.get(node.end_lineno, "")
        return Object("data", name, doc=words, type=value, **self.at(node))

    def imported(self) -> dict[str, str]:
        "Names that come from other modules of the package → their full names."
        here, found = self.full.split("."), {}
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.ImportFrom): continue
            up = node.level - self.is_init  # a package's own level is itself
            start = here[:len(here) - up] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            if origin.partition(".")[0] != self.package: continue
            found |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}
        return found

    def shortcuts(self) -> dict[str, str]:
        "What `NAMES` of the package itself says."
        known = self.assigned()
        return ast.literal_eval(known["NAMES"][1]) if not self.name and "NAMES" in known else {}

    def object(self, name: str) -> Object:
        node = self.nodes.get(name)
        if node is None: return self.constant(name)
        return self.klass(node) if isinstance(node, ast.ClassDef) else self.function(node)

    def module(self) -> Module:
        known = self.assigned()
        public = ast.literal_eval(known["__all__"][1])
        names = self.imported() | {n: f"{self.full}.{n}" for n in public}
        lines = {x: n.lineno for x, n in self.nodes.items()} | {x: n.lineno for x, (n, _) in known.items()}
        objects = sorted(map(self.object, public), key=lambda o: lines[o.name])
        doc = ast.get_docstring(self.tree) or self.leading_words()
        return Module(self.name, self.full, doc, self.cells[0][1], objects, names, self.shortcuts())

    def leading_words(self) -> str:
        "The first string that stands alone: nbdev puts a package's version before its docstring."
        alone = [n.value for n in self.tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        return next((v.value for v in alone if isinstance(v.value, str)), "")


def is_note(words: str, parameters: list[Parameter]) -> bool:
    "Is a comment on the last line of a signature about its parameters, rather than about what is returned?"
    if "→" in words or "; returns" in words or words.startswith("`"): return True
    return any(re.match(rf"{re.escape(p.name)}\b", words) for p in parameters)


def choices_in_words(choices) -> str:
    if isinstance(choices, ast.Tuple): return ", ".join(map(str, ast.literal_eval(choices)))
    return f"one of `{ast.unparse(choices)}`"


def keys_of(what) -> list:
    "Of a dictionary that is written out."
    if isinstance(what, ast.Dict): return [k.value for k in what.keys if isinstance(k, ast.Constant)]
    if isinstance(what, ast.Call) and ast.unparse(what.func) == "dict": return [k.arg for k in what.keywords if k.arg]
    return []


def read_package(folder: Path) -> dict[str, Module]:
    "Every exported module by its name; a room's own empty __init__.py is none."
    files = [p for p in sorted(folder.rglob("*.py")) if p.name not in PRIVATE]
    readers = [r for r in (Reader(p, folder) for p in files) if r.cells]
    modules = {r.name: r.module() for r in readers}
    for r in readers: give_methods(r, modules)
    return modules


def give_methods(r: Reader, modules: dict[str, Module]) -> None:
    "Methods that a module gives to classes of other modules go to the pages of those classes."
    classes = {m.full_name(o): o for m in modules.values() for o in m.objects if o.kind == "class"}
    for owner in r.added.keys() - r.nodes.keys():
        there = classes.get(modules[r.name].names.get(owner, ""))
        if there: there.members += r.methods_of(owner)


# ---- Links

class Links:
    "What a name in code font points to."

    def __init__(self, modules: dict[str, Module], package: str):
        self.package, self.modules = package, modules
        self.by_full = {m.full: m for m in modules.values()}
        self.targets, owners = {*self.by_full}, {}
        self.of_cell: dict[tuple, list] = {}  # (notebook, cell id) → what the cell defines: (name, full name)
        for m in modules.values():
            for o in m.objects:
                owners.setdefault(o.name, []).append(m.full_name(o))
                for x in (o, *o.members):
                    self.targets.add(m.full_name(x))
                    place, its_class = (x.notebook, x.cell), (o.notebook, o.cell)
                    if x is o or place != its_class: self.of_cell.setdefault(place, []).append((x.name, m.full_name(x)))
        # Without an import to say so, only a name that is one module's alone, and no everyday word
        self.unique = {n: o[0] for n, o in owners.items() if len(o) == 1 and re.search(r"_|[a-z][A-Z]", n)}
        top = modules[""].shortcuts if "" in modules else {}
        self.shortcuts = {f"{package}.{name}": f"{package}.{module}.{name}" for name, module in top.items()}

    def target(self, name: str, names: dict[str, str], inside: str = "") -> str | None:
        "The full name of `name` where `names` are known; of a class's member also by itself when `inside` that class."
        name = name.removesuffix("()")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name): return None
        head, dot, rest = name.partition(".")
        full = [f"{inside}.{name}"] if inside else []
        full += [x + dot + rest for x in (names.get(head), self.unique.get(head)) if x]
        if head == self.package: full.append(name)
        if dot: full.append(f"{self.package}.{name}")  # core.scores
        return next((f for f in map(self.original, full) if f in self.targets), None)

    def original(self, full: str) -> str:
        "Where an object is defined that can be had from the top of the package, too."
        top = ".".join(full.split(".")[:2])
        return self.shortcuts.get(top, top) + full[len(top):]

    def split(self, full: str) -> tuple[Module, str]:
        "The module of an object, and the object's name in it (empty for the module)."
        parts = full.split(".")
        n = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.by_full)
        return self.by_full[".".join(parts[:n])], ".".join(parts[n:])

    def url(self, full: str, root: str) -> str:
        "Address of an object's entry; `root` leads from the page to the site's top."
        module, name = self.split(full)
        return f"{root}api/{module.page}.html#" + (full if name else f"module-{full}")


# ---- Pages

def api_link(url: str, shown: str) -> str: return f'<a class="api" href="{url}">{shown}</a>'
def definition_list(kind: str, rows: list[str]) -> str: return "\n".join([f'<dl class="{kind}">', *rows, "</dl>"])


def code_block(text: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    made = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()
    made = made.replace("\n\n", "\n&#8203;\n")  # a blank line would end the HTML block
    return f'<div class="highlight-python notranslate"><div class="highlight"><pre>{made}</pre></div></div>'


class Pages:
    "Markdown (MyST) of the API pages."

    def __init__(self, modules: dict[str, Module], package: str, chapters: dict[str, str]):
        self.modules, self.package = modules, package
        self.chapters = chapters  # core/01_scores.ipynb → its title
        self.links = Links(modules, package)

    # Text: paragraphs of plain words with `names`; fenced or indented blocks are code,
    # lines that begin with "- " a list

    def linked(self, name: str, shown: str, m: Module, inside: str = "") -> str:
        "What is shown of a name, as a link if it is one of the API."
        to = self.links.target(name, m.names, inside)
        return api_link(self.links.url(to, "../"), shown) if to else shown

    def inline(self, text: str, m: Module, inside: str = "") -> str:
        made = []
        for i, part in enumerate(re.split(r"(?<!`)`([^`]+)`(?!`)", text)):
            is_code = i % 2
            if is_code: made.append(self.linked(part, f"<code>{escape(part)}</code>", m, inside))
            else: made.append(escape(part, quote=False))
        return "".join(made)

    def blocks(self, text: str, m: Module, inside: str = "") -> str:
        made, fenced = [], None
        for block in re.split(r"\n\s*\n", textwrap.dedent(text.strip("\n"))):
            lines = block.splitlines()
            if fenced is not None or lines[0].lstrip().startswith("```"):
                fenced = (fenced or []) + [block]
                if block.rstrip().endswith("```") and (len(fenced) > 1 or len(lines) > 1):
                    whole = "\n\n".join(fenced)
                    made.append(code_block(re.sub(r"^\s*```\w*\n|\n?\s*```\s*$", "", whole)))
                    fenced = None
            else: made.append(self.block(block, lines, m, inside))
        return "\n".join(made)

    def block(self, block: str, lines: list[str], m: Module, inside: str) -> str:
        "What stands between two blank lines: code, a sentence with code, a list or a paragraph."
        def paragraph(words): return f"<p>{self.inline(words, m, inside)}</p>"
        if lines[0].startswith((">>>", "    ")): return code_block(textwrap.dedent(block))
        if lines[0].endswith(":") and any(x.startswith("    ") for x in lines[1:]):
            return paragraph(lines[0]) + "\n" + code_block(textwrap.dedent("\n".join(lines[1:])))
        if all(x.lstrip().startswith(("- ", "* ")) or x.startswith("  ") for x in lines):
            items = re.split(r"\n\s*[-*] ", "\n" + block)[1:]
            items = [f"<li>{self.inline(' '.join(i.split()), m, inside)}</li>" for i in items]
            return f"<ul>{''.join(items)}</ul>"
        return paragraph(" ".join(x.strip() for x in lines))

    def typed(self, text: str, m: Module) -> str:
        "A type with its nioodd names as links."
        def word(match): return self.linked(match[0], match[0], m)
        return re.sub(r"[A-Za-z_][\w.]*", word, escape(text.strip("'\""), quote=False))

    def table(self, o: Object, m: Module) -> str:
        "Parameters and result, each with the comment that stands beside it in the source."
        rows = []
        for p in o.parameters:
            head = f'<span class="name">{escape(p.name)}</span>'
            if p.type: head += f": {self.typed(p.type, m)}"
            if p.default: head += f' <span class="default">= {escape(p.default, quote=False)}</span>'
            rows.append(f"<dt><code>{head}</code></dt><dd>{self.inline(p.words, m)}</dd>")
        if o.kind not in ("class", "data") and (o.words or o.type not in ("", "None")):
            head = f"→ {self.typed(o.type, m) or 'returns'}"
            rows.append(f'<dt class="returns"><code>{head}</code></dt><dd>{self.inline(o.words, m)}</dd>')
        return definition_list("parameters", rows) if rows else ""

    def options(self, o: Object) -> list[str]:
        "Of an entry's directive."
        quoted = json.dumps(o.type, ensure_ascii=False)  # as YAML wants it
        if o.kind in ("classmethod", "staticmethod"): return [f":{o.kind}:"]
        if o.kind == "data": return [f":value: {quoted}"]
        return [f":type: {quoted}"] if o.kind == "property" and o.type else []

    def body(self, o: Object, m: Module) -> list[str]:
        "HTML of what is said about an object."
        inside = "" if o.kind == "function" else f"{m.full}.{o.name.partition('.')[0]}"
        made = [self.blocks(o.doc, m, inside)] if o.doc else []
        if o.note: made.append(f'<p class="note">{self.inline(o.note, m, inside)}</p>')
        if o.bases:
            bases = ", ".join(f"<code>{self.typed(b, m)}</code>" for b in o.bases)
            made.append(f'<p class="bases">A subclass of {bases}{self.inherited(o, m)}</p>')
        if o.kind == "property":
            if o.words: made.append(f"<p>{self.inline(o.words, m)}</p>")
        elif table := self.table(o, m): made.append(table)
        return made

    def entry(self, o: Object, m: Module, colons: int = 5) -> str:
        fence, body = ":" * colons, self.body(o, m)
        kind = "method" if o.kind in ("classmethod", "staticmethod") else o.kind
        lines = [f"{fence}{{py:{kind}}} {o.name}{o.call}", *self.options(o), ""]
        if body: lines += ['<div class="entry">', *body, "</div>", ""]
        for x in o.members: lines += [self.entry(x, m, colons - 1), ""]
        return "\n".join([*lines, fence])

    def inherited(self, o: Object, m: Module) -> str:
        "Links to what a base class of this package brings."
        own, found = {x.name.partition(".")[2] for x in o.members}, []
        for base in o.bases:
            if not (to := self.links.target(base, m.names)): continue
            module, name = self.links.split(to)
            theirs = next(x for x in module.objects if x.name == name)
            for x in theirs.members:
                method = x.name.partition(".")[2]
                if method in own: continue
                found.append(api_link(self.links.url(f"{to}.{method}", "../"), f"<code>{method}</code>"))
        return ", which brings " + ", ".join(found) if found else ""

    def summary_row(self, o: Object, m: Module) -> str:
        "An object as a link, and the first sentence on it."
        text = o.doc.strip() or o.words or " "
        first = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9`])|\n\s*\n", text, maxsplit=1)[0].strip().rstrip(":")
        call = "" if o.kind in ("class", "data") else "()"
        link = api_link(self.links.url(m.full_name(o), "../"), f"<code>{o.name}{call}</code>")
        return f"<dt>{link}</dt><dd>{self.inline(' '.join(first.split()), m)}</dd>"

    def shortcut_rows(self, m: Module) -> list[str]:
        "Of the package itself: what can be had from its top."
        found = []
        for name, module in m.shortcuts.items():
            owner = self.modules[module]
            found.append(self.summary_row(next(o for o in owner.objects if o.name == name), owner))
        return found

    def page(self, m: Module) -> str:
        chapter = f"../{m.notebook.removesuffix('.ipynb')}.html"
        chapter = f'<a href="{chapter}">{escape(self.chapters[m.notebook])}</a>'
        rows = [*self.shortcut_rows(m), *(self.summary_row(o, m) for o in m.objects)]
        parts = [f"# {m.full}", f":::{{py:module}} {m.full}\n:::",
                 f'<p class="lead">{self.inline(m.doc, m)}</p>',
                 f'<p class="chapter">Where it is derived and tested: {chapter}</p>',
                 definition_list("summary", rows), f":::{{py:currentmodule}} {m.full}\n:::"]
        return "\n\n".join([*parts, *(self.entry(o, m) for o in m.objects)]) + "\n"

    def index(self, parts: list[tuple[str, list[str]]]) -> str:
        "The start page of the API: every module by parts (caption, notebooks)."
        lead = (f"Every module of <code>{self.package}</code>, in the order of the chapters they are exported from. "
                "Of each object: its signature, what it is, its parameters with the comments that stand beside them in "
                "the source, and a link to the notebook cell that defines it.")
        text, order = ["# API", f'<p class="lead">{lead}</p>'], []
        of = {m.notebook: m for m in self.modules.values()}
        for caption, notebooks in parts:
            here = [of[n] for n in notebooks if n in of]
            if not here: continue
            links = [api_link(f"{m.page}.html", f"<code>{m.full}</code>") for m in here]
            rows = [f"<dt>{link}</dt><dd>{self.inline(m.doc, m)}</dd>" for link, m in zip(links, here)]
            text += [f"## {caption}", definition_list("summary", rows)]
            order += [m.page for m in here]
        return "\n\n".join([*text, "```{toctree}\n:hidden:\n\n" + "\n".join(order) + "\n```"]) + "\n"

    def sources(self) -> dict[str, str]:
        "Full name → notebook page and cell, relative to an API page, for the [source] links."
        found = {}
        for m in self.modules.values():
            for o in (x for top in m.objects for x in (top, *top.members)):
                found[m.full_name(o)] = f"../{o.notebook.removesuffix('.ipynb')}.html#cell-{o.cell}"
        return found
