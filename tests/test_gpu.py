"The script of the GPU day, rehearsed on the CPU: nothing here says anything about a GPU."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DAY = Path(__file__).parent / "gpu" / "day.py"


def day(*words, root):
    "Run the script on the CPU, with data of its own and one thread."
    own = {"REIDBOOK_DATA": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, DAY, *words], env=os.environ | own, capture_output=True, text=True)


def test_quick_form_measures_each_part_once(root, tmp_path):
    out = tmp_path / "gpu.json"
    first = day("--quick", "--device", "cpu", "--out", out, root=root)
    assert first.returncode == 0 and "Traceback" not in first.stderr, first.stderr
    parts = json.loads(out.read_text())["parts"]
    assert [name.split()[0] for name in parts] == ["labels", "scoring", "features", "training"]
    assert parts["labels 2,000"]["other_labels"] == 0 and parts["training"]["times"] > 0
    before = out.read_bytes()
    assert day("--quick", "--device", "cpu", "--out", out, root=root).stdout == ""  # all is there
    assert out.read_bytes() == before


def test_figures_of_two_machines_are_not_mixed(root, tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"machine": {"gpu": "another", "cores": 3}, "parts": {}}))
    refused = day("--quick", "--device", "cpu", "--out", out, root=root)
    assert refused.returncode and "another machine" in refused.stderr


def test_without_a_gpu_the_day_says_so(root):
    refused = day("--device", "cpu", root=root)
    assert refused.returncode and "no GPU" in refused.stderr


@pytest.fixture
def truths(monkeypatch):
    monkeypatch.setenv("REIDBOOK_GPU_TRUTHS", "cpu")
    monkeypatch.syspath_prepend(str(DAY.parent))
    import truths
    return truths


def test_a_truth_finds_a_difference(truths, monkeypatch):
    "Equal on equal devices, and not when one of the two searches is wrong."
    assert truths.search_ties() == truths.search_features() == 0
    right, calls = truths.neighbors.knn, []
    def wrong(x, k, device):
        calls.append(device)
        sims, index = right(x, k, device=device)
        return (sims, index) if len(calls) % 2 else (sims, index[::-1])
    monkeypatch.setattr(truths.neighbors, "knn", wrong)
    assert truths.search_ties() > 0.5 and truths.search_features() > 0.1


def test_steps_start_from_the_features_that_were_kept(truths):
    known = []
    first = truths.first_epoch("baseline", "cpu", known)
    assert known and truths.first_epoch("baseline", "cpu", list(known)) == first
