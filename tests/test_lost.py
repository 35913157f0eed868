"What changes or is lost between two starts of a run: processes, threads, stages, room, images, workers."
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reidbook import runs, training

project = Path(__file__).parent.parent
SHORT = dict(epochs=3, iterations=3, eval_every=3)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))


def on_disk(out): return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(records): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in records]


def in_a_process(root, out, processes=1, epochs=None):
    "A run in a process of its own; it is killed after so many epochs (None: it ends)."
    script = f"""
import os, signal, torch
torch.set_num_threads(1)
from reidbook import runs, training
run = runs.begin("synthetic-tiny", "baseline", 1, {str(root)!r}, "cpu", {str(out)!r}, {SHORT!r}, {processes})
for r in training.epochs(run.state):
    if r["epoch"] == {epochs}: os.kill(os.getpid(), signal.SIGKILL)
runs.finish(run)
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=100, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == (-signal.SIGKILL if epochs else 0), ended.stderr
    return without_times(on_disk(out)), json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    "Records of the run that nobody disturbed: one process, one thread."
    run = runs.begin("synthetic-tiny", "baseline", 1, root, "cpu", tmp_path_factory.mktemp("whole"), SHORT)
    return without_times(training.epochs(run.state))


def equal_up_to_rounding(found, whole):
    exact = ("epoch", "lr", "clusters", "outliers", "label_pairwise_f")
    assert [{k: r[k] for k in exact} for r in found] == [{k: r[k] for k in exact} for r in whole]
    for a, b in zip(found, whole): assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert found[-1]["mAP"] == pytest.approx(whole[-1]["mAP"], abs=0.02)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_processes_after_a_kill(root, tmp_path, undisturbed, before, after):
    "The same labels, losses up to rounding; the record names the processes of both starts, and what nobody counted."
    in_a_process(root, tmp_path, before, epochs=1)
    found, manifest = in_a_process(root, tmp_path, after)
    equal_up_to_rounding(found, undisturbed)
    assert [(s["processes"], s["after"]) for s in manifest["starts"]] == [(before, 0), (after, 1)] and manifest["time"]["starts"] == 2
    assert (manifest["time"]["cpu_is"] is not None) == (before == 2)
    assert math.isnan(runs.ledger_row(manifest | {"free": {}})["cpu_minutes"]) == (before == 2)


def test_another_number_of_threads_on_resume(root, tmp_path, undisturbed):
    "Equal up to rounding; the record says which start had how many."
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        next(training.epochs(runs.begin("synthetic-tiny", "baseline", 1, root, "cpu", tmp_path, SHORT).state))
    finally: torch.set_num_threads(threads)
    again = runs.begin("synthetic-tiny", "baseline", 1, root, "cpu", tmp_path, SHORT)
    list(training.epochs(again.state))
    equal_up_to_rounding(again.state.history, undisturbed)
    starts = runs.finish(again)["starts"]
    assert [(s["threads"], s["after"]) for s in starts] == [(2, 0), (threads, 1)] and starts[1]["seconds_before"] > 0


def test_starts_of_a_strange_manifest_do_not_count(tmp_path):
    (tmp_path / "manifest.json").write_text('{"starts": [3, {"after": "x"}, {"after": 1, "processes": 2, "seconds_before": 0.5}]}')
    assert [s["processes"] for s in runs.earlier_starts(tmp_path)] == [2]
    for text in ("[]", '{"starts": 7}', "no JSON"):
        (tmp_path / "manifest.json").write_text(text)
        assert runs.earlier_starts(tmp_path) == []
