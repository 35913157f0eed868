"Transformers against the reference vectors and timm; checkpoints with released names load whole or not at all; the loop runs on them."
import argparse
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from reidbook import training, vit
from reidbook.data import open_dataset
from reidbook.models import create_model, extract_features

TINY = dict(width=48, depth=2, heads=3, patch=16, grid=(4, 2), drop_path=0.0)


@pytest.fixture
def g(golden): return {k: torch.as_tensor(v) if v.dtype.kind in "fi" else v for k, v in golden("pass_vit").items()}


@pytest.fixture
def sizes(monkeypatch): monkeypatch.setitem(vit.SIZES, "golden", TINY)


def weights(g, prefix): return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}


def as_released(net):
    "Tensors of a `ViT` under the names of PASS (with part tokens) or TransReID-SSL."
    s = {k: v.clone() for k, v in net.state_dict().items()}
    tokens, pos, table = s.pop("tokens"), s.pop("token_pos"), s.pop("pos_embed")
    s["cls_token"] = tokens[:, :1]
    if tokens.shape[1] == 1: return s | {"pos_embed": torch.cat([pos, table], 1)}
    for i in (1, 2, 3): s |= {f"part_token{i}": tokens[:, i:i + 1], f"part{i}_pos": pos[:, i:i + 1]}
    return s | {"cls_pos": pos[:, :1], "pos_embed": table}


@pytest.mark.parametrize("how", ["cat", "mean"])
@pytest.mark.parametrize("necks", ["single", "multi"])
def test_pass_tokens_and_fusions(g, sizes, how, necks):
    name = "vit_golden_pass" + ("_mean" if how == "mean" else "") + ("_multi" if necks == "multi" else "")
    net = vit.Network(name)
    net.backbone.load_state_dict(vit.our_names(weights(g, "vit_w_")))
    tokens = net.backbone(g["vit_img"])
    assert_allclose(tokens.detach(), g["vit_tokens"], atol=1e-5)
    for mode in ("train", "eval"):
        out = net.train(mode == "train").heads(tokens)[0] if mode == "train" else vit_eval(net, tokens)
        if necks == "single": out = F.normalize(out)
        assert_allclose(out.detach(), g[f"vit_{mode}_{how}_{necks}"], atol=1e-5)


def vit_eval(net, tokens):
    "Evaluation with fresh running statistics, as the reference had them."
    fresh = copy.deepcopy(net).eval()
    for m in fresh.modules():
        if isinstance(m, torch.nn.BatchNorm1d): m.reset_running_stats()
    return fresh.heads(tokens)[0]


def test_size_and_first_values(g):
    net = vit.Network("vit_small_pass", compat=True)
    assert sum(p.numel() for p in net.parameters()) == int(g["vit_small_param_count"])
    s = as_released(net.backbone)
    zero = {k for k in ("cls_token", "pos_embed", "cls_pos", *[f"part_token{i}" for i in (1, 2, 3)], *[f"part{i}_pos" for i in (1, 2, 3)]) if not s[k].any()}
    assert zero == set(g["vit_small_zero_init"].tolist())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_ibn_stem(g, mode):
    w = weights(g, "ics_w_")
    stem = vit.Patches(len(w["proj.bias"]), stem=True)
    stem.load_state_dict(w)
    assert_allclose(stem.train(mode == "train")(g["vit_img"][:2]).detach(), g[f"ics_{mode}"], atol=1e-5)


def test_positions(g):
    assert_allclose(vit.resize_positions(g["pos_in"], (24, 8)), g["pos_out"], atol=1e-6)
    assert vit.resize_positions(g["pos_in"], (16, 8)) is g["pos_in"]
    for n in range(1, 40): assert vit.grid_of(n * n) == (n, n) and vit.grid_of(2 * n * n) == (2 * n, n) and vit.grid_of(3 * n * n) == (3 * n, n)
    for rows in (129, 197, 24):
        with pytest.raises(ValueError, match="no grid"): vit.grid_of(rows)


def test_blocks_are_timms():
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    theirs, mine = timm.Block(48, 3, qkv_bias=True, norm_layer=lambda d, **k: torch.nn.LayerNorm(d, eps=1e-6)), vit.Block(48, 3)
    for p in theirs.parameters(): torch.nn.init.normal_(p, std=0.2)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 48)
    assert_allclose(mine(x).detach(), theirs(x).detach(), atol=1e-5)


def test_drop_path_skips_images_in_training_only():
    torch.manual_seed(0)
    block, x = vit.Block(12, 3, drop_path=0.5), torch.randn(400, 3, 12)
    same = (block(x) == x).all(2).all(1).float().mean()
    assert 0.15 < same < 0.35 and not (block.eval()(x) == x).all(2).any()


WRAPPINGS = {"raw": lambda s: s, "model": lambda s: {"model": s}, "ddp": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3, "best_mAP": np.float64(.5)},
             "base": lambda s: {"state_dict": {f"base.{k}": v for k, v in s.items()} | {"classifier.weight": torch.zeros(5, 96)}},
             "dino": lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()} | {"module.head.mlp.0.weight": torch.zeros(3, 3)}, "args": argparse.Namespace(lr=1)}}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("backbone", ["vit_tiny_pass", "vit_tiny", "vit_tiny_ics"])
def test_released_files_load_whole(tmp_path, backbone, wrapping):
    net = vit.Network(backbone)
    torch.save(WRAPPINGS[wrapping](as_released(net.backbone)), tmp_path / "a.pth")
    model, said = create_model(backbone, str(tmp_path / "a.pth"), seed=5)
    assert said == "weights from a.pth"
    for k, v in model.backbone.state_dict().items(): assert torch.equal(v, net.backbone.state_dict()[k]), k


def test_released_trained_networks_load_with_their_necks(tmp_path):
    "As GLC's and PASS's trained models: bottlenecks under the released names; another fusion's necks do not fit."
    for backbone, width in (("vit_tiny_pass", 192), ("vit_tiny_pass_mean", 96), ("vit_tiny_pass_multi", 96)):
        net = vit.Network(backbone)
        for neck in net.necks: torch.nn.init.uniform_(neck.running_mean); torch.nn.init.uniform_(neck.weight)
        necks = {f"{'bottleneck' if i == 0 else f'bottleneck_pt{i}'}.{k}": v for i, neck in enumerate(net.necks) for k, v in neck.state_dict().items()}
        torch.save({"state_dict": {f"module.{k}": v for k, v in (as_released(net.backbone) | necks).items()}, "best_mAP": np.float64(.9)}, tmp_path / f"{backbone}.pth.tar")
        model, said = create_model(backbone, str(tmp_path / f"{backbone}.pth.tar"))
        assert said.startswith("whole network")
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="necks.0.*Nothing was loaded"): create_model("vit_tiny_pass_mean", str(tmp_path / "vit_tiny_pass.pth.tar"))
    with pytest.raises(ValueError, match="necks.1.*Nothing was loaded"): create_model("vit_tiny_pass_mean", str(tmp_path / "vit_tiny_pass_multi.pth.tar"))


@pytest.mark.parametrize("file, backbone, says", [
    ("ssl", "vit_tiny_pass", "class token only"), ("pass", "vit_tiny", "PASS"), ("ics", "vit_tiny", "IBN stem"), ("ics", "vit_tiny_pass", "IBN stem"),
    ("resnet", "vit_tiny_pass", "ResNet of 18"), ("short", "vit_tiny_pass", "part_token3|tokens"), ("pass", "resnet18", "PASS")])
def test_the_wrong_kind_is_refused_and_nothing_is_changed(tmp_path, file, backbone, says):
    import torchvision
    make = {"ssl": lambda: as_released(vit.Network("vit_tiny").backbone), "pass": lambda: as_released(vit.Network("vit_tiny_pass").backbone),
            "ics": lambda: as_released(vit.Network("vit_tiny_ics").backbone), "resnet": lambda: torchvision.models.resnet18(weights=None).state_dict(),
            "short": lambda: {k: v for k, v in as_released(vit.Network("vit_tiny_pass").backbone).items() if k != "part_token3"}}
    torch.save(make[file](), tmp_path / "a.pth")
    model, _ = create_model(backbone, "none")
    before = copy.deepcopy(model.state_dict())
    from reidbook import models
    load = vit.load_pretrained if backbone.startswith("vit") else models.load_pretrained
    with pytest.raises(ValueError, match=says) as e: load(model, backbone, str(tmp_path / "a.pth"))
    assert "Nothing was loaded" in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_grid_is_resized_and_said(tmp_path):
    big = vit.ViT(96, 4, 3, patch=8, grid=(14, 14), parts=0)
    torch.save(as_released(big), tmp_path / "imagenet.pth")
    model, said = create_model("vit_tiny", str(tmp_path / "imagenet.pth"))
    assert "resized from (14, 14) to (8, 4)" in said
    assert_allclose(model.backbone.pos_embed.detach(), vit.resize_positions(big.pos_embed, (8, 4)).detach())
    assert torch.equal(model.backbone.token_pos, big.token_pos)


def test_no_weights_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="PASS-reID.*weights=FILE"): create_model("vit_small_pass")
    with pytest.raises(ValueError, match="expected vit_"): create_model("vit_small_cat", "none")


def test_the_loop_runs_on_a_transformer(root):
    "Baseline, two epochs, pixel start; with part tokens where a method wants parts; labels and features are of the usual kinds."
    from reidbook.methods.baseline import Baseline
    dataset = open_dataset("synthetic-tiny", root)
    settings = training.resolve(Baseline, dataset.name, backbone="vit_tiny_pass", weights="none", start="pixels", eps=0.5, epochs=2, iterations=3, eval_every=2)
    t = training.start(dataset, Baseline, settings, seed=1)
    records = list(training.epochs(t))
    assert np.isfinite(records[-1]["loss"]) and records[-1]["mAP"] > 0
    model, _ = create_model("vit_tiny_pass", "none", parts=3, bn_group_size=8)
    feats = extract_features(model, t.images[:20], batch_size=7)
    assert feats.global_.shape == (20, 192) and feats.parts.shape == (20, 3, 96)
    assert_allclose(np.linalg.norm(feats.global_, axis=1), 1, atol=1e-5)
