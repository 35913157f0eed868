"Backbones, heads and batch norm in groups, against real replicas; weights load whole or not at all."
import copy
import os
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from numpy.testing import assert_allclose

from reidbook.models import ReIDModel, create_model, extract_features, load_state, read_state, stripes


@pytest.mark.parametrize("parts", [0, 3])
def test_groups_are_data_parallel_replicas(parts):
    "Outputs, gradients and running statistics of 4 x 16 groups on one device equal 4 replicas fed 16 images each."
    torch.manual_seed(0)
    one = ReIDModel("small", parts=parts, bn_group_size=16).double()
    ungrouped = ReIDModel("small", parts=parts).double()
    ungrouped.load_state_dict(one.state_dict())
    replicas = [copy.deepcopy(ungrouped) for _ in range(4)]
    x = torch.randn(64, 3, 32, 16, dtype=torch.float64)
    join = lambda out: out[0] if out[1] is None else torch.cat([out[0], out[1].flatten(1)], 1)
    got = join(one(x))
    want = torch.cat([join(r(piece)) for r, piece in zip(replicas, x.chunk(4))])
    assert_allclose(got.detach(), want.detach(), atol=1e-10)
    got.square().sum().backward()
    want.square().sum().backward()
    for name, p in one.named_parameters():
        if p.grad is None: continue
        total = sum(dict(r.named_parameters())[name].grad for r in replicas)
        assert_allclose(p.grad, total, atol=1e-8, rtol=1e-6, err_msg=name)
    for (name, b), (_, first) in zip(one.named_buffers(), replicas[0].named_buffers()): assert_allclose(b, first, atol=1e-12, err_msg=name)


def test_uneven_batches_split_like_scatter():
    model = ReIDModel("small", bn_group_size=16)
    assert [len(c) for c in torch.zeros(33, 1).chunk(3)] == [11, 11, 11]
    assert torch.isfinite(model(torch.randn(33, 3, 32, 16))[0]).all()


def test_stripes_are_adaptive_pooling():
    for height in (7, 8, 16, 24):
        for parts in (1, 2, 3, 4):
            want = torch.nn.functional.adaptive_avg_pool2d(torch.arange(float(height)).view(1, 1, -1, 1), (parts, 1)).flatten()
            assert_allclose([np.arange(height)[s].mean() for s in stripes(height, parts)], want)


def test_imagenet_names_fit_the_trunk():
    "A torchvision checkpoint, classifier and all, loads into the trunk and gives torchvision's features (stride aside)."
    net = torchvision.models.resnet18(weights=None)
    model = ReIDModel("resnet18")
    load_state(model.backbone, net.state_dict())
    x = torch.randn(2, 3, 64, 32)
    trunk = torch.nn.Sequential(*list(net.children())[:-3]).eval()
    got = torch.nn.Sequential(*list(model.backbone.children())[:-1]).eval()
    assert_allclose(got(x).detach(), trunk(x).detach(), atol=1e-6)


def test_checkpoint_files(tmp_path):
    model = ReIDModel("small")
    state = model.backbone.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "best_mAP": 0.5}, tmp_path / "a.pth.tar")
    create_model("small", str(tmp_path / "a.pth.tar"))
    other = ReIDModel("resnet18").backbone.state_dict()
    torch.save(other, tmp_path / "b.pth")
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="missing.*Nothing was loaded"): load_state(model.backbone, read_state(tmp_path / "b.pth"))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.backbone.state_dict().values()))


def test_shipped_weights_load_and_say_so():
    _, said = create_model("small")
    assert "synthetic-source" in said


def test_extraction_leaves_the_mode_and_does_not_depend_on_the_block(tmp_path):
    model = ReIDModel("small", parts=2).train()
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 64, 32), dtype=np.uint8)
    a, b = extract_features(model, images, batch_size=3), extract_features(model, images, batch_size=10)
    assert model.training
    assert_allclose(a.global_, b.global_, atol=1e-5)
    assert_allclose(a.parts, b.parts, atol=1e-5)


def ibn_release(state):
    "A state dict with the names of IBN-Net's released ResNet-50-IBN-a, made from torchvision's: bn1 of stages 1 to 3 becomes bn1.IN and bn1.BN."
    out = {}
    for name, v in state.items():
        stage, *_, norm, what = ("stem." + name).split(".")[-4:] if name.count(".") < 3 else name.split(".")
        if stage not in ("layer1", "layer2", "layer3") or norm != "bn1": out[name] = v; continue
        stem, half = name.removesuffix(what), v.numel() // 2
        if what in ("weight", "bias"): out |= {f"{stem}IN.{what}": v[:half].clone(), f"{stem}BN.{what}": v[half:].clone()}
        else: out[f"{stem}BN.{what}"] = v[half:].clone() if v.ndim else v
    return out


def test_ibn_weights_load_whole_and_plain_ones_are_refused(tmp_path):
    torch.manual_seed(0)
    plain = torchvision.models.resnet50(weights=None).state_dict()
    ibn = ibn_release(plain)
    assert sum(k.endswith("bn1.IN.weight") for k in ibn) == 13
    torch.save({"state_dict": {f"module.{k}": v for k, v in ibn.items()}}, tmp_path / "resnet50_ibn_a.pth.tar")
    model, said = create_model("resnet50_ibn", str(tmp_path / "resnet50_ibn_a.pth.tar"))
    assert "resnet50_ibn_a.pth.tar" in said
    assert all(torch.equal(v, ibn[k]) for k, v in model.backbone.state_dict().items())
    torch.save(plain, tmp_path / "resnet50.pth")
    with pytest.raises(ValueError, match="bn1.IN.weight.*Nothing was loaded"): create_model("resnet50_ibn", str(tmp_path / "resnet50.pth"))
    with pytest.raises(ValueError, match="Nothing was loaded"): create_model("resnet50", str(tmp_path / "resnet50_ibn_a.pth.tar"))


def test_ibn_is_instance_norm_then_batch_norm():
    "Float64 recomputation of both halves, in training and evaluation, with groups."
    from reidbook.models import IBN, GroupedBatchNorm2d
    from functools import partial
    torch.manual_seed(0)
    ibn = IBN(6, partial(GroupedBatchNorm2d, group_size=4)).double()
    for p in ibn.parameters(): torch.nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(8, 6, 5, 3, dtype=torch.float64)
    a, b = x[:, :3], x[:, 3:]
    norm = lambda v, dims: (v - v.mean(dims, keepdim=True)) / (v.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    scale = lambda v, m: v * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)
    want = torch.cat([scale(norm(a, (2, 3)), ibn.IN), torch.cat([scale(norm(g, (0, 2, 3)), ibn.BN) for g in b.split(4)])], 1)
    assert_allclose(ibn(x).detach(), want.detach(), atol=1e-12)
    alone = ibn.eval()(x[:1])
    assert_allclose(alone.detach(), ibn(x)[:1].detach(), atol=1e-12)
    assert_allclose(alone[:, :3].detach(), want[:1, :3].detach(), atol=1e-12)


def test_released_names_of_cluster_contrast_and_kinds(tmp_path):
    "`base.N`, `feat_bn` and `gap` of a released ResNet load whole; an error says what a file holds."
    from reidbook.models import STAGES, kind_of
    net = ReIDModel("resnet18")
    number = {v: k for k, v in STAGES.items()}
    def released(k):
        head, *rest = k.split(".")
        if head == "backbone": return ".".join(["base", number[rest[0]], *rest[1:]])
        return ".".join([{"necks": "feat_bn", "pools": "gap"}[head], *rest[1:]])
    torch.save({"state_dict": {f"module.{released(k)}": v for k, v in net.state_dict().items()}, "best_mAP": np.float64(0.5)}, tmp_path / "model_best.pth.tar")
    model, said = create_model("resnet18", str(tmp_path / "model_best.pth.tar"))
    assert said.startswith("whole network") and all(torch.equal(v, net.state_dict()[k]) for k, v in model.state_dict().items())
    assert "instance norm" in kind_of({"layer1.0.bn1.IN.weight": 0}) and "no kind" in kind_of({"a": 0})


HARM = {"text": (lambda p: p.write_text("<html>Quota exceeded</html>"), "text, beginning '<html>"),
        "tensor": (lambda p: torch.save(torch.ones(2), p), "holds a Tensor without named tensors"),
        "list": (lambda p: torch.save([1, "a"], p), "holds a list without named tensors"),
        "numbers": (lambda p: torch.save({1: torch.ones(2), "epoch": 3}, p), "without named tensors"),
        "object": (lambda p: torch.save({"a": torch.ones(2), "b": print}, p), "may run code"),
        "empty": (lambda p: p.write_bytes(b""), "empty"),
        "half": (lambda p: halve(p), "cut short or damaged"),
        "archive": (lambda p: zip_a_word(p), "an archive of another kind"),
        "picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60)), "of another kind"),
        "pipe": (os.mkfifo, "a pipe"), "folder": (os.mkdir, "a folder"),
        "broken link": (lambda p: p.symlink_to("nowhere"), "a broken link")}


def halve(path):
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    os.truncate(path, path.stat().st_size // 2)


def zip_a_word(path):
    with zipfile.ZipFile(path, "w") as z: z.writestr("word", "hello")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("harm", HARM)
def test_what_is_no_weights_file_is_named(tmp_path, harm, suffix):
    "In one line: what it is and what was expected, never advice to read it with code; none hangs."
    make, found = HARM[harm]
    path = tmp_path / f"w{suffix}"
    make(path)
    with pytest.raises(ValueError) as e: read_state(path)
    said = str(e.value)
    assert str(path) in said and "expected" in said and "\n" not in said
    assert "weights_only" not in said
    if suffix == ".pth" or not path.is_file(): assert found in said


def test_imagenet_weights_that_are_a_page_of_text_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_text("<html>")
    with pytest.raises(ValueError, match="resnet18-f37072fd.pth is text, beginning '<html>'"):
        create_model("resnet18")
