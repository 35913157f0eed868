"Backbones from torchvision, timm, pip and files: their start, their grouped batch norms, refusals, and a whole run."
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from reidbook import backbones, cli, runs, training
from reidbook.data import open_dataset
from reidbook.images import load_images
from reidbook.methods.baseline import Baseline
from reidbook.models import create_model, extract_features

OWN = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU()), 8

def grouped(norm_layer):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), norm_layer(8), nn.ReLU()), 8

def narrow(): return network()[0], 9

def one(): return network()[0]
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_lite0_starts_from_imagenet_offline():
    model, line = create_model("lite0")
    assert "ImageNet" in line and "57934424" in line
    state = backbones.lite0_state()
    assert torch.equal(model.backbone.net.conv_head.weight, state["conv_head.weight"])
    untrained, said = create_model("lite0", "none")
    assert "random" in said and not torch.equal(untrained.backbone.net.conv_head.weight, state["conv_head.weight"])


def test_lite0_receives_pixels_as_it_was_trained_on():
    "(x - 127) / 128, whatever our own normalisation is."
    model, _ = create_model("lite0", "none")
    seen = []
    model.backbone.net.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 32), dtype=np.uint8)
    extract_features(model, pixels, device="cpu")
    assert torch.allclose(seen[-1], (torch.from_numpy(pixels).float() - 127) / 128, atol=1e-4)


def test_another_file_of_weights_is_refused(monkeypatch, tmp_path):
    (tmp_path / "fake_package").mkdir()
    (tmp_path / "fake_package" / "__init__.py").write_text("")
    (tmp_path / "fake_package" / "weights.pth").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backbones, "LITE0", ("fake_package", "weights.pth", backbones.LITE0[2]))
    with pytest.raises(ValueError, match="expected sha256 57934424"): create_model("lite0")
    monkeypatch.setattr(backbones, "LITE0", ("no_such_package", "weights.pth", ""))
    with pytest.raises(FileNotFoundError, match=r"reidbook\[photos\]"): create_model("lite0")


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install 'reidbook\[photos\]'"): training.resolve(Baseline, "market1501", backbone="lite0")


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:resnet18", "timm:tf_efficientnet_lite0"])
def test_stride_16_and_all_batch_norms_in_groups(name):
    model, _ = create_model(name, "none", bn_group_size=4)
    assert model.backbone.eval()(torch.zeros(1, 3, 128, 64)).shape[2:] == (8, 4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and {m.group_size for m in norms} == {4}


def test_groups_are_replicas_that_see_their_quarter():
    "A timm norm with an activation inside, against four copies."
    model, _ = create_model("timm:tf_efficientnet_lite0", "none", bn_group_size=4, seed=3)
    copies = [create_model("timm:tf_efficientnet_lite0", "none", seed=3)[0] for _ in range(2)]
    x = torch.randn(8, 3, 64, 32)
    want = torch.cat([copy.train().backbone(half) for copy, half in zip(copies, x.chunk(2))])
    torch.testing.assert_close(model.train().backbone(x), want, atol=1e-4, rtol=1e-4)
    ours, theirs = model.backbone.net.bn1, copies[0].backbone.net.bn1
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_network_with_branches_of_several_sizes_keeps_its_strides():
    backbones.parse("timm:hrnet_w18_small")


def test_state_goes_to_a_file_and_back(tmp_path):
    model, _ = create_model("torchvision:shufflenet_v2_x0_5", "none", seed=1)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    again, line = create_model("torchvision:shufflenet_v2_x0_5", str(tmp_path / "whole.pth"), seed=2)
    assert line.startswith("whole network") and torch.equal(again.necks[0].weight, model.necks[0].weight)
    theirs = {f"module.{k}": v for k, v in model.backbone.net.state_dict().items()} | {"fc.weight": torch.zeros(3, 3)}
    torch.save(theirs, tmp_path / "theirs.pth")
    again, line = create_model("torchvision:shufflenet_v2_x0_5", str(tmp_path / "theirs.pth"), seed=2)
    assert line == "weights from theirs.pth"
    assert torch.equal(again.backbone.net.conv1[0].weight, model.backbone.net.conv1[0].weight)


@pytest.mark.parametrize("classifier", ["_fc", "head", "heads", "classifier"])
def test_leftover_classifiers_of_any_spelling(tmp_path, classifier):
    model, _ = create_model("small", "none", seed=1)
    torch.save(model.backbone.state_dict() | {f"{classifier}.weight": torch.zeros(3, 128)}, tmp_path / "w.pth")
    assert create_model("small", str(tmp_path / "w.pth"))[1] == "weights from w.pth"


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    def offline(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="mobilenet_v2-.*pass weights=FILE"): create_model("torchvision:mobilenet_v2")


@pytest.mark.parametrize("name, said", [
    ("keras:vgg", "expected lite0, torchvision:NAME"), ("torchvision:resnet19", "no such network"), ("timm:nothing", "no such network"),
    ("torchvision:vit_b_16", "expected a map"), ("OWN:net", "it has network, grouped, narrow, one"),
    ("OWN:narrow", "says 9 channels, its map has 8"), ("OWN:one", "returned Sequential")])
def test_refused_before_anything_is_written(own, tmp_path, monkeypatch, capsys, root, name, said):
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    words = ["run", "--dataset", "synthetic-tiny", "--root", str(root), "--backbone", name.replace("OWN", str(own))]
    assert cli.main(words) != 0
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err and not (tmp_path / "runs").exists()


def test_an_error_in_the_file_is_told_with_its_line(tmp_path):
    for n, (text, line) in enumerate([("x = 1\ny = (\n", 2), ("def f():\n    return 1 / 0\n\nf()\n", 2)]):
        path = tmp_path / f"broken{n}.py"
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"broken{n}.py, line {line}: "): backbones.parse(f"{path}:network")


def test_the_file_is_part_of_the_run(own, root):
    "Its content and the function count; where it lies does not."
    def run_id(path, function): return runs.describe("synthetic-tiny", "baseline", root=root, settings={"backbone": f"{path}:{function}"}).run_id
    first = run_id(own, "network")
    (own.parent / "elsewhere").mkdir()
    copy = own.parent / "elsewhere" / "own.py"
    copy.write_text(OWN)
    assert run_id(copy, "network") == first != run_id(own, "grouped")
    copy.write_text(OWN + "\n# changed")
    assert run_id(copy, "network") != first


def test_a_backbone_with_norm_layer_and_one_without_train_alike(own, root):
    tiny = open_dataset("synthetic-tiny", root)
    images = load_images(tiny.train.path, (64, 32))
    def trained(function):
        s = training.resolve(Baseline, tiny.name, backbone=f"{own}:{function}", start="histogram", epochs=1, iterations=2, eval_every=9)
        t = training.start(tiny, Baseline, s, seed=1, images=images)
        return list(training.epochs(t))[-1]["loss"]
    np.testing.assert_allclose(trained("network"), trained("grouped"), rtol=1e-4)


def test_a_folder_of_crops_trains_from_imagenet(root, tmp_path, monkeypatch, capsys):
    "`reidbook run --dataset folder --backbone lite0`, offline, two epochs."
    monkeypatch.setenv("REIDBOOK_RUNS", str(tmp_path / "runs"))
    tiny = open_dataset("synthetic-tiny", root)
    crops = tmp_path / "data" / "folder"
    crops.mkdir(parents=True)
    for path in tiny.train.path[:96]: shutil.copy(path, crops)
    words = f"run --dataset folder --root {tmp_path / 'data'} --backbone lite0 -p height=64 -p width=32 -p epochs=2"
    more = "-p iterations=2 -p batch_size=16 -p instances=4 -p bn_group_size=16 -p k1=8 -p k2=3"
    assert cli.main(f"{words} {more}".split()) == 0, capsys.readouterr().err
    [out] = (tmp_path / "runs").glob("folder-*")
    manifest = runs.read_manifest(out)
    assert manifest["status"] == "done" and "efficientnet_lite0" in json.dumps(manifest)
