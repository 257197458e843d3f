"""The README keeps its word: its examples run and give what plain loops give, its commands parse, its pictures and the names in its equation map exist."""
import importlib
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import attach
import data
import prune
from models.conditioning import ConditionEmbedder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README.split("\n## Lifting a stage\n")[1].split("\n## ")[0], flags=re.S)
SCRIPTS = ("data", "prune", "reweight", "attach", "train", "sample", "evaluate", "report")


def run(example, **names):
    names = dict(names)
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_prune_in_ten_lines_keeps_what_prune_keeps():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(3), (40, 55, 90)))
    z = rng.normal(size=(185, 6)) @ rng.normal(size=(6, 6)) + y[:, None]
    got = run(EXAMPLES[0], z=z, y=y)
    code = [line for line in EXAMPLES[0].splitlines() if line.strip() and not line.startswith("import")]
    assert len(code) == 9                                             # and the import: ten lines
    for c in range(3):
        assert np.allclose(got["gaussian"](z[y == c]), prune.gaussian_score(z[y == c]), rtol=1e-10)
        assert np.array_equal(got["moderate"](z[y == c]), prune.moderate_score(z[y == c], np.arange((y == c).sum())))
    m = prune.counts_to_keep(np.array([40, 55, 90]), 0.1)
    want = prune.top(prune.score_all("gaussian", y, m, np.arange(185), 0, features=z), y, m, np.arange(185))
    assert list(m) == [4, 6, 9] and np.array_equal(got["keep"], want)


def test_the_dro_loop_in_a_foreign_trainer_is_doremi():
    """A linear denoiser of 1-D data, and beside it a loop over classes and numbers without torch's help, theta included."""
    K, B, steps, burn_in, lr = 3, 12, 30, 5, 0.1
    g = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(steps, B, generator=g, dtype=torch.float64), torch.randint(K, (steps, B), generator=g)
    ys[7] = ys[7].clamp(max=1)                                        # class 2 is absent once
    noise = 0.5 * torch.randn(steps, B, generator=g, dtype=torch.float64) * (1 + ys)
    proxy, reference = nn.Embedding(K, 1).double(), nn.Embedding(K, 1).double()
    nn.init.zeros_(proxy.weight), nn.init.constant_(reference.weight, 0.7)
    losses = lambda net, x, y, step: (noise[step] - net(y)[:, 0] * (x + noise[step])).square()               # noqa: E731
    got = run(EXAMPLES[1], K=K, steps=steps, burn_in=burn_in, batch=lambda step: (xs[step], ys[step]), losses=losses, proxy=proxy, reference=reference,
              optimizer=torch.optim.SGD(proxy.parameters(), lr=lr), counts=torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64))
    theta, a, lam, mean = [0.0] * K, [1 / K] * K, [0.0] * K, [0.0] * K
    for step in range(steps):
        rows = list(zip(xs[step].tolist(), noise[step].tolist(), ys[step].tolist()))
        loss = lambda w, row: (row[1] - w * (row[0] + row[1])) ** 2                             # noqa: E731
        for c in range(K):
            mine = [loss(theta[c], r) - loss(0.7, r) for r in rows if r[2] == c]
            lam[c] = max(sum(mine) / len(mine), 0) if mine else lam[c]
        if step >= burn_in:
            a = [a[c] * math.exp(lam[c]) for c in range(K)]
            a = [0.999 * v / sum(a) + 0.001 / K for v in a]
            mean = [m + v / (steps - burn_in) for m, v in zip(mean, a)]
        total = sum(a[r[2]] for r in rows)
        for c in range(K):
            slope = sum(a[c] * -2 * (r[1] - theta[c] * (r[0] + r[1])) * (r[0] + r[1]) for r in rows if r[2] == c)
            theta[c] -= lr * slope / total
    assert torch.allclose(got["weights"], torch.tensor([m / (n / 60) for m, n in zip(mean, (10, 20, 30))], dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(proxy.weight[:, 0], torch.tensor(theta, dtype=torch.float64), rtol=1e-9) and max(mean) > 0.4


class Foreign(nn.Module):
    """A network that is not this project's: convolutions, the condition added, 4 x 4 tokens of its own."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.time = nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ConvTranspose2d(width, 1, 2, stride=2), nn.Linear(1, width)

    def forward(self, x, t, cond):
        h = torch.tanh(self.a(x) + (self.time(t[:, None]) + cond)[:, :, None, None])           # (n, width, 4, 4)
        return self.b(h), h.flatten(2).transpose(1, 2)


def test_attach_in_a_foreign_trainer(tmp_path):
    """On the real files of attach.py: the alignment is learned beyond what one constant vector reaches, the diffusion loss falls."""
    data.main(["digits", "--out", str(tmp_path / "data")])
    np.save(tmp_path / "difficulty.npy", np.random.default_rng(0).random(1500, dtype=np.float32))
    attach.main(["--data", str(tmp_path / "data"), "--difficulty", str(tmp_path / "difficulty.npy"), "--per-class", "15", "--text", "minilm", "--visual", "none", "--judge", "none",
                 "--device", "cpu", "--out", str(tmp_path / "attach")])
    keep, labels = np.load(tmp_path / "attach/keep.npy"), torch.from_numpy(np.load(tmp_path / "data/labels.npy"))
    images = torch.from_numpy(np.load(tmp_path / "data/images.npy")).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    patches = nn.functional.unfold(images[keep], 4, stride=4).transpose(1, 2)                  # 2 x 2 tokens: their grid is not the network's
    visual = (patches @ torch.randn(16, 24)).half().numpy()
    np.save(tmp_path / "attach/visual.npy", visual)
    torch.manual_seed(1)
    net, seen = Foreign(32), []
    forward = net.forward
    net.forward = lambda x, t, cond: (seen.append((x, t)), forward(x, t, cond))[1]
    example = EXAMPLES[2].replace("lr=1e-4", "lr=3e-3").replace("Projector(width, visual.shape[-1])", "Projector(width, visual.shape[-1], hidden=64)")
    got = run(example + "    history.append((v.detach() - (eps - x), alignment_loss(phi(h), target).detach()))\n",
              folder=tmp_path / "attach", K=10, width=32, net=net, n=64, steps=300, images=images, labels=labels, history=(history := []))
    assert isinstance(got["embed"], ConditionEmbedder) and got["embed"].text.shape == (11, 1, 384) and len(history) == 300
    unit = nn.functional.normalize(torch.from_numpy(visual).float(), dim=-1).flatten(0, 1)
    constant = unit.mean(0).norm().item()                             # the cosine of the best constant vector
    aligned = -torch.stack([h[1].mean() for h in history[-20:]]).mean().item()
    diffusion = [torch.stack([h[0].square().mean() for h in part]).mean().item() for part in (history[:20], history[-20:])]
    assert aligned > constant + 0.1 and diffusion[1] < 0.8 * diffusion[0], (aligned, constant, diffusion)
    x, t = seen[-1]                                                   # the last batch: rows of the kept set, each with its own tokens
    s = t.view(-1, 1, 1, 1)
    clean = (x - s * got["eps"]) / (1 - s)
    rows = got["rows"].numpy()
    sound = t < 0.9
    assert torch.allclose(clean[sound], images[keep[rows]][sound], atol=1e-4) and not np.array_equal(rows, keep[rows])


def commands():
    """Every command line of a script of this project in the README's bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for k, word in enumerate(words):
                if word.endswith(".py") and word[:-3] in SCRIPTS:
                    yield word[:-3], words[k + 1:]


@pytest.mark.parametrize("script, argv", list(commands()), ids=lambda v: v if isinstance(v, str) else " ".join(v)[:40])
def test_every_command_parses(script, argv):
    importlib.import_module(script).parse_args(argv)


def test_there_are_commands_for_every_stage():
    assert {script for script, _ in commands()} >= {"data", "prune", "reweight", "attach", "train", "sample", "evaluate"}


def test_the_pictures_exist_and_are_small():
    files = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) + re.findall(r'<img src="([^"]+)"', README)
    assert len(files) >= 8 and all((ROOT / f).is_file() for f in files)
    assert sum((ROOT / f).stat().st_size for f in files) < 500_000
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").iterdir()} == set(files)          # none is left over


def test_the_equation_map_names_what_exists():
    rows = re.findall(r"`((?:models/)?\w+\.py):(\w+(?:\.\w+)?)`", README)
    assert len(rows) >= 25
    for file, name in rows:
        thing = importlib.import_module(file[:-3].replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)                              # AttributeError: the README names what is not there


def test_variables_of_run_all_are_read_there():
    """A size or choice that the README sets in front of run_all.sh is one that run_all.sh expands."""
    script = "\n".join(line.split("#")[0] for line in (ROOT / "run_all.sh").read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    names = {n for line in README.splitlines() if "run_all.sh" in line for n in re.findall(r"\b([A-Z_]+)=", line.split("run_all.sh")[0])}
    assert names >= {"SEEDS", "REPORT", "MODEL", "PROCESS", "NPROC", "QUICK", "SCORER", "REFERENCE", "NUM_SAMPLES", "JUDGE", "OUT"}
    for name in names:
        assert re.search(rf"\$\{{?{name}\b", script), name
