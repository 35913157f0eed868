"The book as a whole: exports are fresh, notebooks are clean and say who they are, every chapter runs."
import copy
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from stale import stale_cells

project = Path(__file__).parent.parent
chapters = sorted(project.glob("nbs/*.ipynb"))


def test_export_is_fresh(tmp_path):
    "`nbdev_export` on a copy of the notebooks gives the modules that are committed."
    for name in ("nbs", "reidbook"):
        shutil.copytree(project / name, tmp_path / name, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    for name in ("settings.ini", "README.md"): shutil.copy(project / name, tmp_path)
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True)
    stale = [str(p.relative_to(tmp_path)) for p in sorted((tmp_path / "reidbook").rglob("*.py"))
             if not (project / p.relative_to(tmp_path)).exists() or not filecmp.cmp(p, project / p.relative_to(tmp_path), shallow=False)]
    assert not stale, f"stale export of {stale}: run nbdev_export and commit the modules with their notebooks"


@pytest.mark.parametrize("path", chapters, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    "Cleaning changes nothing: no counters, no widget state, no stray metadata; the parameters tag survives."
    from nbdev.clean import clean_nb
    from fastcore.xtras import dict2obj
    before = nbformat.read(path, as_version=4)
    after = dict2obj(copy.deepcopy(before))
    clean_nb(after, allowed_metadata_keys=["papermill"], allowed_cell_metadata_keys=["tags"])
    assert [c.metadata for c in before.cells] == [dict(c.metadata) for c in after.cells], "run nbdev_clean"
    assert all(c.get("execution_count") is None for c in before.cells), "run nbdev_clean"
    assert set(before.metadata) <= {"kernelspec"}, "run nbdev_clean"
    assert not [o for c in before.cells for o in c.get("outputs", []) if o.output_type == "error"], "a cell's output is an error"


@pytest.mark.parametrize("path", chapters, ids=lambda p: p.stem)
def test_title_stands_alone(path):
    "nbdev turns the title cell into front matter and drops whatever else is in it: an introduction there is lost on the site."
    lines = nbformat.read(path, as_version=4).cells[0].source.splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("> ")
    assert all(not line or line[:2] in ("# ", "> ", "- ") for line in lines), "move the introduction to a cell of its own"
    if path.stem == "train": assert "- skip_exec: true" in lines, "nbdev would train whenever it tests or renders"


@pytest.mark.parametrize("path", [p for p in chapters if p.stem != "train"], ids=lambda p: p.stem)
def test_chapter_runs(path, tmp_path):
    "Every chapter runs from top to bottom, as a reader would run it, and gives the numbers that are stored."
    nb = nbformat.read(path, as_version=4)
    stored = copy.deepcopy(code_cells(nb))
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    stale = [f"code cell {n}: {stored[n].source[:60]!r}" for n in stale_cells(stored, code_cells(nb))]
    assert not stale, f"the ledger or results/ say something else now; execute the page again: {stale}"


def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code"]


def toy_page(*outputs):
    "Three cells; the second uses what the first reads from a file."
    cells = [nbformat.v4.new_code_cell(s) for s in ('table = runs.ledger()\ntable.mAP', "best = table.max()\nbest", "time.time()")]
    for cell, said in zip(cells, outputs): cell.outputs = [nbformat.v4.new_output("stream", text=said)]
    return cells


def test_stale_outputs_are_found():
    assert stale_cells(toy_page("1", "2", "3"), toy_page("1", "2", "4")) == []  # a clock is no file
    assert stale_cells(toy_page("1", "2", "3"), toy_page("0", "2", "3")) == [0]
    assert stale_cells(toy_page("1", "2", "3"), toy_page("1", "0", "3")) == [1]
    stored, fresh = toy_page("1", "2", "3"), toy_page("1", "0", "3")
    for cell in (stored[1], fresh[1]): cell.source = "t = training.start(dataset, Baseline, table)\nt.mAP"
    assert stale_cells(stored, fresh) == []  # a training's digits depend on the processor
