"""Sphinx's settings. site.py copies this beside the pages that it makes, with what it knows of them in site.json."""
import json
from functools import cache
from pathlib import Path

from pygments.lexers import get_lexer_by_name
from sphinx.highlighting import PygmentsBridge, lexer_classes
from sphinx.search.en import SearchEnglish

site = json.loads((Path(__file__).parent/"site.json").read_text(encoding="utf-8"))

project = html_title = site["title"]
author, copyright, release = site["author"], site["copyright"], site["version"]
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.linkcode", "sphinx_copybutton"]
smartquotes = False
add_module_names = False
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

nb_execution_mode = "off"  # the outputs are those that were committed
nb_render_markdown_format = "myst"
nb_code_prompt_show = nb_code_prompt_hide = "Imports"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_dmath_allow_labels = False
myst_url_schemes = {"http": None, "https": None, "mailto": None,
                    "page": "{{path}}#{{fragment}}"}  # an HTML id on a page, see site.py
myst_heading_anchors = 4
mathjax_path = "mathjax/tex-chtml.js"  # MathJax 3, put there by site.py
mathjax3_config = {"chtml": {"scale": 0.97}}

html_theme = "sphinx_book_theme"
html_static_path, html_css_files, html_favicon = ["_static"], ["style.css"], "_static/favicon.svg"
html_js_files = [("search.js", {"defer": "defer", "priority": 900})]
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sphinx = False
html_extra_path = ["llms.txt"]
html_theme_options = dict(
    logo={"text": site["title"]}, repository_url=site["git_url"], repository_branch=site["branch"], path_to_docs="nbs",
    use_repository_button=True, use_source_button=True, use_download_button=False, use_fullscreen_button=False,
    navbar_start=[], navbar_center=[], navbar_end=[], navbar_persistent=[],
    show_toc_level=2, show_navbar_depth=1, home_page_in_toc=False,
    max_navbar_depth=2)  # chapters, and the modules below the API: what is deeper would be copied for each page, unseen
copybutton_exclude = ".linenos, .gp, .go"


def linkcode_resolve(domain, info): return site["sources"].get(f"{info['module']}.{info['fullname']}")


def only_what_is_there(app, pagename, templatename, context, doctree):
    "The button to a page's source: GitHub's view of a notebook; none on pages without a file in the repository."
    for group in (g for g in context.get("header_buttons", []) if "buttons" in g):
        for b in group["buttons"]: b["url"] = b.get("url", "").removesuffix("?plain=1")
        if not (Path(app.srcdir)/f"{pagename}.ipynb").is_file():
            group["buttons"] = [b for b in group["buttons"] if "/blob/" not in b["url"]]


def quick_sidebar(app, pagename, templatename, context, doctree):
    "The sidebar shows titles; Sphinx would copy all headings of all pages for each page, and then take them out again."
    sidebar, metadata = context["toctree"], app.env.metadata
    leaves = [name for name in app.env.found_docs if name not in app.env.toctree_includes]

    def titles(**options):
        for name in leaves: metadata[name]["tocdepth"] = 1
        try: return sidebar(**options)
        finally:
            for name in leaves: del metadata[name]["tocdepth"]  # the table on the right has all headings
    context["toctree"] = titles


# The same thousands of times: what a word's stem is, how code is written, which plugin reads a notebook's code
SearchEnglish.stem = cache(SearchEnglish.stem)
PygmentsBridge.get_formatter = cache(PygmentsBridge.get_formatter)
lexer_classes["ipython3"] = type(get_lexer_by_name("ipython3"))


def setup(app):
    app.connect("html-page-context", quick_sidebar, priority=1)
    app.connect("html-page-context", only_what_is_there, priority=900)
