"Batches: interrupted, failed, started again, complete; on this machine, on Dask's workers with one of them killed, through a queueing system."
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from reidbook import batch, checkpoints, runs
from reidbook.cli import main

project = Path(__file__).parent.parent
SHORT = {"epochs": 3, "iterations": 3, "eval_every": 3}
HOPELESS = {"eps": 0.001, "min_samples": 50}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "Runs of the tests go to a folder of their own, and so do those of their children."
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(project))
    return tmp_path / "runs"


def lines(out): return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


def test_a_batch_interrupted_and_started_again_is_complete(folder, root, tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump([{"datasets": "synthetic-tiny", "methods": ["baseline"], "seeds": [1], "settings": SHORT},
                                    {"datasets": ["synthetic-tiny"], "methods": "baseline", "settings": HOPELESS}]))
    good, bad = planned = batch.plan_batch(batch.read_grid(file), root, "cpu")
    def impatient(_):
        if lines(good.out): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): batch.run_local(planned, batch.slots(2, device="cpu"), impatient, pause=0.1)
    assert runs.run_status(good.out) == ("interrupted", "start it again to go on") and not checkpoints.in_use(good.out, "notebook")
    assert "interrupted" in runs.ledger().attrs["damaged"][good.name]

    assert main(["batch", "--file", str(file), "--root", str(root), "--device", "cpu", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 runs failed" in said.err and "epoch 0" in said.err and f"done     {good.name}" in said.out
    manifest = json.loads((good.out / "manifest.json").read_text())
    assert manifest["status"] == "done" and 1 <= manifest["resumed_after"] <= 3 and manifest["epochs"] == 3 and (good.out / "run.ipynb").exists()
    assert manifest["free"]["start"] == json.loads((bad.out / "free.json").read_text())["start"]  # of the network before training, not of the checkpoint
    assert runs.run_status(bad.out)[0] == "failed" and "ValueError" in (bad.out / "log.txt").read_text()
    assert main(["show", bad.name]) == 0 and "end of log.txt" in capsys.readouterr().out
    assert main(["ls"]) == 0 and bad.name in capsys.readouterr().out
    assert [r.state for r in batch.plan_batch(batch.read_grid(file), root, "cpu")] == ["done", "waiting"]  # what is done is skipped, what failed is tried again


def test_a_lost_workers_run_goes_on_elsewhere(folder, root):
    pytest.importorskip("distributed")
    planned = batch.plan_batch(batch.grid(["synthetic-tiny"], ["baseline"], settings=SHORT), root, "cpu")
    killed = []
    with batch.workers(cluster="local", jobs=2) as client:
        pids = client.run(os.getpid)
        def unlucky(_):
            if not lines(planned[0].out) or killed: return
            busy, = [address for address, tasks in client.processing().items() if tasks]
            os.kill(pids[busy], signal.SIGKILL)
            killed.append(pids[busy])
        batch.run_dask(planned, client, unlucky, pause=0.1)
    assert killed and planned[0].state == "done", planned[0].why
    manifest = json.loads((planned[0].out / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["resumed_after"] >= 1 and lines(planned[0].out) == 3
    assert not list(folder.glob(".stop*"))


def test_later_methods_and_the_other_distance_end_to_end(folder, root, tmp_path):
    "One batch: every later system, and distance=camera on each of the five, CALR's switches among them."
    short = {"epochs": 1, "iterations": 2, "eval_every": 1}
    camera = short | {"distance": "camera"}
    own = {"dcmip": {"first_epochs": 1}, "icsr": {"camera_epochs": 1, "camera_iterations": 1, "camera_head": True, "cluster_weights": "entropy", "weights_from": 0},
           "mprd": {"gcn_passes": 0}, "glc": {"glc_start": 0, "glc_subgraphs": [4, 2], "glc_width": 16}}
    blocks = [{"datasets": "synthetic-tiny", "methods": m, "settings": given | own.get(m, {})}
              for given, methods in ((short, ("spcl", "ncplr", "ise", "o2cap", "dcmip")), (camera, ("pplr", "icsr", "mprd", "glc", "purification"))) for m in methods if m in runs.method_names()]
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(blocks))
    assert main(["batch", "--file", str(file), "--root", str(root), "--device", "cpu", "--jobs", "2"]) == 0
    manifests = [json.loads(p.read_text()) for p in folder.glob("*/manifest.json")]
    assert sorted(m["parameters"]["method"] for m in manifests) == sorted(b["methods"] for b in blocks)
    assert all(m["status"] == "done" and m["metrics"]["mAP"] > 0 for m in manifests)
    assert {m["settings"]["distance"] for m in manifests} == {"jaccard", "camera"}


@contextmanager
def dask_processes(folder):
    "A scheduler and one worker, each a process of its own."
    file, command = folder / "scheduler.json", [sys.executable, "-m"]
    scheduler = subprocess.Popen([*command, "distributed.cli.dask_scheduler", "--no-dashboard", "--host", "127.0.0.1", "--port", "0",
                                  "--scheduler-file", str(file)], stderr=subprocess.DEVNULL)
    worker = subprocess.Popen([*command, "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard"],
                              stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until: time.sleep(0.2)
        yield json.loads(file.read_text())["address"], (scheduler, worker)
    finally:
        for p in (scheduler, worker):
            p.kill()
            p.wait()


def test_a_worker_lost_together_with_the_scheduler(folder, root, tmp_path):
    "The batch stops and says so; its runs are let go, and another start goes on with them."
    pytest.importorskip("distributed")
    planned = batch.plan_batch(batch.grid(["synthetic-tiny"], ["baseline"], settings=SHORT), root, "cpu")
    with dask_processes(tmp_path) as (address, both), batch.workers(address) as client:
        client.wait_for_workers(1, timeout=60)
        def unlucky(_):
            if lines(planned[0].out):
                for p in both: p.kill()
        with pytest.raises(ConnectionError, match="scheduler is gone"): batch.run_dask(planned, client, unlucky, pause=0.1)
    assert planned[0].state == "waiting" and not checkpoints.in_use(planned[0].out, "notebook")
    batch.run_local(planned, batch.slots(1, device="cpu"))
    manifest = json.loads((planned[0].out / "manifest.json").read_text())
    assert planned[0].state == "done" and manifest["resumed_after"] >= 1 and lines(planned[0].out) == 3


def test_workers_of_a_queueing_system(tmp_path, monkeypatch):
    "A pretended Slurm runs the job script that dask-jobqueue submits; one worker comes and works."
    pytest.importorskip("dask_jobqueue")
    import dask
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in (("sbatch", f'cp "$1" {tmp_path}/job.sh; setsid bash {tmp_path}/job.sh > {tmp_path}/job.log 2>&1 & echo $! > {tmp_path}/pid; echo "Submitted batch job 1"'), ("scancel", ":")):
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    with dask.config.set({"jobqueue.slurm": dask.config.get("jobqueue.slurm", {}) | {"cores": 1, "memory": "2GB", "queue": "gpu", "walltime": "01:00:00",
                          "worker-extra-args": ["--resources", "GPU=1"], "log-directory": str(tmp_path),
                          "scheduler-options": {"dashboard_address": ":0"}}}):  # any free port: other tests have schedulers too
        with batch.workers(cluster="slurm", jobs=1) as client:
            client.wait_for_workers(1, timeout=60)
            assert client.submit(sum, [1, 2], resources={"GPU": 1}).result(timeout=30) == 3
    assert "#SBATCH -p gpu" in (tmp_path / "job.sh").read_text()


def test_no_scheduler_no_dask_wrong_file(tmp_path, root, capsys):
    words = f"batch --datasets synthetic-tiny --methods baseline --root {root}".split()
    assert main([*words, "--scheduler", "tcp://127.0.0.1:9"]) == 2 and "no Dask scheduler answers" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text("datasets: [a]\nmethod: b\n")
    assert main(["batch", "--file", str(tmp_path / "wrong.yaml")]) == 2 and "expected datasets and methods" in capsys.readouterr().err
    assert main(["batch", "--file", str(tmp_path / "none.yaml")]) == 2
    assert main(["batch", "--datasets", "synthetic-tiny"]) == 2
    assert main([*words, "--methods", "basline,baseline", "-p", "epoch=3"]) == 2
    said = capsys.readouterr().err
    assert "unknown method 'basline'" in said and "unknown setting 'epoch'" in said  # all of it at once


def test_the_same_run_twice_is_one_run(root):
    assert len(batch.plan_batch(batch.grid(["synthetic-tiny"], ["baseline"], [1, 1, 2]), root, "cpu")) == 2


def test_settings_travel_through_the_command_line(root):
    from reidbook.settings import parse_settings
    settings = {"lr": 1e-05, "prefer_other_cameras": False, "start": "histogram", "epochs": 2}
    [run] = batch.plan_batch(batch.grid(["synthetic-tiny"], ["baseline"], settings=settings), root, "cpu")
    assert parse_settings([b for a, b in zip(run.words, run.words[1:]) if a == "-p"]) == settings


def test_one_run_per_gpu_or_group_of_gpus(monkeypatch):
    monkeypatch.setattr(batch.torch.cuda, "device_count", lambda: 4)
    gpus = lambda *words: [e["CUDA_VISIBLE_DEVICES"] for e in batch.slots(*words)]
    assert gpus() == ["0", "1", "2", "3"] and gpus(2) == ["0", "1"] and gpus(None, 2) == ["0,1", "2,3"] and gpus(8)[4:] == ["0", "1", "2", "3"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert batch.slots(2, 1, "cpu") == [{"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}] * 2
