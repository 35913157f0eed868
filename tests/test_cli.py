"The door: paths that mean the same to the command and to the kernel; wrong words refused in one line, with code 2."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from reidbook import batch, runs, training
from reidbook.cli import main
from reidbook.data import open_dataset

SHORT = ["-p", "epochs=1", "-p", "iterations=2"]


def command(*words, cwd, **environment):
    "`reidbook` in a process of its own, in another folder."
    path = str(Path(training.__file__).parents[1])
    full = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-m", "reidbook.cli", *words], cwd=cwd, env=full, capture_output=True, text=True, timeout=300)


def refused(words, capsys, tmp_path, monkeypatch):
    "What is said on refusing: one line, code 2, nothing written."
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    try: code = main(words)
    except SystemExit as e: code = e.code
    out = capsys.readouterr()
    assert code == 2 and out.err.count("\n") == 1 and out.err.startswith("reidbook") and len(out.err) < 700 and "Traceback" not in out.err, out.err
    assert not (tmp_path / "runs").exists()
    return out.err


@pytest.mark.parametrize("words, said", [
    (["run", "-p", "lr=[1"], "not YAML"), (["run", "-p", "lr={"], "not YAML"), (["run", "-p", "weights=a: b: c"], "not YAML"), (["run", "-p", "lr=!!python/object:os.system x"], "not YAML"),
    (["run", "-p", "lr=2020-99-99"], "not YAML"), (["run", "-p", "lr=" + "[" * 3000], "not YAML"), (["run", "-p", "lr=*a"], "not YAML"), (["run", "-p", "epochs="], "expected a whole number"),
    (["run", "-p", "epochs"], "name=value"), (["run", "-p", "lr=.nan"], "expected a number"), (["run", "-p", "lr=1e999"], "expected a number"), (["run", "-p", "epochs=" + "9" * 5000], ""),
    (["run", "--seed", "9" * 30], "whole number"), (["run", "--seed", "-1"], "whole number"), (["run", "--seed", "x"], "whole number"), (["run", "--processes", "0"], "whole number"),
    (["run", "--processes", "-2"], "whole number"), (["run", "--nonsense"], "unrecognized"), (["runn"], "invalid choice"), ([], "required"),
    (["run", "--method", "nowhere", "--help"], "unknown method"), (["run", "--show-settings", "-p", "k1=0"], "whole number"),
    (["batch", "--datasets", "synthetic-tiny", "--methods", "baseline", "--jobs", "-3"], "whole number"), (["batch", "--datasets", "synthetic-tiny", "--methods", "baseline", "--jobs", "0"], "whole number"),
    (["batch", "--datasets", "synthetic-tiny", "--methods", "baseline", "--seeds", "a,b"], "whole number"), (["batch", "--datasets", "synthetic-tiny", "--methods", "baseline", "--seeds", "1,,2"], "whole number"),
    (["batch", "--datasets", "synthetic-tiny", "--methods", "baseline", "--seeds", ""], "whole number"), (["batch", "--datasets", "synthetic-tiny", "--methods", "baseline", "--processes", "0"], "whole number"),
])
def test_wrong_words(words, said, capsys, tmp_path, monkeypatch):
    assert said in refused(words, capsys, tmp_path, monkeypatch)


HEAD = "datasets: synthetic-tiny\nmethods: baseline\n"
GRIDS = {"empty": "", "comment": "# nothing", "scalar": "3", "text": "hello", "null": "null", "empty list": "[]", "list of scalars": "[1, 2]", "list of lists": "[[1]]", "cut": "[{datasets: a",
         "unknown word": HEAD + "seed: 1", "nested data sets": "datasets: [[a]]\nmethods: baseline", "number as data set": "datasets: 3\nmethods: baseline", "no method": "datasets: a\nmethods: []",
         "null method": "datasets: a\nmethods:", "seed text": HEAD + "seeds: one", "seed float": HEAD + "seeds: 1.5", "seed true": HEAD + "seeds: true", "seed big": HEAD + f"seeds: {10 ** 30}",
         "settings list": HEAD + "settings: [1]", "settings text": HEAD + "settings: epochs", "settings numbers": HEAD + "settings: {1: 2}", "settings nested": HEAD + "settings: {epochs: {a: 1}}",
         "list as key": "? [a]\n: b", "odd tag": "!!python/name:os.system", "deep": "[" * 5000, "alias": "*a", "date": HEAD + "settings: {epochs: 2020-01-01}"}


@pytest.mark.parametrize("text", GRIDS.values(), ids=GRIDS)
def test_odd_grid_files(text, capsys, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_text(text)
    refused(["batch", "--file", str(tmp_path / "grid.yaml")], capsys, tmp_path, monkeypatch)


def test_a_grid_that_is_no_text(capsys, tmp_path, monkeypatch):
    (tmp_path / "grid.yaml").write_bytes(b"\xff\xfe\x00\x80")
    refused(["batch", "--file", str(tmp_path / "grid.yaml")], capsys, tmp_path, monkeypatch)
    assert "no file" in refused(["batch", "--file", str(tmp_path)], capsys, tmp_path, monkeypatch)
    refused(["batch", "--file", str(tmp_path / "missing.yaml")], capsys, tmp_path, monkeypatch)


@pytest.mark.parametrize("jobs", [-3, 0, True, 1.5])
def test_jobs_of_a_batch(jobs):
    with pytest.raises(ValueError, match="jobs="): batch.run_batch([], jobs=jobs)


def template(folder, source):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "own.ipynb")
    return folder / "own.ipynb"


@pytest.mark.parametrize("source, names", [
    ("import os\nseed = 1", {"seed"}), ('"Defaults."\nseed: int = 1', {"seed"}), ("dataset, method = 'a', 'b'", {"dataset", "method"}), ("a = b = 1", {"a", "b"}), ("a, *b = 1, 2", {"a", "b"}),
    ("settings = {}\nsettings['a'] = 1\nsettings.x = 2", {"settings"}), ("", set()), ("# nothing", set()), ("print(1)", set()), ("seed: int", {"seed"}), ("def f(): x = 1", set()), ("seed = 1\nseed += 1", {"seed"}),
])
def test_odd_parameter_cells(source, names, tmp_path):
    assert runs.template_parameters(template(tmp_path, source)) == names


@pytest.mark.parametrize("source", ["import os", '"only words"', "a, b = 1, 2", "seed = = 1", "%matplotlib inline", "seed = (", "x\x00 = 1"])
def test_templates_without_our_parameters_are_refused(source, capsys, tmp_path, monkeypatch, root):
    said = refused(["run", "--dataset", "synthetic-tiny", "--root", str(root), "--template", str(template(tmp_path, source))], capsys, tmp_path, monkeypatch)
    assert "own.ipynb" in said


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b"[]", b"\xff\x00", b'{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_templates_that_are_no_notebook(content, capsys, tmp_path, monkeypatch):
    (tmp_path / "own.ipynb").write_bytes(content)
    refused(["run", "--template", str(tmp_path / "own.ipynb")], capsys, tmp_path, monkeypatch)


def test_show_settings_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs")); monkeypatch.setenv("REIDBOOK_DATA", str(tmp_path / "data"))
    assert main(["run", "--method", "glc", "--dataset", "market1501", "--show-settings", "-p", "lr=1e-3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lr", "0.001", "you"] == [r for r in rows if r[0] == "lr"][0][:3] and {"glc_t1", "temperature"} <= {r[0] for r in rows}
    with pytest.raises(SystemExit) as e: main(["run", "--method", "pplr", "--help"])
    assert e.value.code == 0 and "camera_eps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def own_csv(root, folder):
    "Links to the tiny set's images and a list of them."
    d = open_dataset("synthetic-tiny", root)
    folder.mkdir()
    (folder / "images").symlink_to(d.root)
    lines = [f"images/{Path(p).relative_to(d.root)},{pid},{cam},{split}" for split in ("train", "query", "gallery")
             for p, pid, cam in getattr(d, split)[["path", "pid", "cam"]].itertuples(index=False)]
    (folder / "s.csv").write_text("\n".join(["path,pid,cam,split", *lines]) + "\n")


def test_a_list_of_images_as_a_relative_root_and_braces_in_the_folder_of_runs(root, tmp_path):
    own_csv(root, tmp_path / "own")
    small = [w for k in ("height=64", "width=32", "backbone=small", "bn_group_size=16", "batch_size=32", "instances=4", "eps=0.6", "k1=12") for w in ("-p", k)]
    done = command("run", "--dataset", "csv", "--root", "own/s.csv", *SHORT, *small, cwd=tmp_path, REIDBOOK_RUNS="runs {dataset} {{x}} {")
    assert done.returncode == 0, done.stderr
    out, = (tmp_path / "runs {dataset} {{x}} {").glob("csv-*")
    assert json.loads((out / "manifest.json").read_text())["status"] == "done" and (tmp_path / "own" / ".cache").is_dir()
    again = command("run", "--dataset", "csv", "--root", str(tmp_path / "own" / "s.csv"), *SHORT, *small, cwd="/", REIDBOOK_RUNS=str(tmp_path / "runs {dataset} {{x}} {"))
    assert again.returncode == 0 and "already done" in again.stdout
    inserted = [c for c in nbformat.read(out / "run.ipynb", 4).cells if "injected-parameters" in c.metadata.get("tags", [])][0].source
    assert not any(word in inserted for word in (f'"{tmp_path}', "'/tmp", '"/tmp')) and "own/s.csv" in inserted


def test_a_relative_data_root_in_the_environment(root, tmp_path):
    (tmp_path / "data").symlink_to(root)
    open_dataset("synthetic-tiny", root)
    done = command("run", "--dataset", "synthetic-tiny", *SHORT, cwd=tmp_path, REIDBOOK_DATA="data", REIDBOOK_RUNS="runs")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("synthetic-tiny-*/run.ipynb"))) == 1
    assert not (Path(runs.checkout()) / "nbs" / "data").exists()
