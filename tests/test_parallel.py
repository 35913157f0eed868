"Two processes train as one: same samples, same labels, same losses up to rounding; and end together."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reidbook import parallel, runs

SHORT = dict(epochs=2, iterations=5, precision="float32")


def test_a_run_of_two_processes_equals_one(tmp_path, root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path))
    one = runs.begin("synthetic-tiny", "baseline", 1, root, "cpu", tmp_path / "one", SHORT)
    list(runs.training.epochs(one.state))
    script = f"""
import json, sys
from reidbook import runs, training
run = runs.begin("synthetic-tiny", "baseline", 1, {str(root)!r}, "cpu", {str(tmp_path / "two")!r}, {SHORT!r}, 2)
for r in training.epochs(run.state): pass
training.test(run.state)  # between epochs and after them the first process is alone
runs.finish(run)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)
    a, b = (json.loads((tmp_path / x / "manifest.json").read_text()) for x in ("one", "two"))
    assert b["processes"] == 2 and b["status"] == "done" and a["name"] == b["name"]
    lines = [[json.loads(line) for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()] for x in ("one", "two")]
    for x, y in zip(*lines):
        assert {k: x[k] for k in ("epoch", "clusters", "outliers", "label_pairwise_f")} == {k: y[k] for k in ("epoch", "clusters", "outliers", "label_pairwise_f")}
        assert abs(x["loss"] - y["loss"]) < 1e-3 * x["loss"] and abs(x["mAP"] - y["mAP"]) < 0.02
    assert abs(lines[0][0]["loss"] - lines[1][0]["loss"]) < 1e-4 * lines[0][0]["loss"]
    import torch
    states = [torch.load(tmp_path / x / "checkpoint.pt", weights_only=True)["model"] for x in ("one", "two")]
    for name, x in states[0].items():
        assert x.shape == states[1][name].shape and torch.isfinite(states[1][name]).all()


@pytest.mark.parametrize("processes, words", [(0, "whole number"), (99, "share"), (True, "whole number")])
def test_too_many_processes_are_refused(processes, words):
    with pytest.raises(ValueError, match=words): parallel.check(processes, dict(batch_size=256, bn_group_size=64), "cpu")
    parallel.check(4, dict(batch_size=256, bn_group_size=64), "cpu")


def test_shares_cover_everything_once():
    for n in (1, 7, 64):
        for parts in (1, 2, 5):
            rows = np.concatenate([np.arange(n)[parallel.share(n, parts, part)] for part in range(parts)])
            assert rows.tolist() == list(range(n))


def test_bfloat16_inside_float32_outside():
    "The GPU's forward, tried on the CPU: outputs are float32, near those of float32, and a copy of the model runs on its own weights."
    import copy
    from functools import partial
    from types import SimpleNamespace
    import torch
    from reidbook.models import create_model
    from reidbook.training import run_network
    model, _ = create_model("small", parts=2)
    model.eval()
    x = torch.randn(4, 3, 64, 32)
    plain = model(x)
    model.forward = partial(run_network, model, SimpleNamespace(precision="bfloat16", bn_group_size=4))
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain))
    with torch.autocast("cpu", torch.bfloat16): inner = type(model).forward(model, x)[0].float()
    assert 0 < (inner - plain[0]).norm() / plain[0].norm() < 0.05
    other = copy.deepcopy(model)
    with torch.no_grad(): [p.zero_() for p in model.parameters()]
    assert torch.equal(other(x)[0], plain[0])


def test_a_child_ends_with_its_parent(tmp_path):
    script = """
import sys, time
from reidbook.parallel import leashed
p = leashed([sys.executable, "-c", "from reidbook.parallel import leash; leash(); import time; time.sleep(60)"])
print(p.pid, flush=True)
time.sleep(60)
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        child = int(parent.stdout.readline())
        import time
        time.sleep(4)  # the child has called leash
        parent.kill()
    for _ in range(50):
        time.sleep(0.1)
        try: os.kill(child, 0)
        except ProcessLookupError: return
        if Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z": return
    pytest.fail("the child lives on")
