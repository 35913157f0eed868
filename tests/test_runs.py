"From the command line to an executed notebook: what is refused, what is written, what is repeatable."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from reidbook import runs
from reidbook.cli import main
from reidbook.settings import parse_settings

project = Path(__file__).parent.parent
overrides = yaml.safe_load((project / "tests" / "overrides.yaml").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Runs of the tests go to a folder of their own."
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(project))


def test_papermill_run_on_the_tiny_set(folder, root, capfd):
    out = runs.execute(**overrides, method="baseline", root=root)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done" and 0 < manifest["metrics"]["mAP"] <= 1 and manifest["best_on_test"]["mAP"] >= manifest["metrics"]["mAP"]
    assert set(manifest["free"]) == {"start", "pixels", "histogram"} and manifest["peak_memory_mb"] > 100
    assert [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    check_time(manifest)
    nb = nbformat.read(out / "run.ipynb", as_version=4)
    front = yaml.safe_load(nb.cells[0].source.strip("-\n"))
    assert nb.cells[0].cell_type == "raw" and front["dataset"] == "synthetic-tiny" and front["mAP"] == round(100 * manifest["metrics"]["mAP"], 1)
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("execution_count") is not None], "nbdev_clean would change it"
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert not (out / "_partial.ipynb").exists()
    assert "epoch   2" in capfd.readouterr().out
    stamp = (out / "run.ipynb").stat().st_mtime_ns
    assert runs.execute(**overrides, method="baseline", root=root) == out and (out / "run.ipynb").stat().st_mtime_ns == stamp
    assert list(runs.ledger(folder).name) == [out.name]


def check_time(manifest):
    "Wall and CPU seconds of the whole run; its parts sum to it, and they hold more than the epochs."
    time = manifest["time"]
    for kind in ("wall", "cpu"):
        parts = {name: part[kind] for name, part in time["parts"].items()}
        assert {"start", "stages", "labels", "training", "tests", "rest"} <= set(parts)
        assert sum(parts.values()) == pytest.approx(time[kind], abs=0.05)
        assert time[kind] > parts["training"] > 0
    assert manifest["seconds"] == time["wall"] and time["gpu"] is None


def test_stages_are_part_of_the_time_and_named(folder, root):
    "Purification's teacher trains in `prepare`: as released, its time was in no number."
    settings = {"epochs": 1, "iterations": 3}
    out = runs.execute(**overrides | {"settings": settings}, method="purification", root=root)
    time = json.loads((out / "manifest.json").read_text())["time"]
    [stage] = time["stages"]
    assert stage["made"] and 0 < stage["wall"] <= time["parts"]["stages"]["wall"] + 0.05
    found = runs.execute(**overrides | {"settings": settings}, method="purification", root=root, again=True)
    time = json.loads((found / "manifest.json").read_text())["time"]
    assert not time["stages"][0]["made"]
    assert time["stages"][0]["making"] == {k: stage[k] for k in ("wall", "cpu")}, "what it took to make is kept"


def test_corrected_runs_say_so():
    "Runs from before the clock of the whole run: start to finish, and what was recorded then."
    old = [m for m in map(runs.read_manifest, runs.run_folders(project / "nbs" / "runs")) if m and "time" not in m]
    for m in old: assert m["corrected"] and m["seconds_recorded"] > 0 and m["seconds"] > 0, m["name"]


def test_a_correction_is_counted_once():
    record = {"seconds_labels": 10, "seconds_train": 5, "seconds_test": 1, "seconds_correction": 8}
    assert runs.epoch_seconds(record) == 16


def row(**changed):
    return {"dataset": "d", "method": "pplr", "seed": 1, "mAP": .5, "rank1": .5, "best_on_test": .5, "start": .1, "settings": "{}",
            "minutes": 1., "cpu_minutes": float("nan"), "gpu_minutes": float("nan"), "hardware": "2 CPU cores"} | changed


def test_rows_that_differ_in_settings_have_names_of_their_own_and_the_baseline_is_first():
    import pandas as pd
    table = pd.DataFrame([row(), row(settings='{"camera": true}'), row(settings='{"epochs": 20}'), row(method="baseline"), row(method="aardvark")])
    assert list(runs.results_table(table).method) == ["baseline", "aardvark", "pplr", "pplr, camera", "pplr, epochs 20"]
    titles = {runs.run_title("d", "pplr", 1, json.loads(s)) for s in table.settings[:3]}
    assert titles == {"d · pplr · seed 1", "d · pplr, camera · seed 1", "d · pplr, epochs 20 · seed 1"}


def test_cost_is_cpu_time_where_every_run_knows_it():
    import pandas as pd
    known = runs.add_cost(pd.DataFrame([row(cpu_minutes=3.), row(cpu_minutes=4.)]))
    assert list(known.cost) == [3, 4] and set(known.clock) == {"cpu"}
    mixed = runs.add_cost(pd.DataFrame([row(cpu_minutes=3.), row()]))
    assert list(mixed.cost) == [1, 1] and set(mixed.clock) == {"wall"}


def test_committed_runs_have_titles_of_their_own():
    ours = [runs.read_manifest(f) for f in runs.run_folders(project / "nbs" / "runs")]
    titles = [runs.front_matter(m)["title"] for m in ours if m and m["status"] == "done"]
    assert len(titles) >= 30 and len(set(titles)) == len(titles)


def test_other_identities_are_other_data(tmp_path):
    "The same files with two identities swapped in the table: another digest, so another run."
    from PIL import Image
    from reidbook.data import dataset_digest, open_dataset
    for n in range(4): Image.new("RGB", (8, 16), (60 * n, 0, 0)).save(tmp_path / f"{n}.png")
    def digest(pids, cams=(0, 1, 0, 1), splits=("train",) * 4):
        lines = [f"{n}.png,{p},{c},{s}" for n, (p, c, s) in enumerate(zip(pids, cams, splits))]
        (tmp_path / "s.csv").write_text("\n".join(["path,pid,cam,split", *lines]))
        return dataset_digest(open_dataset("csv", tmp_path / "s.csv"))
    same = digest([1, 1, 2, 2])
    assert same == digest([1, 1, 2, 2]) != digest([1, 2, 1, 2])
    assert same != digest([1, 1, 2, 2], cams=(0, 0, 1, 1))
    assert same != digest([1, 1, 2, 2], splits=("train", "train", "query", "gallery"))


def test_a_failing_run_leaves_no_result(folder, root):
    with pytest.raises(RuntimeError, match="failed: ValueError: epoch 0"):
        runs.execute("synthetic-tiny", "baseline", root=root, settings={"eps": 0.001, "min_samples": 50})
    [out] = folder.iterdir()
    assert not (out / "run.ipynb").exists() and json.loads((out / "manifest.json").read_text())["status"] == "failed"
    assert not len(runs.ledger(folder)) and "failed" in runs.ledger(folder).attrs["damaged"][out.name]


def test_a_dead_kernel_is_no_result(folder, root, tmp_path):
    "papermill marks every cell as completed when the kernel dies; the missing record tells."
    nb = nbformat.read(project / "nbs" / "train.ipynb", as_version=4)
    at = next(i for i, c in enumerate(nb.cells) if "training.epochs" in c.source)
    nb.cells.insert(at, nbformat.v4.new_code_cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    nbformat.write(nb, tmp_path / "dies.ipynb")
    with pytest.raises(RuntimeError, match="failed"): runs.execute(**overrides, method="baseline", root=root, template=tmp_path / "dies.ipynb")
    assert not list(folder.glob("*/run.ipynb"))


@pytest.mark.parametrize("words, said", [
    ("run --method basline", "unknown method 'basline'"),
    ("run --dataset market-1501", "market-1501"),
    ("run --dataset market1501", "market1501"),
    ("run -p epoch=3", "unknown setting 'epoch'"),
    ("run -p epochs=many", "expected a whole number"),
    ("run -p epochs", "expected name=value"),
    ("run -p weights=missing.pth", "no such file"),
    ("run --weights missing.pth", "no such file"),
    ("run --weights a.pth -p weights=b.pth", "given twice"),
    ("run --eval-only -p epochs=2", "given twice"),
    ("run --device cuda:7", "cuda"),
    ("run --seed -4", "seed"),
    ("batch --datasets synthetic-tiny,nowhere --methods baseline", "nowhere"),
    ("data check market1501", "market1501"),
])
def test_refusals_are_one_line_and_leave_nothing(folder, root, capsys, words, said):
    words = words.split() + (["--root", str(root)] if "data" not in words.split()[:1] else [])
    try: code = main(words)
    except SystemExit as e: code = e.code  # what argparse itself refuses
    assert code == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "Traceback" not in err
    assert not folder.exists()


def test_untagged_template_and_missing_parameter_are_refused(folder, root, tmp_path):
    cell = nbformat.v4.new_code_cell("seed: int = 1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "t.ipynb")
    with pytest.raises(ValueError, match="0 cells tagged 'parameters'"): runs.execute("synthetic-tiny", "baseline", root=root, template=tmp_path / "t.ipynb")
    cell.metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "t.ipynb")
    with pytest.raises(ValueError, match="has no parameter"): runs.execute("synthetic-tiny", "baseline", root=root, template=tmp_path / "t.ipynb")
    assert not folder.exists()


def test_identity_depends_on_settings_code_and_data(root, monkeypatch):
    a = runs.describe("synthetic-tiny", "baseline", root=root)
    assert a.run_id == runs.describe("synthetic-tiny", "baseline", root=root).run_id
    assert a.run_id != runs.describe("synthetic-tiny", "baseline", seed=2, root=root).run_id
    assert a.run_id != runs.describe("synthetic-tiny", "baseline", root=root, settings={"eps": 0.4}).run_id
    monkeypatch.setattr(runs, "dataset_digest", lambda d: "other")
    assert a.run_id != runs.describe("synthetic-tiny", "baseline", root=root).run_id
    monkeypatch.undo()
    monkeypatch.setattr(runs, "code_digest", lambda *names: "other")
    assert a.run_id != runs.describe("synthetic-tiny", "baseline", root=root).run_id


@pytest.mark.parametrize("word", ["weights", "teacher"])
@pytest.mark.parametrize("content, said", [(b"not a network", "text, beginning"), (b"", "empty"), (b"PK\x03\x04", "cut short")])
def test_a_file_of_another_kind_is_refused_before_anything_is_written(folder, root, tmp_path, capsys, word, content, said):
    (tmp_path / "mine.pth").write_bytes(content)
    method = {"weights": "baseline", "teacher": "purification"}[word]
    assert main(f"run --method {method} --dataset synthetic-tiny --root {root} -p {word}={tmp_path}/mine.pth".split()) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "weights_only" not in err and "\n" not in err and not folder.exists()


def test_words_become_values():
    assert parse_settings(["a=1", "b=1e-3", "c=true", "d=none", "e=[1, 2]", "f=x=y"]) == {"a": 1, "b": 1e-3, "c": True, "d": "none", "e": [1, 2], "f": "x=y"}


def test_names_that_moved_work_with_a_warning():
    from reidbook import cli
    with pytest.warns(DeprecationWarning, match="settings.parse_settings"): assert cli.parse_settings is parse_settings
    with pytest.raises(AttributeError): cli.nothing


def test_the_command_is_installed_and_helpful():
    for words in ("--help", "run --help", "batch --help", "site --help", "data make --help", "data check --help", "bench --help"):
        p = subprocess.run([sys.executable, "-m", "reidbook.cli", *words.split()], capture_output=True, text=True, env=os.environ)
        assert p.returncode == 0 and "usage: reidbook" in p.stdout, words


def test_eval_only_tests_given_weights_and_trains_nothing(folder, root, tmp_path, monkeypatch):
    import torch
    from reidbook.models import create_model
    model, _ = create_model("small", "pretrained")
    torch.save(model.backbone.state_dict(), tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    words = f"run --dataset synthetic-tiny --method baseline --root {root} --weights mine.pth --eval-only".split()
    assert main(words) == 0
    [out] = folder.iterdir()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["eval_only"] and manifest["epochs"] == 0 and manifest["weights"] == "weights from mine.pth"
    assert manifest["metrics"]["mAP"] == manifest["free"]["start"] and manifest["best_on_test"] is None
    assert len(runs.ledger(folder)) == 1 and len(runs.results_table(runs.ledger(folder))) == 1
    assert manifest["run_id"] in out.name  # the kernel, in another folder, names the run alike
    torch.save({k: v + 0 if v.ndim == 0 else v * 1.01 for k, v in model.backbone.state_dict().items()}, tmp_path / "mine.pth")
    assert main(words) == 0 and len(list(folder.iterdir())) == 2  # another content is another run
