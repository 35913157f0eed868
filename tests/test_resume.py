"What survives a kill, a full disk, a damaged file, a second process: everything, with the same numbers."
import json
import multiprocessing
import os
import random
import resource
import signal
from pathlib import Path
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reidbook import checkpoints, training
from reidbook.data import open_dataset
from reidbook.methods.baseline import Baseline

SHORT = dict(epochs=4, iterations=3, batch_size=16, eval_every=2)


def records(history): return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in history]


def on_disk(out): return records([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])


def begin(root, out, **settings):
    data = open_dataset("synthetic-tiny", root)
    return training.start(data, Baseline, training.resolve(Baseline, data.name, **SHORT | settings), out=out, cache=root / ".cache", device="cpu")


def train(root, out, fatal=None, ready=None):
    "A child's whole life; `fatal` is the number of the file operation at which the power fails."
    torch.set_num_threads(1)  # as in conftest: the number of threads is part of the arithmetic
    left = [fatal]
    def dies_at_last(real):
        def f(*args, **more):
            if left[0] is not None:
                if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return real(*args, **more)
        return f
    os.replace, os.fsync = dies_at_last(os.replace), dies_at_last(os.fsync)
    t = begin(root, out)
    if ready: ready.set()
    for _ in training.epochs(t): pass


@pytest.fixture(scope="module")
def children():
    "Children that begin with everything imported and nothing computed."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reidbook.training", "reidbook.methods.baseline", "faiss", "sklearn.cluster"])
    return context


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory, children):
    "Records of a run that nobody disturbed, and what its training takes when nothing slows it."
    out = tmp_path_factory.mktemp("whole")
    child = children.Process(target=train, args=(root, out))
    child.start(); child.join()
    assert child.exitcode == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [sum(r.get(name, 0) for name in training.LAPS) for r in rows]
    return on_disk(out), len(rows) * min(seconds)  # the first child also compiles


def test_killed_at_random_moments(root, tmp_path, children, undisturbed):
    "Every start but the last is killed, somewhere in the first third of what a whole run takes: in labels, batches, a test, or a file."
    whole, seconds = undisturbed
    rng, kills = random.Random(0), 0
    for start in range(9):
        ready = children.Event()
        child = children.Process(target=train, args=(root, tmp_path, None, ready))
        child.start()
        ready.wait(60)
        child.join(rng.uniform(0, 0.35) * seconds if start < 8 else None)
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL); kills += 1
        child.join()
        if child.exitcode == 0: break
    assert child.exitcode == 0 and kills >= 3
    assert on_disk(tmp_path) == whole


def test_killed_at_every_file_operation(root, tmp_path, children, undisturbed):
    "Of the first epoch that is saved over another one: each sync and each rename, one start each."
    for fatal in (*range(9), None):
        child = children.Process(target=train, args=(root, tmp_path, fatal))
        child.start(); child.join()
        if child.exitcode == 0: break
        assert child.exitcode == -signal.SIGKILL
    assert fatal is None or fatal > 3
    assert on_disk(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("harm", [lambda p: os.truncate(p, p.stat().st_size // 2), lambda p: p.write_bytes(b""), lambda p: flip_a_byte(p), lambda p: p.unlink()],
                         ids=["half", "empty", "one byte", "gone"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(root, tmp_path, undisturbed, harm):
    t = begin(root, tmp_path)
    for r in training.epochs(t):
        if r["epoch"] == 2: break
    harm(tmp_path / "checkpoint.pt")
    if (tmp_path / "checkpoint.pt").exists():
        with pytest.warns(UserWarning, match="damaged .* going on from previous.pt, after epoch 1"): t = begin(root, tmp_path)
    else: t = begin(root, tmp_path)
    assert t.epoch == 1
    for r in training.epochs(t):
        if r["epoch"] == 3: break
    assert records(t.history) == undisturbed[0][:3] == on_disk(tmp_path)


def flip_a_byte(path):
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1); f.write(bytes([byte ^ 1]))


def test_two_damaged_checkpoints_are_named(root, tmp_path):
    for name in checkpoints.CHECKPOINTS: (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged.*previous.pt is damaged.*remove"): begin(root, tmp_path)


@pytest.mark.parametrize("other, words", [(torch.zeros(3), "it holds no epoch, "), ({"epoch": 3}, "it holds no history, ")])
def test_a_checkpoint_of_another_kind_falls_back_to_the_one_before(root, tmp_path, other, words):
    t = begin(root, tmp_path)
    for r in training.epochs(t):
        if r["epoch"] == 2: break
    torch.save(other, tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match=f"damaged .{words}.*going on from previous.pt, after epoch 1"): t = begin(root, tmp_path)
    assert t.epoch == 1


@pytest.mark.parametrize("make, words", [(os.mkfifo, "a pipe"), (os.mkdir, "a folder")])
def test_what_is_no_file_is_no_checkpoint(root, tmp_path, make, words):
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"checkpoint.pt is {words}.*remove it"): begin(root, tmp_path)


def test_a_checkpoint_with_labels_of_other_data_is_refused(root, tmp_path):
    t = begin(root, tmp_path)
    next(iter(training.epochs(t)))
    blob = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(blob | {"labels": blob["labels"][:-1]}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="labels, the data set .* images: it is of other data"): begin(root, tmp_path)


def kept_stage(folder, made, value=1.0):
    "A stage that is one tensor; `made` counts how often it was made."
    def make(folder):
        made.append(folder)
        return {"x": torch.full((64,), value)}
    t = SimpleNamespace(store=folder, dataset=SimpleNamespace(name="toy"), seed=1, identity={}, stages=[])
    return training.stage(t, "toy", {}, make)


@pytest.mark.parametrize("harm", [lambda p: flip_a_byte(p), lambda p: os.truncate(p, 10), lambda p: p.write_bytes(b"text"),
                                  lambda p: checkpoints.checksum_of(p).unlink()], ids=["one byte", "short", "text", "no checksum"])
def test_a_damaged_stage_is_named_and_made_again(tmp_path, harm):
    made = []
    for _ in range(2): kept_stage(tmp_path, made)
    [result] = tmp_path.glob("toy-*/result.pt")
    assert len(made) == 1
    harm(result)
    with pytest.warns(UserWarning, match="result.pt is not what was written"): again = kept_stage(tmp_path, made)
    assert len(made) == 2 and again["x"].eq(1).all()
    kept_stage(tmp_path, made)
    assert len(made) == 2


def test_a_planted_link_is_not_followed(tmp_path):
    "Nobody can tell beforehand what the temporary file is called."
    (tmp_path / "precious").write_bytes(b"mine")
    for name in ("manifest.tmp", "next.tmp"): (tmp_path / name).symlink_to(tmp_path / "precious")
    for name in ("manifest.json", "next.pt"): checkpoints.write_whole(tmp_path / name, b"theirs")
    assert (tmp_path / "precious").read_bytes() == b"mine"


@contextmanager
def full_disk(limit):
    "No file may grow beyond `limit` bytes: writing fails as it does on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_one_epoch_and_says_so(root, tmp_path, undisturbed):
    t = begin(root, tmp_path)
    steps = training.epochs(t)
    next(steps); next(steps)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(100_000), pytest.raises(OSError, match="untouched. Make room"): next(steps)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    t = begin(root, tmp_path)
    assert t.epoch == 2
    next(training.epochs(t))
    assert records(t.history) == undisturbed[0][:3]


@contextmanager
def as_nobody():
    "Root may write anywhere: be somebody else for a moment."
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


def test_a_read_only_folder_is_refused_at_once(root):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: nobody may not look into root's
        os.chmod(folder, 0o555)
        with as_nobody(), pytest.raises(PermissionError, match="cannot be written to .*give write access"): checkpoints.hold(f"{folder}/run")
        os.chmod(folder, 0o755)


def keep(folder, ready):
    checkpoints.hold(folder)
    ready.set()
    time.sleep(60)


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken(tmp_path, children):
    ready = children.Event()
    child = children.Process(target=keep, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30) and checkpoints.in_use(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {child.pid} on "): checkpoints.hold(tmp_path)
    os.kill(child.pid, signal.SIGKILL); child.join()
    assert not checkpoints.in_use(tmp_path)
    checkpoints.hold(tmp_path)
    checkpoints.release(tmp_path)


def test_a_stage_is_made_by_one_of_two_runs(root, tmp_path, children):
    made = tmp_path / "made"
    pair = [children.Process(target=make_stage, args=(root, tmp_path, made)) for _ in range(2)]
    for p in pair: p.start()
    for p in pair: p.join()
    assert [p.exitcode for p in pair] == [0, 0] and made.read_text() == "made\n"


def make_stage(root, folder, made):
    from types import SimpleNamespace
    t = SimpleNamespace(store=folder / "stages", dataset=SimpleNamespace(name="d"), seed=1, identity={}, stages=[])
    def make(where):
        time.sleep(1)
        with open(made, "a") as f: f.write("made\n")
        return {"x": torch.ones(1)}
    assert training.stage(t, "teacher", {}, make)["x"].item() == 1


def test_memory_is_flat_over_epochs(root):
    "Resident memory of later epochs is that of earlier ones; one kept checkpoint, batch or set of features an epoch would be twice the limit."
    if not os.path.exists("/proc/self/statm"): pytest.skip("needs /proc")
    used = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    seen = [used() for _ in training.epochs(begin(root, None, epochs=22, iterations=1, eval_every=22))]
    assert np.median(seen[14:]) - np.median(seen[4:12]) < 8, seen
