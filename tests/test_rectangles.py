"""Images that are not square, from data.py to the judge, and square ones as they always were."""
import json

import numpy as np
import pytest
import torch

import attach
import common
import data
import evaluate
import odd_files as odd
import prune
import reweight
import sample
import train
from models.build import build
from models.conditioning import match_grid
from models.sit import sincos_2d


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """36 images of 8 x 12 in two classes, and 12 held out."""
    top = tmp_path_factory.mktemp("wide")
    odd.tree(top / "s", [f"{s}/{c}/{i}.png" for s, n in (("train", 18), ("test", 6)) for c in "ab" for i in range(n)], size=(12, 8))
    data.main([str(top / "s"), "--workers", "1", "--out", str(top / "d")])
    return top


def go(script, line):
    script.main([*line.split(), "--device", "cpu"])


@pytest.mark.parametrize("model", ["SiT-T/2", "unet-tiny"])
def test_from_data_to_judge(wide, model):
    """Every stage at its smallest, for a transformer and a U-Net."""
    d, out = wide / "d", wide / model.replace("/", "")
    go(train, f"--data {d} --preset digits --model {model} --steps 3 --batch-size 4 --warmup 0 --out {out}/full")
    ckpt = f"{out}/full/last.pt"
    assert common.load_pt(ckpt)["args"]["size"] == [8, 12]
    go(prune, f"--data {d} --surrogate ddae --weights {ckpt} --score gaussian --per-class 5 --out {out}/prune")
    go(reweight, f"--data {d} --indices {out}/prune/keep.npy --reference {ckpt} --steps 2 --burn-in 0 --batch-size 4 --out {out}/reweight")
    go(attach, f"--data {d} --reference {ckpt} --per-class 5 --text none --visual ddae --judge pixels --out {out}/attach")
    go(train, f"--data {d} --preset digits --model {model} --attach {out}/attach --steps 2 --batch-size 4 --warmup 0 --out {out}/d2c")
    for run in ("full", "d2c"):
        go(sample, f"--checkpoint {out}/{run}/last.pt --num 12 --steps 1 --out {out}/{run}")
        assert np.load(out / run / "samples.npy").shape == (12, 8, 12, 3)
    go(evaluate, f"--data {d} --runs {out}/full {out}/d2c --encoder pixels scratch --judges 1")
    assert np.isfinite(json.loads((out / "d2c" / "metrics.json").read_text())["encoders"]["scratch"]["fd"])


def test_a_rectangle_is_a_cut_of_the_plane():
    """Positions of a 4 x 6 grid are those of a 6 x 6 grid without its last rows; a U-Net without attention sees only neighbours."""
    assert np.array_equal(sincos_2d(64, (4, 6)), sincos_2d(64, 6)[:24])
    assert np.array_equal(sincos_2d(64, (5, 5)), sincos_2d(64, 5))
    settings = {"model": "SiT-T/2", "process": "flow", "channels": 2, "num_classes": 3}
    torch.manual_seed(0)
    net = build({**settings, "size": [8, 12]}).eval()
    assert net.grid == (4, 6) and build({**settings, "size": [8, 8]}).grid == 4
    torch.nn.init.normal_(net.final_layer.linear.weight)
    x, t, y = torch.randn(2, 2, 8, 12), torch.rand(2), torch.tensor([0, 2])
    out, tokens = net(x, t, y, tokens_after=2)
    assert out.shape == x.shape and tokens.shape == (2, 24, 64)
    # Without attention and positions each patch stands alone: what leaves at a place is what came in at it.
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    far = x.clone()
    far[:, :, 2:4, 8:10] += 1                                         # the patch of row 1, column 4
    changed = (net(far, t, y) - net(x, t, y)).abs().amax((0, 1)) > 0
    assert changed[2:4, 8:10].any() and not changed[:2].any() and not changed[4:].any() and not changed[:, :8].any() and not changed[:, 10:].any()


def test_tokens_of_a_square_meet_a_rectangle():
    """A linear ramp over the image stays the same ramp on another grid (bilinear, at the places that have neighbours on both sides)."""
    ramp = ((torch.arange(16) + 0.5) / 16)[None, :].expand(16, 16).reshape(1, 256, 1)
    got = match_grid(ramp, 24, (4, 6)).view(4, 6)
    assert torch.allclose(got[:, 1:-1], ((torch.arange(6) + 0.5) / 6)[1:-1].expand(4, 4), atol=0.02)
    with pytest.raises(ValueError, match="square grids"):
        match_grid(torch.zeros(1, 24, 1), 35, (5, 7))


@pytest.mark.parametrize("model, size, words", [
    ("SiT-T/8", [8, 12], "multiple of the patch size"), ("unet", [16, 20], "halved"), ("MDT-T/2", [8, 12], "not square"), ("SiT-T/2", [8, 0], "whole number"),
    ("SiT-T/2", [8, 8, 8], "whole number"), ("SiT-T/2", "8", "whole number")])
def test_sizes_that_do_not_fit(model, size, words):
    with pytest.raises(ValueError, match=words):
        build({"model": model, "process": "ddpm", "size": size, "channels": 3, "num_classes": 2})
