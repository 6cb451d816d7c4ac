"""API pages from the exported modules' source: read by `ast`, nothing imported, so neither PyTorch nor a data set is needed.

Documentation stands beside the code (docments): a comment after a parameter is its description, one after the closing parenthesis
is what is returned. Each object links to the notebook cell it was exported from."""
import ast
import io
import json
import re
import textwrap
import tokenize
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

CELL = re.compile(r"^# %% \.\./nbs/(\S+\.ipynb) #(\w+)$")


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
    notebook: str = ""  # 10_detector.ipynb
    cell: str = ""  # Its cell id


@dataclass
class Module:
    name: str
    doc: str
    notebook: str
    objects: list[Object]
    names: dict[str, str]  # What a name means in this module: own and imported nioodd names → module.name


class Reader:
    "One module's source as a `Module`."

    def __init__(self, path: Path, package: str):
        self.source, self.package = path.read_text(encoding="utf-8"), package
        self.tree = ast.parse(self.source)
        self.comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokenize.generate_tokens(io.StringIO(self.source).readline)
                         if t.type == tokenize.COMMENT and t.line[:t.start[1]].strip()}
        self.cells = [(i, *m.groups()) for i, line in enumerate(self.source.splitlines(), 1) if (m := CELL.match(line))]
        self.nodes = {n.name: n for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        self.added = self.methods_added_later()

    def methods_added_later(self) -> dict[str, dict[str, ast.FunctionDef]]:
        "Class.name = _function after the class: class → name → function."
        added: dict[str, dict] = {}
        for node in self.tree.body:
            if not isinstance(node, ast.Assign) or len(node.targets) != 1: continue
            pairs = zip(*([*x.elts] if isinstance(x, ast.Tuple) else [x] for x in (node.targets[0], node.value)))
            for target, value in pairs:
                if isinstance(target, ast.Attribute) and isinstance(value, ast.Name) and isinstance(self.nodes.get(value.id), ast.FunctionDef):
                    added.setdefault(ast.unparse(target.value), {})[target.attr] = self.nodes[value.id]
        return added

    def at(self, node) -> dict[str, str]:
        "Notebook and cell that a node was exported from."
        line, notebook, cell = max(c for c in self.cells if c[0] <= node.lineno)
        return dict(notebook=notebook, cell=cell)

    def function(self, node, prefix: str = "") -> Object:
        a, method, returns = node.args, bool(prefix), node.returns
        decorators = {ast.unparse(d) for d in node.decorator_list}
        plain, parameters = [*a.posonlyargs, *a.args], []
        defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
        rows = [("", p, d) for p, d in zip(plain, defaults)] + ([("*", a.vararg, None)] if a.vararg else [])
        rows += [("", p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)] + ([("**", a.kwarg, None)] if a.kwarg else [])
        if method and "staticmethod" not in decorators: rows = rows[1:]
        end = returns.end_lineno if returns else max([node.lineno, *(x.end_lineno for r in rows for x in r[1:] if x)])
        first = node.body[0]
        if not returns and self.comments.get(end) is None and first.lineno > end + 1: end = first.lineno - 1  # ): # comment
        for stars, p, d in rows:
            last = max(x.end_lineno for x in (p, d) if x)
            words = "" if last == end else self.comments.get(last, "")
            parameters.append(Parameter(stars + p.arg, ast.unparse(p.annotation) if p.annotation else "", ast.unparse(d) if d else "", words))
        words, note = self.comments.get(end, ""), ""
        beside = any(max(x.end_lineno for x in (p, d) if x) == end for _, p, d in rows)
        if words and beside and ("→" in words or words.startswith("`") or any(re.match(rf"{re.escape(p.name)}\b", words) for p in parameters) or "; returns" in words):
            words, note = "", words
        bare = ast.parse(ast.unparse(node)).body[0]
        for p in (*bare.args.posonlyargs, *bare.args.args, *bare.args.kwonlyargs, *filter(None, (bare.args.vararg, bare.args.kwarg))): p.annotation = None
        if method and "staticmethod" not in decorators and bare.args.args: bare.args.args.pop(0)
        kind = "function"
        if method: kind = "property" if decorators & {"property", "cached_property"} else "classmethod" if "classmethod" in decorators else "staticmethod" if "staticmethod" in decorators else "method"
        call = "" if kind == "property" else f"({ast.unparse(bare.args)})"
        return Object(kind, prefix + node.name, call, ast.get_docstring(node) or "", parameters, ast.unparse(returns) if returns else "", words, note, **self.at(node))

    def fields(self, node: ast.ClassDef) -> list[Parameter]:
        "Of a dataclass or NamedTuple, also those of bases in the same module that are private."
        found = []
        for base in map(ast.unparse, node.bases):
            if base.startswith("_") and base in self.nodes: found += self.fields(self.nodes[base])
        for n in node.body:
            if not isinstance(n, ast.AnnAssign): continue
            default, words = n.value, self.comments.get(n.end_lineno, "")
            if isinstance(default, ast.Call) and ast.unparse(default.func) == "option":
                words = words or ast.literal_eval(default.args[1])
                if len(default.args) > 2:
                    choices = default.args[2]
                    words += "; " + (", ".join(map(str, ast.literal_eval(choices))) if isinstance(choices, ast.Tuple) else f"one of `{ast.unparse(choices)}`")
                default = default.args[0]
            text = ast.unparse(default) if default else ""
            if made := re.fullmatch(r"field\(default_factory=(\w+)\)", text): text = {"list": "[]", "dict": "{}"}.get(made[1], f"{made[1]}()")
            found.append(Parameter(n.target.id, ast.unparse(n.annotation), text, words))
        return found

    def klass(self, node: ast.ClassDef) -> Object:
        functions = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        parameters, call = [], ""
        if init := functions.get("__init__"):
            f = self.function(init, f"{node.name}.")
            parameters, call = f.parameters, f.call
        elif "dataclass" in decorators or "NamedTuple" in map(ast.unparse, node.bases):
            parameters = self.fields(node)
            call = f"({', '.join(p.name + (f'={p.default}' if p.default else '') for p in parameters)})" if len(parameters) < 12 else "(...)"
        members = [self.function(n, f"{node.name}.") for name, n in functions.items() if not name.startswith("_")]
        for name, n in self.added.get(node.name, {}).items():
            made = self.function(n, f"{node.name}.")
            made.name = f"{node.name}.{name}"
            members.append(made)
        bases = [b for b in map(ast.unparse, node.bases) if not b.startswith("_") and b not in ("NamedTuple", "object")]
        return Object("class", node.name, call, ast.get_docstring(node) or "", parameters, bases=bases, members=members, **self.at(node))

    def assigned(self) -> dict[str, tuple]:
        "Name → statement and value, of all that is assigned at the top, `A, B = 1, 2` too."
        found = {}
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            for t in targets:
                names, values = [t], [node.value]
                if isinstance(t, ast.Tuple): names, values = t.elts, node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(t.elts)
                found |= {n.id: (node, v) for n, v in zip(names, values) if isinstance(n, ast.Name)}
        return found

    def constant(self, name: str) -> Object:
        if name not in (known := self.assigned()): raise SystemExit(f"{self.package}: __all__ has {name!r}, which is nowhere defined")
        node, what = known[name]
        value = ast.unparse(what)
        keys = [k.value for k in what.keys if isinstance(k, ast.Constant)] if isinstance(what, ast.Dict) else []
        if isinstance(what, ast.Call) and ast.unparse(what.func) == "dict": keys = [k.arg for k in what.keywords if k.arg]
        if keys: value = f"{{{', '.join(repr(k) + ': …' for k in keys)}}}"
        words = self.comments.get(node.lineno) or self.comments.get(node.end_lineno, "")
        return Object("data", name, doc=words, type=value if len(value) <= 300 else value[:300].rsplit(",", 1)[0] + ", …", **self.at(node))

    def module(self, name: str) -> Module:
        public = next(ast.literal_eval(n.value) for n in self.tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
        names = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                names |= {a.asname or a.name: f"{self.package}.{node.module}.{a.name}" for a in node.names}
        names |= {n: f"{self.package}.{name}.{n}" for n in public}
        objects = [self.klass(n) if isinstance(n, ast.ClassDef) else self.function(n) if n else self.constant(x) for x in public for n in [self.nodes.get(x)]]
        lines = {x: n.lineno for x, n in self.nodes.items()} | {x: n.lineno for x, (n, _) in self.assigned().items()}
        return Module(name, ast.get_docstring(self.tree) or "", self.cells[0][1], sorted(objects, key=lambda o: lines[o.name]), names)


def read_package(folder: Path) -> dict[str, Module]:
    "Every exported module by its name."
    return {p.stem: Reader(p, folder.name).module(p.stem) for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}


class Links:
    "What a name in code font points to."

    def __init__(self, modules: dict[str, Module], package: str):
        self.package, self.modules = package, modules
        self.targets = {f"{package}.{m.name}" for m in modules.values()}
        owners: dict[str, list[str]] = {}
        for m in modules.values():
            for o in (x for top in m.objects for x in (top, *top.members)):
                self.targets.add(f"{package}.{m.name}.{o.name}")
                if "." not in o.name: owners.setdefault(o.name, []).append(f"{package}.{m.name}.{o.name}")
        # Without an import to say so, only a name that is one module's alone, and no everyday word
        self.unique = {n: o[0] for n, o in owners.items() if len(o) == 1 and re.search(r"_|[a-z][A-Z]", n)}

    def target(self, name: str, names: dict[str, str], inside: str = "") -> str | None:
        "The full name of what `name` means where `names` are known, of a class's member also by itself when `inside` that class."
        name = name.removesuffix("()")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name): return None
        head, _, rest = name.partition(".")
        full = [f"{inside}.{name}"] if inside else []
        full += [x + (f".{rest}" if rest else "") for x in (names.get(head), self.unique.get(head)) if x]
        if head == self.package: full.append(name)
        return next((f for f in full if f in self.targets), None)

    def url(self, full: str, root: str) -> str:
        "Address of an object's entry; `root` leads from the page to the site's top."
        module = full.split(".")[1]
        return f"{root}api/{module}.html#" + (f"module-{full}" if full.count(".") == 1 else full)


class Pages:
    "Markdown (MyST) of the API pages."

    def __init__(self, modules: dict[str, Module], package: str, chapters: dict[str, str]):
        self.modules, self.package, self.chapters = modules, package, chapters  # chapters: 10_detector.ipynb → its title
        self.links = Links(modules, package)

    # Text: paragraphs of plain words with `names`; fenced or indented blocks are code, lines that begin with "- " a list

    def inline(self, text: str, m: Module, inside: str = "") -> str:
        def code(name):
            to = self.links.target(name, m.names, inside)
            shown = f"<code>{escape(name)}</code>"
            return f'<a class="api" href="{self.links.url(to, "../")}">{shown}</a>' if to else shown
        parts = re.split(r"(?<!`)`([^`]+)`(?!`)", text)
        return "".join(code(p) if i % 2 else escape(p, quote=False) for i, p in enumerate(parts))

    def blocks(self, text: str, m: Module, inside: str = "") -> str:
        made, code = [], None
        for block in re.split(r"\n\s*\n", textwrap.dedent(text.strip("\n"))):
            lines = block.splitlines()
            if code is not None or lines[0].lstrip().startswith("```"):
                code = (code or []) + [block]
                if block.rstrip().endswith("```") and (len(code) > 1 or len(lines) > 1):
                    made.append(self.code(re.sub(r"^\s*```\w*\n|\n?\s*```\s*$", "", "\n\n".join(code))))
                    code = None
            elif lines[0].startswith((">>>", "    ")): made.append(self.code(textwrap.dedent(block)))
            elif any(x.startswith("    ") for x in lines[1:]) and lines[0].endswith(":"):
                made += [f"<p>{self.inline(lines[0], m, inside)}</p>", self.code(textwrap.dedent("\n".join(lines[1:])))]
            elif all(x.lstrip().startswith(("- ", "* ")) or x.startswith("  ") for x in lines):
                items = re.split(r"\n\s*[-*] ", "\n" + block)[1:]
                made.append("<ul>" + "".join(f"<li>{self.inline(' '.join(i.split()), m, inside)}</li>" for i in items) + "</ul>")
            else: made.append(f"<p>{self.inline(' '.join(x.strip() for x in lines), m, inside)}</p>")
        return "\n".join(made)

    def code(self, text: str) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
        made = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip().replace("\n\n", "\n&#8203;\n")  # a blank line would end the HTML block
        return f'<div class="highlight-python notranslate"><div class="highlight"><pre>{made}</pre></div></div>'

    def typed(self, text: str, m: Module) -> str:
        "A type with its nioodd names as links."
        def word(match):
            to = self.links.target(match[0], m.names)
            return f'<a class="api" href="{self.links.url(to, "../")}">{match[0]}</a>' if to else match[0]
        return re.sub(r"[A-Za-z_][\w.]*", word, escape(text.strip("'\""), quote=False))

    def table(self, o: Object, m: Module) -> str:
        "Parameters and result, each with the comment that stands beside it in the source."
        rows = []
        for p in o.parameters:
            head = f'<span class="name">{escape(p.name)}</span>' + (f": {self.typed(p.type, m)}" if p.type else "")
            if p.default: head += f' <span class="default">= {escape(p.default, quote=False)}</span>'
            rows.append(f"<dt><code>{head}</code></dt><dd>{self.inline(p.words, m)}</dd>")
        if o.kind not in ("class", "data") and (o.words or o.type not in ("", "None")):
            rows.append(f'<dt class="returns"><code>→ {self.typed(o.type, m) or "returns"}</code></dt><dd>{self.inline(o.words, m)}</dd>')
        return f'<dl class="parameters">\n{chr(10).join(rows)}\n</dl>' if rows else ""

    def entry(self, o: Object, m: Module, colons: int = 5) -> str:
        fence, inside = ":" * colons, f"{self.package}.{m.name}.{o.name.split('.')[0]}" if o.kind != "function" else ""
        kind, options = o.kind, []
        if kind in ("classmethod", "staticmethod"): kind, options = "method", [f":{kind}:"]
        if kind == "data": options = [f":value: {json.dumps(o.type, ensure_ascii=False)}"]  # quoted as YAML wants it
        if kind == "property" and o.type: options = [f":type: {json.dumps(o.type, ensure_ascii=False)}"]
        body = [self.blocks(o.doc, m, inside)] if o.doc else []
        if o.note: body.append(f'<p class="note">{self.inline(o.note, m, inside)}</p>')
        if o.bases: body.append(f'<p class="bases">A subclass of {", ".join(f"<code>{self.typed(b, m)}</code>" for b in o.bases)}{self.inherited(o, m)}</p>')
        table = "" if kind in ("data", "property") and not o.words else self.table(o, m) if kind != "property" else f"<p>{self.inline(o.words, m)}</p>"
        if table: body.append(table)
        lines = [f"{fence}{{py:{kind}}} {o.name}{o.call}", *options, ""]
        if body: lines += ["<div class=\"entry\">", *body, "</div>", ""]
        for x in o.members: lines += [self.entry(x, m, colons - 1), ""]
        return "\n".join([*lines, fence])

    def inherited(self, o: Object, m: Module) -> str:
        "Links to what a base class of this package brings."
        found = []
        for base in o.bases:
            if not (to := self.links.target(base, m.names)): continue
            _, module, name = to.split(".")
            theirs = next(x for x in self.modules[module].objects if x.name == name)
            own = {x.name.split(".")[1] for x in o.members}
            found += [f'<a class="api" href="{self.links.url(f"{to}.{n}", "../")}"><code>{n}</code></a>' for x in theirs.members if (n := x.name.split(".")[1]) not in own]
        return ", which brings " + ", ".join(found) if found else ""

    def summary(self, m: Module) -> str:
        rows = []
        for o in m.objects:
            first = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9`])|\n\s*\n", o.doc.strip() or o.words or " ", maxsplit=1)[0].strip().rstrip(":")
            call = "" if o.kind in ("class", "data") else "()"
            rows.append(f'<dt><a class="api" href="{self.links.url(f"{self.package}.{m.name}.{o.name}", "../")}"><code>{o.name}{call}</code></a></dt><dd>{self.inline(" ".join(first.split()), m)}</dd>')
        return '<dl class="summary">\n' + "\n".join(rows) + "\n</dl>"

    def page(self, m: Module) -> str:
        full, chapter = f"{self.package}.{m.name}", m.notebook.replace(".ipynb", ".html")
        parts = [f"# {full}", f":::{{py:module}} {full}\n:::",
                 f'<p class="lead">{self.inline(m.doc, m)}</p>',
                 f'<p class="chapter">Where it is derived and tested: <a href="../{chapter}">{escape(self.chapters[m.notebook])}</a></p>',
                 self.summary(m), f":::{{py:currentmodule}} {full}\n:::"]
        return "\n\n".join([*parts, *(self.entry(o, m) for o in m.objects)]) + "\n"

    def index(self, parts: list[tuple[str, list[str]]]) -> str:
        "The start page of the API: every module by parts (caption, notebooks)."
        text = ["# API", f'<p class="lead">Every module of <code>{self.package}</code>, in the order of the chapters they are exported from. Of each object: its signature, '
                'what it is, its parameters with the comments that stand beside them in the source, and a link to the notebook cell that defines it.</p>']
        of = {m.notebook: m for m in self.modules.values()}
        for caption, notebooks in parts:
            here = [of[n] for n in notebooks if n in of]
            if not here: continue
            rows = [f'<dt><a class="api" href="{m.name}.html"><code>{self.package}.{m.name}</code></a></dt><dd>{self.inline(m.doc, m)}</dd>' for m in here]
            text += [f"## {caption}", '<dl class="summary">\n' + "\n".join(rows) + "\n</dl>"]
        order = [of[n].name for _, notebooks in parts for n in notebooks if n in of]
        text += ["```{toctree}\n:hidden:\n\n" + "\n".join(order) + "\n```"]
        return "\n\n".join(text) + "\n"

    def sources(self) -> dict[str, str]:
        "Full name → notebook page and cell, relative to an API page, for the [source] links."
        return {f"{self.package}.{m.name}.{o.name}": f"../{o.notebook.replace('.ipynb', '.html')}#cell-{o.cell}"
                for m in self.modules.values() for top in m.objects for o in (top, *top.members)}
