"A folder without labels trains from the shell; an exported network gives the same features or is not written."
import copy
import shutil

import numpy as np
import pytest
import torch

from reidbook import export, runs
from reidbook.cli import main
from reidbook.data import open_dataset
from reidbook.export import export_model, load_exported
from reidbook.models import create_model, extract_features

IMAGES = np.random.default_rng(1).integers(0, 256, (7, 3, 64, 32), np.uint8)


@pytest.fixture(scope="module")
def model():
    "A network whose batch norm has seen something, left in training mode."
    net, _ = create_model("small", parts=2)
    net.train()
    with torch.no_grad(): net(torch.randn(16, 3, 64, 32))
    return net


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_same_features_for_any_number_of_images(model, tmp_path, suffix):
    if suffix == ".onnx": pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    before = copy.deepcopy(model.state_dict())
    assert export_model(model, tmp_path / f"net{suffix}", (64, 32)) < 1e-5
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.requires_grad for p in model.backbone.parameters())
    run, want = load_exported(tmp_path / f"net{suffix}"), extract_features(model, IMAGES, device="cpu")
    for n in (1, 4, 7):
        g, p = run(IMAGES[:n])
        assert g.shape == (n, 128) and p.shape == (n, 2, 128) and g.dtype == np.float32
        assert np.abs(g - want.global_[:n]).max() < 1e-5 and np.abs(p - want.parts[:n]).max() < 1e-5
    assert [f.name for f in tmp_path.iterdir()] == [f"net{suffix}"]


def test_a_file_that_disagrees_is_not_written(tmp_path, monkeypatch):
    class Other(export.Embedder):
        def forward(self, images): return super().forward(images) + images.float().mean((1, 2, 3))[:, None] / 2550
    monkeypatch.setattr(export, "Embedder", Other)
    (tmp_path / "net.pt2").write_text("the old one")
    with pytest.raises(ValueError, match="features differ by"): export_model(create_model("small")[0], tmp_path / "net.pt2", (64, 32))
    assert (tmp_path / "net.pt2").read_text() == "the old one" and len(list(tmp_path.iterdir())) == 1


def test_refusals(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ends in .pt2 or .onnx"): export_model(model, tmp_path / "net.pth", (64, 32))
    with pytest.raises(FileNotFoundError, match="no exported network"): load_exported(tmp_path / "gone.onnx")
    def missing(*_): raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
    monkeypatch.setitem(export.WRITERS, ".onnx", missing)
    with pytest.raises(ValueError, match="pip install onnx"): export_model(model, tmp_path / "net.onnx", (64, 32))
    assert not list(tmp_path.iterdir())


def test_a_folder_runs_from_the_shell(root, tmp_path, monkeypatch, capsys):
    "Images without ids and cameras: executed notebook, manifest, checkpoint, and a ledger that still prints."
    monkeypatch.setattr(runs, "runs_dir", lambda: tmp_path / "runs")
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, path in enumerate(open_dataset("synthetic-tiny", root).train.path): shutil.copy(path, folder / f"{n:04d}.jpg")
    words = "backbone=small height=64 width=32 epochs=1 iterations=4 batch_size=32 instances=4 k1=12 k2=4 pad=4".split()
    command = ["run", "--dataset", "folder", "--root", str(folder), "--method", "baseline", *(w for p in words for w in ("-p", p))]
    assert main(command) == 0, capsys.readouterr().err
    [out] = (tmp_path / "runs").iterdir()
    assert {"run.ipynb", "manifest.json", "metrics.jsonl", "checkpoint.pt"} <= {p.name for p in out.iterdir()}
    assert runs.read_manifest(out)["metrics"].get("mAP") is None
    assert main(["ls"]) == 0 and "folder" in capsys.readouterr().out
    network, said = create_model("small", out / "checkpoint.pt")
    assert "whole network" in said and export_model(network, tmp_path / "net.pt2", (64, 32)) < 1e-5
