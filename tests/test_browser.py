"The cluster browser: its parts without a browser, and in JupyterLab with one."
import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from reidbook.browser import ClusterBrowser, agreement, browser_figure, browser_widgets, frames_of, member_values, neighbours_of, owner_of, plot_flow, title_of, words_of
from reidbook.noise import COLOURS

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def unit(x): return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(6), 8)
    feats = unit(np.eye(6)[pids] + .3 * rng.normal(size=(48, 6))).astype(np.float32)
    parts = unit(np.stack([feats + .4 * rng.normal(size=feats.shape) for _ in range(2)], 1)).astype(np.float32)
    labels = np.where(pids == 5, 4, pids)  # 4 and 5 are merged
    labels[[0, 9]] = -1
    return dict(images=rng.integers(0, 256, (48, 3, 32, 16), np.uint8), labels=labels, feats=feats, parts=parts, pids=pids, cams=np.arange(48) % 3)


def test_agreement_is_jaccard_of_neighbour_sets(toy):
    near = lambda x, i: set(np.argsort(-(x.astype(np.float64) @ x[i]), kind="stable")[:10])
    want = [[len(near(toy["feats"], i) & near(toy["parts"][:, p], i)) / len(near(toy["feats"], i) | near(toy["parts"][:, p], i)) for p in range(2)] for i in range(48)]
    got = agreement(toy["feats"], toy["parts"])
    assert np.allclose(got, want) and got.std() > .05
    assert np.allclose(agreement(toy["feats"], toy["feats"][:, None]), 1)


def test_distance_is_to_the_middle_of_the_cluster(toy):
    values = member_values(toy["feats"], toy["labels"], toy["parts"])
    for i in range(48):
        mine = toy["feats"][toy["labels"] == toy["labels"][i]].astype(np.float64)
        want = np.nan if toy["labels"][i] < 0 else 1 - toy["feats"][i] @ unit(mine.mean(0))
        assert np.isclose(values.distance[i], want, equal_nan=True, atol=1e-6)
    with pytest.raises(ValueError, match="48 features but 3 labels"): member_values(toy["feats"], [0, 0, 1])


def test_neighbours_leave_the_image_out(toy):
    near = neighbours_of(toy["feats"], toy["parts"], 7, k=5)
    assert list(near) == ["whole", "part 1", "part 2"] and all(7 not in rows and len(rows) == 5 for rows in near.values())
    assert near["part 2"][0] == np.argsort(-(toy["parts"][:, 1] @ toy["parts"][7, 1]))[1]
    assert list(neighbours_of(toy["feats"], None, 7)) == ["whole"]


def test_truth_stays_hidden_until_it_is_asked_for(toy):
    b = ClusterBrowser(**toy)
    assert b.cluster == 4 and not any("id" in w for w in words_of(b, b.rows)) and set(frames_of(b, b.rows)) == {"#888888"} and "person" not in title_of(b)
    b.truth = True
    assert [f == COLOURS["right"] for f in frames_of(b, b.rows)] == [toy["pids"][r] == owner_of(b) for r in b.rows]
    assert "50% are person 4" in title_of(b) and all("id" in w for w in words_of(b, b.rows))


def test_order_puts_the_doubtful_first(toy):
    b = ClusterBrowser(**toy)
    assert np.all(np.diff(b.values.distance[b.rows]) <= 0) and set(b.rows) == set(np.flatnonzero(toy["labels"] == 4))
    b.by = "agreement"
    assert np.all(np.diff(b.values.agreement[b.rows]) >= 0)


def test_widgets_react(toy):
    b = ClusterBrowser(**toy)
    html = lambda: browser_widgets(b).children[2].value
    assert html().count("<figure") == 16 and 'data-truth="0"' in html()
    b.controls["image"].value = 15
    b.controls["cluster"].value = 0  # has 7 images: the chosen image must follow
    assert html().count("<figure") == 7 and b.controls["image"].max == 6 and b.image == 6
    b.controls["truth"].value, b.controls["by"].value = True, "agreement"
    assert 'data-truth="1"' in html() and 'data-by="agreement"' in html()
    assert browser_widgets(b).children[4].value.count("reidbook-sheet") == 3


def test_plain_rendering_has_a_picture(toy, monkeypatch):
    forms = ClusterBrowser(**toy)._repr_mimebundle_()
    assert base64.b64decode(forms["image/png"]).startswith(b"\x89PNG") and "application/vnd.jupyter.widget-view+json" in forms
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as if it were not installed
    assert set(ClusterBrowser(**toy)._repr_mimebundle_()) == {"image/png", "text/plain"}


def test_without_truth_cameras_and_parts(toy):
    b = ClusterBrowser(toy["images"], toy["labels"], toy["feats"])
    b.truth = True
    assert set(frames_of(b, b.rows)) == {"#888888"} and words_of(b, b.rows[:1])[0].count(",") == 0 and len(browser_figure(b).axes) % 11 == 0
    with pytest.raises(ValueError, match="no image has label 77"): ClusterBrowser(toy["images"], toy["labels"], toy["feats"], cluster=77)
    with pytest.raises(ValueError, match="no cluster to look into"): ClusterBrowser(toy["images"], np.full(48, -1), toy["feats"])


def test_flow_draws_every_image_of_the_people(toy):
    fig = plot_flow([toy["labels"], toy["pids"]], toy["pids"], [4, 5])
    assert len(fig.axes[0].lines) == 16 and len(fig.axes[0].patches) == 1 + 2


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab of this book, with every cell in the page (no windowing): its address and its token.

    The token is random and travels in the environment: a server without one is a shell for every user of the machine."""
    token = secrets.token_urlsafe(24)
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    (tmp_path / "book").mkdir()
    shutil.copy2(ROOT / "nbs" / "06b_browser.ipynb", tmp_path / "book")
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "spaces"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
                        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "HOME": str(tmp_path),
                        "JUPYTER_TOKEN": token}
    words = ["lab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.port=0", "--ip=127.0.0.1"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", *words], cwd=tmp_path / "book", env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            found = list((tmp_path / "runtime").glob("jpserver-*.json"))
            if found and server.poll() is None:
                address = json.loads(found[0].read_text())["url"]
                try:
                    urllib.request.urlopen(f"{address}api/status?token={token}", timeout=2)
                    break
                except OSError: pass
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(.25)
        else: raise AssertionError("JupyterLab did not start: " + (tmp_path / "log").read_text()[-2000:])
        yield address, token
    finally:
        server.terminate()
        server.wait(30)


def test_jupyterlab_asks_for_its_token(lab):
    address, token = lab
    for wrong in ("", "?token=", "?token=" + "x" * len(token)):
        with pytest.raises(urllib.error.HTTPError, match="403"): urllib.request.urlopen(f"{address}api/contents{wrong}", timeout=10)
    assert urllib.request.urlopen(f"{address}api/contents?token={token}", timeout=10).status == 200


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_in_jupyterlab(lab, tmp_path):
    "The chapter opens, runs from top to bottom without an error, and the browser in it reacts to the mouse."
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (it is in the dev requirements)")
    with sync.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(str(tmp_path / "profile"), executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1200, "height": 1000})
        try:
            page = context.new_page()
            address, token = lab
            page.goto(f"{address}lab/tree/06b_browser.ipynb?token={token}")
            page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext"
                                   " && window.jupyterapp.shell.currentWidget.sessionContext.isReady", timeout=90_000)
            page.evaluate("() => { window.finished = false; window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.finished = true }) }")
            page.wait_for_function("window.finished", timeout=240_000)
            counts = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type == 'code' && c.model.sharedModel.source.trim())"
                                   ".map(c => [c.model.executionCount, c.model.outputs.toJSON().filter(o => o.output_type == 'error').map(o => o.evalue)])")
            assert len(counts) > 30 and [c for c in counts if c[0] is None or c[1]] == []
            sheet = page.locator(".reidbook-sheet[data-cluster]").first
            sheet.wait_for(timeout=30_000)
            sheet.scroll_into_view_if_needed()
            before, box = sheet.get_attribute("data-cluster"), page.locator(".widget-dropdown select").first
            assert sheet.get_attribute("data-truth") == "0" and sheet.locator("figure").count() > 3
            page.locator(".widget-checkbox input").first.click()
            page.wait_for_selector('.reidbook-sheet[data-truth="1"]', timeout=15_000)
            assert "rgb(213, 94, 0)" in (page.locator('.reidbook-sheet[data-truth="1"]').first.inner_html()).replace("#D55E00", "rgb(213, 94, 0)")
            box.select_option(index=2)
            page.wait_for_function(f"document.querySelector('.reidbook-sheet[data-cluster]').dataset.cluster != '{before}'", timeout=15_000)
            page.get_by_role("button", name="agreement").first.click()
            page.wait_for_selector('.reidbook-sheet[data-by="agreement"]', timeout=15_000)
            assert page.locator('.reidbook-sheet[data-space="3"]').first.locator("img").count() == 8
            if os.environ.get("REIDBOOK_SHOTS"): page.screenshot(path=str(Path(os.environ["REIDBOOK_SHOTS"]) / "lab-browser.png"))
        finally: context.close()
