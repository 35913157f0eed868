"Whatever lies in a run's folder: the ledger, `show`, the batch table and the site name it and show the rest."
import copy
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

from reidbook import batch, runs
from reidbook.cli import main
from reidbook.site import build_site, check_site, finished_runs, prepare, run_front, safe_html, safe_markdown

ROOT = Path(__file__).parents[1]
DEEP = "[" * 100_000
ODD = [None, [], ["x"], "text", -7, 10 ** 400, 1e308, {"a": {"b": [1]}}, float("nan"), True, "<b>\x1b[2J\ud800\n"]
VALID = {"run_id": "0123456789", "name": "good", "status": "done", "started": "2026-01-01T00:00:00+00:00",
         "finished": "2026-01-01T00:01:00+00:00",
         "parameters": {"dataset": "synthetic-tiny", "method": "baseline", "seed": 1, "settings": {"eps": 0.5}},
         "settings": {"eps": 0.5, "epochs": 2}, "code": "abc", "hardware": {"cpu": "x", "cores": 2, "gpus": []},
         "processes": 1, "data": {"name": "synthetic-tiny", "train": 3}, "resumed_after": 0,
         "metrics": {"mAP": 0.5, "rank1": 0.6, "clusters": 3}, "best_on_test": {"mAP": 0.6, "epoch": 1},
         "weights": "none", "epochs": 2, "eval_only": False, "seconds": 60.0, "peak_memory_mb": 1, "free": {"start": 0.1}}
RECORD = {"epoch": 1, "loss": 2.5, "clusters": 3, "outliers": 0, "mAP": 0.25, "rank1": 0.5, "seconds_train": 1.0}


@pytest.fixture(autouse=True)
def no_hanging():
    "A pipe that is waited for ends the test, not the suite."
    def late(*_): raise TimeoutError("waited for a pipe")
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    write(tmp_path / "runs", "good", json.dumps(VALID))
    return tmp_path / "runs"


def write(folder, name, manifest, records=""):
    (folder / name).mkdir(parents=True)
    (folder / name / "manifest.json").write_text(manifest)
    if records: (folder / name / "metrics.jsonl").write_text(records)
    return folder / name


def places(x, at=()):
    "Every place in a nested dict."
    for k, v in x.items():
        yield (*at, k)
        if isinstance(v, dict): yield from places(v, (*at, k))


def replaced(x, place, value):
    x = copy.deepcopy(x)
    inner = x
    for k in place[:-1]: inner = inner[k]
    inner[place[-1]] = value
    return x


def test_a_manifest_with_anything_anywhere(folder, capsys):
    for n, place in enumerate(places(VALID)):
        for m, value in enumerate(ODD): write(folder, f"odd-{n}-{m}", json.dumps(replaced(VALID, place, value)))
        text = json.dumps(replaced(VALID, place, "HERE")).replace('"HERE"', DEEP + "]" * len(DEEP))
        write(folder, f"deep-{n}", text)
        write(folder, f"fairly-deep-{n}", text.replace("[" * 99_100, "").replace("]" * 99_100, ""))
    table = runs.ledger()
    assert "good" in set(table.name) and all(v.startswith("damaged: ") for k, v in table.attrs["damaged"].items() if k.startswith("deep"))
    assert len(table) + len(table.attrs["damaged"]) == len(list(folder.iterdir()))
    assert table.mAP.dropna().between(0, 1).all() and table.minutes.between(0, 1e308).all() and table.mAP.dtype == float
    assert main(["ls"]) == 0
    said = capsys.readouterr().out
    assert "synthetic-tiny" in said and "not done: deep-0 (damaged" in said and "\x1b" not in said
    for path in sorted(folder.iterdir()):
        assert main(["show", path.name]) == 0, path.name
        assert f"{path.name}: " in (said := capsys.readouterr().out) and "\x1b" not in said


@pytest.mark.parametrize("file", ["manifest.json", "metrics.jsonl", "run.ipynb", "log.txt", "free.json"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/nowhere"), lambda path: path.symlink_to("/dev/zero")])
def test_no_file_in_place_of_a_file(folder, capsys, file, make):
    out = write(folder, "odd", json.dumps(VALID | {"status": "failed", "error": "no disk"}), json.dumps(RECORD))
    (out / file).unlink(missing_ok=True)
    make(out / file)
    assert main(["ls"]) == 0 and "not done: odd (" in capsys.readouterr().out
    assert main(["show", "odd"]) == 0 and "odd: " in capsys.readouterr().out
    run = SimpleNamespace(name="odd", out=out, epochs=2, state="running", why="")
    assert batch.progress(run)["run"] == "odd"
    batch.outcome(run, 1)
    assert run.state == "failed"
    assert dict(finished_runs(folder.parent)[1]).keys() == {"good", "odd"}


def test_half_a_line_of_records_does_not_hide_the_rest(folder, capsys):
    good = json.dumps(RECORD)
    odd = ["[1]", DEEP, '{"epoch": []}', json.dumps(RECORD | {"mAP": "x"}), json.dumps(RECORD | {"seconds_train": 10 ** 400}), "\x00\ufffd"]
    out = write(folder, "killed", json.dumps(VALID | {"status": "running"}), "\n".join([good, *odd, '{"epoch": 7}', good[:30]]))
    assert main(["show", "killed"]) == 0
    said = capsys.readouterr().out
    assert "epoch   1  loss 2.500" in said and f"{len(odd) + 1} of {len(odd) + 3} lines of metrics.jsonl cannot be read" in said
    row = batch.progress(SimpleNamespace(name="killed", out=out, epochs=9, state="running", why=""))
    assert row["mAP"] == "25.0%" and row["epoch"] == "2/9"
    (out / "metrics.jsonl").write_bytes(good.encode() + b"\n\xff\xfe\n")
    assert "epoch   1  loss 2.500" in runs.show_run("killed") and "1 of 2 lines" in runs.show_run("killed")


def test_a_batch_refuses_a_log_that_is_a_pipe(folder, root):
    run = runs.describe("synthetic-tiny", "baseline", root=root)
    (folder / run.name).mkdir()
    os.mkfifo(folder / run.name / "log.txt")
    with pytest.raises(ValueError, match="log.txt is no file"): batch.plan_batch(batch.grid(["synthetic-tiny"], ["baseline"]), root)


FRONT = dict(title="a run", description="A run", dataset="synthetic-tiny", method="baseline", seed=1, mAP=41.25)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def notebook(front, *cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell(f"---\n{front}\n---"), *cells])


def write_run(nbs, name, front, *cells):
    (nbs / "runs" / name).mkdir(parents=True)
    (nbs / "runs" / name / "manifest.json").write_text(json.dumps({"status": "done"}))
    front = front if isinstance(front, str) else yaml.safe_dump(front)
    nbformat.write(notebook(front, *cells), nbs / "runs" / name / "run.ipynb")


@pytest.fixture
def small(bare):
    "A checkout of two pages."
    cells = [nbformat.v4.new_markdown_cell("# index\n\n> A page\n\nWords.")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), bare / "nbs" / "index.ipynb")
    write_run(bare / "nbs", "good", FRONT)
    return bare


def files(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_nothing_is_written_outside_the_site(small, tmp_path):
    for n, odd in enumerate([{"output-file": "../../../owned.html"}, {"output-file": "/tmp/owned.html"}, {"filters": ["x.lua"]},
                             {"format": {"html": {"include-in-header": "/etc/passwd"}}}]):
        write_run(small / "nbs", f"odd-{n}", FRONT | odd)
    (small / "nbs" / "runs" / "good" / "metrics.jsonl").symlink_to("/etc/passwd")
    before = files(tmp_path)
    site = build_site(small / "out" / "site", quarto=False, root=small)
    new = {name for name in files(tmp_path) - before if not name.startswith(("small/out", "small/_proc"))}
    assert not new and not list(tmp_path.parent.rglob("owned.html")) and not Path("/tmp/owned.html").exists()
    assert check_site(site, small) == [] and (site / "runs" / "odd-0" / "run.html").exists()
    assert not (site / "runs" / "good" / "metrics.jsonl").exists()
    for n in range(4):
        front = yaml.safe_load(nbformat.read(small / "_proc" / "runs" / f"odd-{n}" / "run.ipynb", 4).cells[0].source.strip("-"))
        assert front == FRONT | {"output-file": "run.html"}


def test_front_matter_with_anything_anywhere(small):
    for n, key in enumerate(FRONT):
        for m, value in enumerate([None, [], ["x"], "text", 7, {"a": 1}, float("nan"), 1.5]): write_run(small / "nbs", f"odd-{n}-{m}", FRONT | {key: value})
    texts = ["- a\n- b", "a: [", "[" * 100_000, "x: &a [1]\ny: *a\ntitle: *a", "text", "", "? {a: 1}: 2", "1: 2", EVIL]
    for n, text in enumerate(texts): write_run(small / "nbs", f"text-{n}", text)
    for n, text in enumerate(["", "[]", "{}", "1", DEEP, '{"cells": 1}', '{"cells": [1], "metadata": [], "nbformat": 4, "nbformat_minor": 5}', "\ud800".encode("utf-8", "surrogatepass").decode("latin1")]):
        write_run(small / "nbs", f"cut-{n}", FRONT)
        (small / "nbs" / "runs" / f"cut-{n}" / "run.ipynb").write_text(text)
    good, left_out = finished_runs(small / "nbs")
    named = {Path(page).parent.name for page, *_ in good} | {name for name, _ in left_out}
    assert named == {p.name for p in (small / "nbs" / "runs").iterdir()} and len(good) < 30
    proc, _, notes = prepare(small)
    assert len(list((proc / "runs").iterdir())) == len(good) and all("\n" not in note for note in notes)


def test_pipes_and_odd_names_do_not_stop_the_site(small):
    nbs = small / "nbs"
    write_run(nbs, "piped", FRONT)
    os.mkfifo(nbs / "runs" / "piped" / "metrics.jsonl")
    write_run(nbs, "no-notebook", FRONT)
    (nbs / "runs" / "no-notebook" / "run.ipynb").unlink()
    os.mkfifo(nbs / "runs" / "no-notebook" / "run.ipynb")
    for name in ('a"onclick="x', "a'b", "a<script>b", "a\nb", "a\udcffb", "a%2fb", "a#b"): write_run(nbs, name, FRONT)
    good, left_out = finished_runs(nbs)
    assert [page for page, *_ in good] == ["runs/good/run.ipynb", "runs/piped/run.ipynb"] and len(left_out) == 8
    site = build_site(small / "out" / "site", quarto=False, root=small)
    assert check_site(site, small) == [] and "onclick" not in (site / "results.html").read_text()


def test_markup_in_a_run_stays_text(small):
    "In every part of a run that reaches its page, and in the names of its files."
    output, markdown = nbformat.v4.new_output, nbformat.v4.new_markdown_cell
    words = [EVIL, "[x](javascript:alert(3))", "<javascript:alert(4)>", "`<img src=x onerror=alert(5)>`{=html}", "[x]{onclick=alert(6)}",
             "::: {onclick=alert(7)}\nx\n:::", "## x {onclick=alert(8)}", "```{=html}\n" + EVIL + "\n```", "[x][y]\n\n[y]: javascript:alert(9)",
             "---\noutput-file: ../../owned.html\n---", "![x](javascript:alert(3))", "$<script>alert(1)</script>$", "{{< include /etc/passwd >}}"]
    outputs = [output("display_data", {"text/markdown": w, "text/plain": "x"}) for w in words]
    outputs += [output("display_data", {"text/html": w}) for w in words] + [output("stream", text=EVIL)]
    outputs += [output("display_data", {kind: EVIL}) for kind in ("text/plain", "text/latex", "application/javascript", "image/svg+xml")]
    cells = [*map(markdown, words), nbformat.v4.new_code_cell(f"#| label: '\"><script>'\nx = '{EVIL}'", outputs=outputs)]
    write_run(small / "nbs", "evil", FRONT | {"title": EVIL, "description": EVIL, "dataset": EVIL, "method": EVIL, "categories": [EVIL]}, *cells)
    site = build_site(small / "out" / "site", quarto=False, root=small)
    from bs4 import BeautifulSoup
    for page in site.rglob("*.html"):
        soup = BeautifulSoup(page.read_text(), "html.parser")
        assert [s.get("src") for s in soup.find_all("script") if s.get_text(strip=True) and "const up" not in s.get_text()] == [], page
        for e in soup.find_all(True):
            assert not [k for k in e.attrs if k.startswith("on")], (page, e)
            assert not [v for k in ("href", "src") if (v := e.get(k)) and re.match(r"\s*(javascript|data):", v, re.I)], (page, e)
        assert not soup.select("svg, iframe, main img[src=x]")
    assert check_site(site, small) == []
    staged = (small / "_proc" / "runs" / "evil" / "run.ipynb").read_text()
    assert "{{<" not in staged and not [c for c in nbformat.reads(staged, 4).cells if c.cell_type == "markdown" and c.source.startswith("---\n")]


def test_the_template_escapes_what_it_shows(tmp_path):
    "A weights file's name is shown as a text: the cell of the template, executed."
    cell = next(c for c in nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells if "run.settings.items()" in c.source)
    from html import escape
    from IPython.display import HTML, Markdown
    run = SimpleNamespace(settings={"epochs": 2, "weights": EVIL})
    *lines, last = cell.source.splitlines()
    space = {"run": run, "settings": {"weights": EVIL}, "escape": escape, "HTML": HTML, "Markdown": Markdown}
    exec("\n".join(lines), space)
    assert "<script" not in eval(last, space).data and "<b>weights = &lt;script" in eval(last, space).data


@pytest.mark.parametrize("text", ["lr = **0.1** · k = 3", "## Heading\n\nSee *this* and `code`.", "glc = [40, 20] · source = "])
def test_plain_words_of_a_run_read_as_before(text):
    from reidbook.site import markdown_html
    assert re.sub(r"\s+", " ", markdown_html(safe_markdown(text))) == re.sub(r"\s+", " ", markdown_html(text))


def test_tables_of_a_run_keep_their_look():
    import pandas as pd
    table = pd.DataFrame({"a": [1.5], "b": ["x"]})._repr_html_()
    assert safe_html(table).count("<td>") == 2 and 'class="dataframe"' in safe_html(table) and "style" not in safe_html(table)


def test_front_matter_of_committed_runs_passes():
    good, left_out = finished_runs(ROOT / "nbs")
    assert left_out == [] and len(good) >= 30 and all(run_front(meta) == meta for _, meta, _ in good)
