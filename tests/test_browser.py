"""JupyterLab in a real headless Chromium: open a notebook, run it, see that a slider, a choice and a click
change what is shown, and that nothing runs out of a narrow page.

``make test`` does this for one notebook, ``make test-browser`` (``SAGE_BROWSER=all``) for every one. The test
waits for the kernel to say that it is idle, never for some seconds. It skips where no browser is installed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALL = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ONE = [name for name in ALL if name.startswith("02_")] or ALL[:1]
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)

# Of the notebook in front, through the application object that `--expose-app-in-browser` puts into the page.
KERNEL = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
ERROR = '.jp-mod-rendered-error, [data-mime-type="application/vnd.jupyter.stderr"] .ansi-red-fg'

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(CHROMIUM is None, reason="no browser installed (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server of its own on a copy of the notebooks; yields its address with the token."""
    home = tmp_path_factory.mktemp("lab")
    # The notebooks find data beside them; what is not there yet is written beside the copy.
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    for copy in (home / "notebooks").glob("*.ipynb"):
        # Without stored outputs and counts, what is seen in the browser was computed there.
        notebook = json.loads(copy.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        copy.write_text(json.dumps(notebook))
    (home / "data").mkdir()
    for folder in (ROOT / "data").iterdir():
        if folder.name != "runs":
            (home / "data" / folder.name).symlink_to(folder)
    (home / "tests").symlink_to(ROOT / "tests")  # 02 shows a file of it
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab"
    for extension, plugin, values in (
        ("apputils-extension", "notification", {"fetchNews": "false"}),
        ("notebook-extension", "tracker", {"windowingMode": "none"}),  # cells out of sight stay in the page
    ):
        (settings / extension).mkdir(parents=True)
        (settings / extension / f"{plugin}.jupyterlab-settings").write_text(json.dumps(values))
    folders = {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config", "SAGE_RUNS": "runs"}
    environment = {**os.environ, **{name: str(home / folder) for name, folder in folders.items()}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += ["--expose-app-in-browser", "--IdentityProvider.token=test", "--LabApp.news_url="]
    command += [f"--ServerApp.root_dir={home / 'notebooks'}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home)
    try:
        deadline = time.monotonic() + 120
        while not (found := list((home / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, (home / "log.txt").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{json.loads(found[0].read_text())['port']}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def move(page, handle) -> None:
    handle.focus()
    page.keyboard.press("ArrowRight")


# How each is done, on which element, and the widgets that have one.
ACTS = {
    "slider": (r"\w+_(?:explorer|browser|matcher)", ".widget-slider .noUi-handle", move),
    "choice": ("heatmap_chooser", ".widget-dropdown select", lambda _, select: select.select_option(index=1)),
    "click": (
        "patch_matcher",
        ".widget-box .nsewdrag",
        lambda _, picture: picture.click(position={"x": 9, "y": 9}),
    ),
}
TOO_WIDE = """() => {
    const notebook = document.querySelector('.jp-Notebook').getBoundingClientRect();
    const drawn = [...document.querySelectorAll('.jp-OutputArea :is(table, img, .main-svg)')];
    const wide = drawn.filter(one => one.getBoundingClientRect().right > notebook.right + 2);
    return wide.map(one => one.outerHTML.slice(0, 80));
}"""


@pytest.mark.parametrize("name", ALL if os.environ.get("SAGE_BROWSER") == "all" else ONE)
def test_a_notebook_runs_in_jupyterlab_and_its_widgets_change_what_is_shown(lab, browser, name):
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.set_default_timeout(300_000)
    page.goto(f"{lab}/lab/tree/{name}?token=test&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    # The page's own indicator is idle before there is a kernel, and then Run All Cells does nothing.
    page.wait_for_function(f"{KERNEL}?.status === 'idle'", polling=100)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    source = "\n".join(cells)
    if "widgets.live_curve(" in source:
        # The loss is drawn while the kernel still trains.
        page.wait_for_selector("img.widget-image[src]", state="attached")
        assert page.locator('.jp-Notebook-ExecutionIndicator[data-status="busy"]').count() == 1
    # The count in the prompt of the last cell appears when it has run; an error would stop before it.
    page.wait_for_function(
        """([error, last]) => {
            const prompts = [...document.querySelectorAll('.jp-InputPrompt')].map(p => p.textContent.trim());
            return document.querySelector(error) || prompts.includes(`[${last}]:`);
        }""",
        arg=[ERROR, len(cells)],
        timeout=900_000,  # on a busy machine; only what hangs takes so long
        polling=500,  # a page that draws nothing has no frames to poll at
    )
    page.wait_for_function(f"{KERNEL}.status === 'idle'", polling=100)
    assert page.locator(ERROR).count() == 0, f"a cell ended in: {page.locator(ERROR).first.inner_text()}"
    for kind, (named, element, act) in ACTS.items():
        handle = page.locator(element)
        if not re.search(rf"widgets\.({named})\(", source):
            continue
        assert handle.count(), f"{name} has a widget, but nothing for a {kind} was drawn"
        handle.first.scroll_into_view_if_needed()
        output = page.locator(f".jp-OutputArea-child:has({element})").first
        before = output.inner_html()
        act(page, handle.first)
        page.wait_for_function(
            """([node, before]) => {
                const plain = html => html.replace(/noUi[^>]*|aria-[^>]*/g, '');
                return plain(node.innerHTML) !== plain(before);
            }""",
            arg=[output.element_handle(), before],
            polling=500,
        )
        page.wait_for_function(f"{KERNEL}.status === 'idle'", polling=100)
    if shots := os.environ.get("SAGE_SCREENSHOTS"):
        page.screenshot(path=f"{shots}/{Path(name).stem}.png")
    if os.environ.get("SAGE_BROWSER") == "all":
        page.set_viewport_size({"width": 1000, "height": 1600})
        page.wait_for_function("document.querySelector('.jp-Notebook').getBoundingClientRect().right <= 1000")
        page.wait_for_timeout(1000)  # plotly follows the page's width a moment later
        assert not page.evaluate(TOO_WIDE), f"{name} runs out of a page of 1000 pixels"
    page.close()
