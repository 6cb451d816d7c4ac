"""Every explorer in JupyterLab and under voila: a slider is moved, the picture changes, nothing goes wrong.

All are on one page, in one kernel, of one small network (see `explorers_page`). nbdev_test executes their chapters."""
import re

# One slider of each explorer, by its label
SLIDERS = {"threshold_desk": "threshold", "siblings": "siblings S", "ask": "morph", "inversion_studio": "round"}
OPEN = """async path => {
  const app = window.jupyterapp;
  await app.restored;
  const doc = await app.commands.execute('docmanager:open', {path});
  await doc.context.ready;
  await doc.context.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells');
}"""
# The pictures of the explorer that has the slider: what their bytes add up to, or null while one is not there yet
BYTES = """async slider => {
  let box = slider;
  while (box && !box.querySelector('img.widget-image')) box = box.parentElement;
  const found = [];
  for (const img of box?.querySelectorAll('img.widget-image') ?? []) {
    if (!img.complete || !img.naturalWidth) return null;
    const digest = await crypto.subtle.digest('SHA-256', await (await fetch(img.src)).arrayBuffer());
    found.push(Array.from(new Uint8Array(digest), b => b.toString(16).padStart(2, '0')).join(''));
  }
  return found.join(' ') || null;
}"""


SETTLED = f"""async slider => {{
  const now = await ({BYTES})(slider), same = now !== null && now === window.seen;
  window.seen = now;
  return same && now;
}}"""


def settled(page, slider) -> str:
    "The pictures' bytes, once they have been the same for 0.3 seconds: all are drawn and on the page."
    page.evaluate("() => { window.seen = null }")
    return page.wait_for_function(SETTLED, arg=slider, polling=300).json_value()


def until(page, slider, condition: str, bytes: str) -> str:
    "The pictures' bytes (`now`) as soon as they fulfil a condition."
    script = f"""async ([slider, bytes]) => {{
      const now = await ({BYTES})(slider);
      return now !== null && {condition} && now;
    }}"""
    return page.wait_for_function(script, arg=[slider, bytes]).json_value()


def moved(page, explorer: str) -> None:
    "Moves the slider by its keys, one step there and one back; the pictures follow, and are then what they were."
    row = page.locator(".widget-slider", has=page.locator(".widget-label", has_text=SLIDERS[explorer])).last
    row.wait_for()
    row.scroll_into_view_if_needed()
    slider, handle = row.element_handle(), row.locator(".noUi-handle").first
    first = settled(page, slider)
    handle.focus()
    handle.press("ArrowRight")
    until(page, slider, "now !== bytes", first)
    settled(page, slider)
    handle.press("ArrowLeft")
    until(page, slider, "now === bytes", first)


# A small picture, dropped as a file manager drops it
DROP = """async field => {
  const canvas = new OffscreenCanvas(28, 28), pen = canvas.getContext('2d');
  pen.fillRect(0, 0, 28, 28);
  pen.fillStyle = 'white';
  pen.fillRect(12, 4, 4, 20);
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([await canvas.convertToBlob()], 'bar.png', { type: 'image/png' }));
  for (const kind of ['dragover', 'drop'])
    field.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
}"""


def dropped(page) -> None:
    "Drops an image file on the field for files; the picture follows, and the field shows what it holds."
    button = page.locator(".widget-toggle-button", has_text=re.compile("^file$")).last
    button.click()
    field, handle = page.locator(".nioodd-drop").last, button.element_handle()
    field.wait_for()
    before = settled(page, handle)
    field.evaluate(DROP)
    until(page, handle, "now !== bytes", before)
    assert field.locator("span").inner_text() == "bar.png"
    assert field.locator("img").evaluate("async img => { await img.decode(); return img.naturalWidth }") == 28


LAB_ERRORS = """[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg,
.jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"""
VOILA_ERRORS = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], .voila-error"


def all_moved(page) -> None:
    "Every explorer's slider, and a file for the one that takes files."
    for name in SLIDERS: moved(page, name)
    dropped(page)


def test_in_jupyterlab(page, lab):
    page.goto(f"{lab}/lab?reset")
    page.wait_for_function("() => window.jupyterapp")
    page.evaluate(OPEN, "explorers.ipynb")
    all_moved(page)
    assert page.locator(LAB_ERRORS).count() == 0
    assert not page.wrong, page.wrong


def test_under_voila(page, voila):
    # its icons: the tests need no network
    page.route(re.compile(r"https://cdn\."), lambda route: route.fulfill(content_type="text/css", body=""))
    page.goto(f"{voila}/voila/render/explorers.ipynb")
    all_moved(page)
    assert page.locator(VOILA_ERRORS).count() == 0
    assert not page.wrong, page.wrong
