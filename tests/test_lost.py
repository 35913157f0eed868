"What changes or is lost between two starts of a run: processes, threads, stages, room, images, workers."
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reidbook import runs, training
from reidbook.data import open_dataset
from reidbook.methods import glc, icsr
from reidbook.methods.baseline import Baseline

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
from reidbook.data import open_dataset
from reidbook.methods import glc, icsr
from reidbook.methods.baseline import Baseline
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


# a kill inside a stage and inside a restart

def kill(): os.kill(os.getpid(), signal.SIGKILL)


def dies(owner, name, at):
    "From now on the process is killed when this function is called and `at(*its arguments)` holds."
    real = getattr(owner, name)
    def f(*args, **more):
        if at(*args, **more): kill()
        return real(*args, **more)
    setattr(owner, name, f)


def second():
    "True at the second call."
    calls = itertools.count(1)
    return lambda *args, **more: next(calls) == 2


def batch_of(epoch):
    "Is a loss that of the second batch of this epoch (from 0)?"
    calls = itertools.count(1)
    return lambda method, t, batch: t.epoch == epoch and next(calls) == 2


def renamed_to(name, inside=""): return lambda a, b: Path(b).name == name and inside in str(b)


# in the order of a run: each start dies at the next place
PLACES = {
    "glc": {
        "in the correction of the restart": lambda: dies(glc, "correction", lambda *args, seed, **more: seed == 1001),
        "between its labels and the fresh network": lambda: dies(training, "fresh_network", second()),
        "in the first epoch of the fresh network": lambda: dies(Baseline, "loss", batch_of(1)),
        "while that epoch is saved": lambda: dies(os, "replace", renamed_to("checkpoint.pt")),
        "in an epoch of frozen labels": lambda: dies(Baseline, "loss", batch_of(2))},
    "icsr": {
        "in the second epoch of the first camera": lambda: dies(Baseline, "loss", batch_of(1)),
        "while that epoch is saved": lambda: dies(os, "replace", renamed_to("checkpoint.pt", "camera0")),
        "between the checksum of a camera and its labels": lambda: dies(os, "replace", renamed_to("result.pt")),
        "between the labels of a camera and its time": lambda: dies(os, "replace", renamed_to("time.json")),
        "in the second camera": lambda: dies(Baseline, "loss", batch_of(0)),
        "in the first epoch on all labels": lambda: dies(icsr, "refine_labels", lambda *args: True)}}
SETTINGS = {"glc": dict(epochs=3, iterations=3, eval_every=3, glc_restart=1, glc_freeze=1, glc_subgraphs=[4, 2], glc_steps=20, glc_width=16),
            "icsr": dict(epochs=2, iterations=3, eval_every=2, camera_epochs=2, camera_iterations=3)}


def child(root, out, name, place=None):
    "A child's whole life; it dies at `place`."
    torch.set_num_threads(1)  # as in conftest: the number of threads is part of the arithmetic
    if place: PLACES[name][place]()
    method = {"glc": glc.METHOD, "icsr": icsr.METHOD}[name]
    settings = training.resolve(method, "synthetic-tiny", **SETTINGS[name])
    t = training.start(open_dataset("synthetic-tiny", root), method, settings, out=out, device="cpu", cache=root / ".cache", store=out / "stages")
    for _ in training.epochs(t): pass


@pytest.fixture(scope="module")
def children():
    "Children that begin with everything imported and nothing computed."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reidbook.runs", "reidbook.methods.glc", "reidbook.methods.icsr", "faiss", "sklearn.cluster"])
    return context


@pytest.mark.parametrize("name", PLACES)
def test_killed_at_every_place_of_a_stage_and_of_a_restart(root, tmp_path, children, name):
    "Each start is killed at the next place of the run; the last one ends, with the numbers and the stages of an undisturbed run."
    def live(out, place=None):
        process = children.Process(target=child, args=(root, out, name, place))
        process.start(); process.join()
        return process.exitcode
    for place in PLACES[name]: assert live(tmp_path / "killed", place) == -signal.SIGKILL, place
    assert live(tmp_path / "killed") == live(tmp_path / "whole") == 0
    killed, whole = (without_times(on_disk(tmp_path / x)) for x in ("killed", "whole"))
    assert killed == whole
    labels = [[torch.load(f)["labels"].tolist() for f in sorted((tmp_path / x).glob("stages/*/result.pt"))] for x in ("killed", "whole")]
    assert labels[0] == labels[1] and len(labels[0]) == {"glc": 0, "icsr": 4}[name]


# images that change

@pytest.fixture
def own(tmp_path):
    "A data set of one's own, a list of images; each is a colour, and none is seen by two cameras alike."
    from PIL import Image
    rng, rows = np.random.default_rng(0), ["path,pid,cam,split"]
    for split, pids in (("train", range(8)), ("query", range(8, 12)), ("gallery", range(8, 12))):
        for n, (pid, cam) in enumerate((pid, n % 2) for pid in pids for n in range(6)):
            pixels = np.clip(np.full((64, 32, 3), 20 * pid) + rng.integers(0, 15, (64, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{split}-{n}.bmp")
            rows.append(f"{split}-{n}.bmp,{pid},{cam},{split}")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    return tmp_path / "own.csv"


def begin_own(own, out): return runs.begin("csv", "baseline", 1, own, "cpu", out, SHORT | dict(height=64, width=32, backbone="small", weights="pretrained"))


def repaint(path, byte=7):
    "Other pixels, the same size."
    blob = bytearray(path.read_bytes())
    blob[-300:] = bytes([byte]) * 300
    path.write_bytes(blob)


@pytest.mark.parametrize("split", ["train", "query"])
def test_an_image_that_changes_while_a_run_trains(own, tmp_path, split):
    "The run does not call itself done, and cannot be gone on with, not even when the image is put back."
    run, image = begin_own(own, tmp_path / "run"), own.with_name(f"{split}-3.bmp")
    whole = image.read_bytes()
    steps = training.epochs(run.state)
    next(steps)
    repaint(image)
    list(steps)
    with pytest.raises(ValueError, match=f"^1 image.*changed while the run trained, first .*{image.name}.*--again"): runs.finish(run)
    assert runs.read_manifest(tmp_path / "run")["status"] == "running"
    image.write_bytes(whole)
    with pytest.raises(ValueError, match="were not always, those that .* began with.*--again"): begin_own(own, tmp_path / "run")
    runs.forget(tmp_path / "run")
    again = begin_own(own, tmp_path / "run")
    list(training.epochs(again.state))
    assert runs.finish(again)["status"] == "done"


def test_images_that_change_between_two_starts(own, tmp_path):
    "Refused by the next start; gone on with when they are put back, or have another time only. A done run says so too."
    out, image = tmp_path / "run", own.with_name("train-3.bmp")
    next(training.epochs(begin_own(own, out).state))
    whole = image.read_bytes()
    repaint(image)
    with pytest.raises(ValueError, match="the images of csv are not.*--again"): begin_own(own, out)
    image.write_bytes(whole)
    again = begin_own(own, out)
    assert again.state.epoch == 1
    os.utime(image)
    list(training.epochs(again.state))
    assert runs.finish(again)["status"] == "done"
    os.utime(image)
    begin_own(own, out)
    repaint(image)
    with pytest.raises(ValueError, match="the images of csv are not"): begin_own(own, out)


def test_images_that_vanish_while_a_run_trains(own, tmp_path):
    "A gallery image: the next test names it. A training image was read before, but the run is not called done."
    run = begin_own(own, tmp_path / "run")
    own.with_name("gallery-3.bmp").unlink()
    with pytest.raises(ValueError, match="1 of 24 images cannot be read.*\n.*gallery-3.bmp"): list(training.epochs(run.state))
    with pytest.raises(ValueError, match="1 image.*changed while the run trained, first .*gallery-3.bmp"): runs.finish(run)


def test_a_stage_of_other_images_is_not_found(own, tmp_path):
    "The same names and sizes, other pixels: a stage's result is made of pixels."
    def folders(out):
        run = runs.begin("csv", "icsr", 1, own, "cpu", out, dict(epochs=1, iterations=2, camera_epochs=1, camera_iterations=1, height=64, width=32,
                                                                 backbone="small", weights="pretrained", clustering="dbscan"))
        return {stage["made"] for stage in run.state.stages}
    assert folders(tmp_path / "one") == {True} and folders(tmp_path / "two") == {False}
    repaint(own.with_name("train-3.bmp"))
    assert folders(tmp_path / "three") == {True}


# a disk that is full

@pytest.fixture
def disk(tmp_path):
    "A disk of 12 MB that nobody else writes to."
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(place)], capture_output=True, text=True)
    if made.returncode: pytest.skip(f"a small disk needs root: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk):
    "Write until nothing more goes in."
    with open(disk / "other people's", "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True: f.write(bytes(1 << 12))


def test_the_disk_is_full_while_a_run_trains(root, disk, undisturbed):
    "The run stops in words and leaves its last epoch whole; it does not begin while there is no room, and goes on when there is."
    out = disk / "run"
    begin = lambda: runs.begin("synthetic-tiny", "baseline", 1, root, "cpu", out, SHORT)
    records = training.epochs(begin().state)
    next(records)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    fill(disk)
    with pytest.raises(OSError, match="No space left.*untouched. Make room .*start the run again"): list(records)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    with pytest.raises(OSError, match="No space left"): begin()
    (disk / "other people's").unlink()
    again = begin()
    list(training.epochs(again.state))
    assert without_times(again.state.history) == undisturbed and runs.finish(again)["status"] == "done"
