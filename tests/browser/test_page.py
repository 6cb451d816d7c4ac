"""The page that holds a detector: what it says in a browser is what the detector says in Python."""
import shutil
import subprocess
import tarfile
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from small_networks import small_classifier, small_images

from nioodd.app.export import export
from nioodd.app.page import RUNTIME, write_page
from nioodd.posthoc.layerwise import LayerwiseDetector

VERSION = RUNTIME.partition("@")[2].partition("/")[0]
JUDGE = "([pixels, rate]) => window.nioodd.judge(Uint8Array.from(pixels), rate)"


@pytest.fixture(scope="module")
def runtime(folder):
    "Puts onnxruntime for the web, from npm's registry, beside the page."
    if not shutil.which("npm"): pytest.skip("no npm: onnxruntime-web cannot be fetched")
    command = ["npm", "pack", "--silent", f"onnxruntime-web@{VERSION}"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("onnxruntime-web cannot be fetched from npm's registry")
    package, = folder.glob("*.tgz")
    with tarfile.open(package) as archive:
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            (folder/name).write_bytes(archive.extractfile(f"package/dist/{name}").read())


@pytest.fixture(scope="module")
def detector(folder):
    "A detector, and the page that holds it."
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not find_spec(package): pytest.skip(f"{package} is not installed: pip install 'nioodd[onnx]'")
    detector = LayerwiseDetector(small_classifier(), classes=["a", "b", "<c>", "d"])
    detector.fit(small_images(200), small_images(400, seed=1), false_alarms=0.05)
    exported = export(detector, folder/"d.onnx", images=small_images(30, seed=2))
    write_page(exported, folder/"page.html", "Known?", "./ort.wasm.bundle.min.mjs")
    return detector


def opened(page, address):
    page.goto(f"{address}/page.html")
    page.wait_for_function("() => window.nioodd")


def test_the_page_says_what_the_detector_says(page, runtime, detector, served):
    images = torch.cat([small_images(6, seed=3), 255 - small_images(6, seed=4) // 4])
    expected = detector.verdict(images)
    opened(page, served)
    for rate in (0.01, 0.3):
        rejected = detector.is_ood(images, rate)
        for i, image in enumerate(images):
            found = page.evaluate(JUDGE, [image.flatten().tolist(), rate])
            assert found["label"] == expected["label"][i] and found["ood"] == rejected[i]
            for name in ("score", "p_value", "uncertainty"):
                assert abs(found[name] - expected[name][i]) <= 1e-4 * max(1, abs(expected[name][i])), name
    assert not page.wrong and all(url.startswith((served, "data:", "blob:")) for url in page.asked)


def test_drawing_choosing_a_picture_and_clearing(page, runtime, detector, served, tmp_path):
    opened(page, served)
    empty = page.evaluate("() => [...window.nioodd.pixels()]")
    assert empty == [0] * 64
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20, steps=5)
    page.mouse.up()
    drawn = torch.tensor(page.evaluate("() => [...window.nioodd.pixels()]"), dtype=torch.uint8).view(1, 1, 8, 8)
    assert drawn[..., 3:5].float().mean() > 50 and drawn[..., :2].sum() == 0  # A stroke down the middle
    expected = detector.verdict(drawn)
    says(page, detector, expected)
    page.locator("#clear").click()
    says(page, detector, detector.verdict(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)))
    Image.new("RGB", (80, 40), (255, 0, 0)).save(tmp_path/"red.png")
    page.locator("#file").set_input_files(tmp_path/"red.png")
    page.wait_for_function("() => window.nioodd.pixels()[0] > 0")
    assert page.evaluate("() => [...window.nioodd.pixels()]") == [76] * 64  # The luminance of red
    assert not page.wrong


def says(page, detector, verdict):
    "The words on the page are those of a verdict."
    score = f"{verdict['score'].item():.5g}"[:4]
    page.wait_for_function("s => document.getElementById('score').textContent.startsWith(s)", arg=score)
    assert page.locator("#class").inner_text() == detector.classes[verdict["label"]]
    known = page.locator("#verdict").get_attribute("class") == "known"
    assert known != verdict["ood"].item()
    if not known: assert page.locator("#verdict").inner_text() == "I don't know this"
