"""README.md and docs/ keep their word: examples run and give what plain loops give, commands parse,
links and pictures resolve, and the names in the equation map exist where it says."""
import functools
import importlib
import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import attach
import data
import prune
from models import encoders
from models.conditioning import ConditionEmbedder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGES["docs/lifting.md"], flags=re.S)
SCRIPTS = ("data", "prune", "reweight", "attach", "train", "sample", "evaluate", "report")
IMPORTS = ("from reweight import dro_update", "from prune import gaussian_score",
           "from models.conditioning import alignment_loss")


def run(example, **names):
    exec(compile(example, "docs/lifting.md", "exec"), names)
    return names


# ------------------------------------------------------------------------- lifting.md: its examples
def test_there_are_five_examples():
    assert len(EXAMPLES) == 5


def test_prune_in_fifteen_lines_keeps_what_prune_keeps(tmp_path):
    code = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert len(code) == 15

    # A data folder of 185 images, and features of 6 numbers beside it.
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(3), (40, 55, 90)))
    z = rng.normal(size=(185, 6)) @ rng.normal(size=(6, 6)) + y[:, None]
    z = z.astype(np.float32).astype(np.float64)
    images = rng.integers(0, 256, (185, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=y)
    np.save(tmp_path / "z.npy", z.astype(np.float32))
    data.main([str(tmp_path / "set.npz"), "--out", str(tmp_path / "data")])

    got = run(EXAMPLES[0], z=z, y=y)
    for score in ("gaussian", "moderate"):
        out = tmp_path / score
        prune.main(["--data", str(tmp_path / "data"), "--features", str(tmp_path / "z.npy"),
                    "--score", score, "--keep", "0.1", "--device", "cpu", "--out", str(out)])
        scores = np.load(out / "scores.npy")
        for c in range(3):
            assert np.allclose(got[score](z[y == c]), scores[y == c], rtol=1e-10)
    for c in range(3):
        assert np.allclose(got["gaussian"](z[y == c]), prune.gaussian_score(z[y == c]), rtol=1e-10)
    kept = np.load(tmp_path / "gaussian/keep.npy")
    assert list(np.bincount(y[kept])) == [4, 6, 9]
    assert np.array_equal(got["keep"], kept)


def test_the_dro_loop_in_a_foreign_trainer_is_doremi():
    """A linear denoiser of 1-D data; beside it a loop over plain numbers, theta included."""
    K, B, steps, burn_in, lr = 3, 12, 30, 5, 0.1
    g = torch.Generator().manual_seed(0)
    xs = torch.randn(steps, B, generator=g, dtype=torch.float64)
    ys = torch.randint(K, (steps, B), generator=g)
    ys[7] = ys[7].clamp(max=1)                                        # class 2 is absent once
    noise = 0.5 * torch.randn(steps, B, generator=g, dtype=torch.float64) * (1 + ys)
    proxy = nn.Embedding(K, 1).double()
    reference = nn.Embedding(K, 1).double()
    nn.init.zeros_(proxy.weight)
    nn.init.constant_(reference.weight, 0.7)

    def losses(net, x, y, step):
        return (noise[step] - net(y)[:, 0] * (x + noise[step])).square()

    got = run(EXAMPLES[1], K=K, steps=steps, burn_in=burn_in, losses=losses, proxy=proxy,
              batch=lambda step: (xs[step], ys[step]), reference=reference,
              optimizer=torch.optim.SGD(proxy.parameters(), lr=lr),
              counts=torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64))

    def plain_loss(w, row):
        return (row[1] - w * (row[0] + row[1])) ** 2

    theta, a, lam, mean = [0.0] * K, [1 / K] * K, [0.0] * K, [0.0] * K
    for step in range(steps):
        rows = list(zip(xs[step].tolist(), noise[step].tolist(), ys[step].tolist()))
        for c in range(K):
            mine = [plain_loss(theta[c], r) - plain_loss(0.7, r) for r in rows if r[2] == c]
            if mine:
                lam[c] = max(sum(mine) / len(mine), 0)
        if step >= burn_in:
            a = [a[c] * math.exp(lam[c]) for c in range(K)]
            a = [0.999 * v / sum(a) + 0.001 / K for v in a]
            mean = [m + v / (steps - burn_in) for m, v in zip(mean, a)]
        total = sum(a[r[2]] for r in rows)
        for c in range(K):
            slope = sum(a[c] * -2 * (r[1] - theta[c] * (r[0] + r[1])) * (r[0] + r[1])
                        for r in rows if r[2] == c)
            theta[c] -= lr * slope / total
    want = [m / (n / 60) for m, n in zip(mean, (10, 20, 30))]
    assert torch.allclose(got["weights"], torch.tensor(want, dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(proxy.weight[:, 0], torch.tensor(theta, dtype=torch.float64), rtol=1e-9)
    assert max(mean) > 0.4


class Foreign(nn.Module):
    """A network that is not this project's: the condition added, 4 x 4 tokens of its own."""

    def __init__(self, width):
        super().__init__()
        self.down = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(width, 1, 2, stride=2)
        self.time = nn.Linear(1, width)

    def forward(self, x, t, cond):
        added = (self.time(t[:, None]) + cond)[:, :, None, None]
        h = torch.tanh(self.down(x) + added)                          # (n, width, 4, 4)
        return self.up(h), h.flatten(2).transpose(1, 2)


def test_attach_in_a_foreign_trainer(tmp_path):
    """On the real files of attach.py: the alignment is learned beyond what one constant vector
    reaches, and the diffusion loss falls."""
    data.main(["digits", "--out", str(tmp_path / "data")])
    np.save(tmp_path / "difficulty.npy", np.random.default_rng(0).random(1500, dtype=np.float32))
    attach.main(["--data", str(tmp_path / "data"), "--difficulty", str(tmp_path / "difficulty.npy"),
                 "--per-class", "15", "--text", "minilm", "--visual", "none", "--judge", "none",
                 "--device", "cpu", "--out", str(tmp_path / "attach")])
    keep = np.load(tmp_path / "attach/keep.npy")
    labels = torch.from_numpy(np.load(tmp_path / "data/labels.npy"))
    images = torch.from_numpy(np.load(tmp_path / "data/images.npy"))
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1

    # 2 x 2 tokens: their grid is not the network's.
    torch.manual_seed(0)
    patches = nn.functional.unfold(images[keep], 4, stride=4).transpose(1, 2)
    visual = (patches @ torch.randn(16, 24)).half().numpy()
    np.save(tmp_path / "attach/visual.npy", visual)

    torch.manual_seed(1)
    net = Foreign(32)
    seen = []
    net.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    example = EXAMPLES[2].replace("lr=1e-4", "lr=3e-3")
    example = example.replace("Projector(width, visual.shape[-1])",
                              "Projector(width, visual.shape[-1], hidden=64)")
    assert example.count("3e-3") == 1 and example.count("hidden=64") == 1
    example += "    history.append((diffusion.detach(), alignment_loss(phi(h), target).detach()))\n"
    history = []
    got = run(example, folder=tmp_path / "attach", K=10, width=32, net=net, n=64, steps=300,
              images=images, labels=labels, history=history)
    assert isinstance(got["embed"], ConditionEmbedder)
    assert got["embed"].text.shape == (11, 1, 384) and len(history) == 300

    unit = nn.functional.normalize(torch.from_numpy(visual).float(), dim=-1).flatten(0, 1)
    constant = unit.mean(0).norm().item()                             # cosine of the best constant
    aligned = -torch.stack([align.mean() for _, align in history[-20:]]).mean().item()
    first, last = [torch.stack([loss.mean() for loss, _ in part]).mean().item()
                   for part in (history[:20], history[-20:])]
    assert aligned > constant + 0.1, (aligned, constant)
    assert last < 0.8 * first, (first, last)

    # The last batch: rows of the kept set, each with its own tokens.
    x, t = seen[-1]
    s = t.view(-1, 1, 1, 1)
    clean = (x - s * got["eps"]) / (1 - s)
    rows = got["rows"].numpy()
    sound = t < 0.9
    assert torch.allclose(clean[sound], images[keep[rows]][sound], atol=1e-4)
    assert not np.array_equal(rows, keep[rows])


def test_the_text_takes_the_place_of_a_label_embedder():
    """As DiT, SiT and REPA call it: y_embedder(y, training), a table with the null class last."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.y_embedder = None

        def forward(self, y):
            return self.y_embedder(y, self.training)

    torch.manual_seed(0)
    K, width = 4, 6
    text = torch.randn(K, 3, 5)
    mask = torch.tensor([[True, True, False]] * K)
    net = run(EXAMPLES[3], K=K, width=width, text=text, mask=mask, net=Net())["net"]
    assert net.state_dict()["y_embedder.embedding_table.weight"].shape == (K + 1, width)

    # Without training nothing is dropped: the value of the embedder itself.
    y = torch.arange(K).repeat(1000)
    net.eval()
    whole = net(y)
    assert torch.equal(whole, ConditionEmbedder.forward(net.y_embedder, y))
    # In training a tenth of the rows is the null condition, text and class together.
    net.train()
    got = net(y)
    null = ConditionEmbedder.forward(net.y_embedder, torch.tensor([K]))
    dropped = torch.isclose(got, null).all(1)
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.allclose(got[~dropped], whole[~dropped])


def test_a_run_in_the_official_class_draws_the_same(tmp_path):
    """The official SiT predicts x - eps at its own time 1 - t: minus our v. The class here has its names and shapes."""
    from models.sit import SiT
    torch.manual_seed(0)
    ours, theirs = [SiT(8, 4, 5, depth=2, width=384, heads=6, patch=2).eval() for _ in range(2)]
    for p in ours.parameters():
        nn.init.normal_(p, std=0.03)
    torch.save({"ema": ours.state_dict()}, tmp_path / "last.pt")
    run(EXAMPLES[4], run=tmp_path, net=theirs)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0, 3, 5])
    with torch.no_grad():
        assert ours(x, t, y).std() > 0.1
        torch.testing.assert_close(theirs(x, 1 - t, y), -ours(x, t, y), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------- lifting.md: what it drags in
@functools.cache
def loaded_by(statement):
    """(lines of this project's files, machinery) that a fresh Python loads for `statement`.

    torch and numpy come first, and what they load themselves is forgotten before the statement.
    """
    code = "\n".join([
        "import sys, torch, numpy",
        "machinery = ('fcntl', 'matplotlib', 'torchvision', 'tqdm')",
        "for name in list(sys.modules):",
        "    if name.split('.')[0] in machinery: del sys.modules[name]",
        statement,
        "print([m for m in machinery if m in sys.modules])",
        "print('\\n'.join(getattr(m, '__file__', None) or '' for m in sys.modules.values()))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, *files = done.stdout.splitlines()
    ours = {Path(f) for f in files if f.startswith(f"{ROOT}{os.sep}")}
    ours = {f for f in ours if ".venv" not in f.relative_to(ROOT).parts}
    return sum(len(f.read_text(encoding="utf-8").splitlines()) for f in ours), eval(found)


@pytest.mark.parametrize("statement", IMPORTS)
def test_lifting_a_formula_does_not_drag_the_machinery_in(statement):
    lines, machinery = loaded_by(statement)
    assert 0 < lines < 450
    assert machinery == []


def test_the_command_that_prints_what_an_import_loads():
    page = PAGES["docs/lifting.md"]
    assert re.findall(r"^\| `(.*?)` \|", page, flags=re.M) == list(IMPORTS)
    command, = [b for b in re.findall(r"```bash\n(.*?)```", page, flags=re.S) if "sys.modules" in b]
    command = command.replace("python -", f"{shlex.quote(sys.executable)} -")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == len(IMPORTS)
    for line, statement in zip(printed, IMPORTS):
        assert line.startswith(f"{loaded_by(statement)[0]} {statement} "), line


@pytest.mark.parametrize("script", ["prune", "reweight", "attach"])
def test_the_formulas_of_a_stage_use_none_of_the_machinery(script):
    """The text between the banner `formulas` and the next one can be copied elsewhere."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    parts = re.split(r"^# -{20,} *(.*)$", source, flags=re.M)
    banners = dict(zip(parts[1::2], parts[2::2]))
    assert list(banners) == ["formulas", "the work", "inputs", "command line"]
    assert "common." not in banners["formulas"]


# ----------------------------------------------------------------------------------------- commands
def commands(page):
    """(script, arguments) of every call of a script of this project in a page's bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if ".py" not in line:
                continue
            words = shlex.split(line, comments=True)
            for k, word in enumerate(words):
                if word.endswith(".py") and word[:-3] in SCRIPTS:
                    yield word[:-3], words[k + 1:]


ALL_COMMANDS = [pytest.param(script, argv, id=f"{name}-{script}-{k}")
                for name, page in PAGES.items()
                for k, (script, argv) in enumerate(commands(page))]


@pytest.mark.parametrize("script, argv", ALL_COMMANDS)
def test_every_command_parses(script, argv, tmp_path, monkeypatch):
    """In an empty folder, where only what data.py is given to read exists."""
    monkeypatch.chdir(tmp_path)
    if script == "data":
        Path(argv[0]).mkdir(parents=True)
    if script == "data" and "--indices" in argv:
        keep = Path(argv[argv.index("--indices") + 1])
        keep.parent.mkdir(parents=True)
        np.save(keep, np.arange(3))
    importlib.import_module(script).parse_args(argv)


def test_the_readme_has_a_command_for_every_stage():
    assert {script for script, _ in commands(README)} == set(SCRIPTS)
    assert len(ALL_COMMANDS) >= 25


def test_variables_of_run_all_are_read_there():
    """A size or choice that a page sets in front of run_all.sh is one that is read: expanded by
    run_all.sh itself, or taken from the choices in common/ that it hands over to."""
    files = [ROOT / "run_all.sh", *(ROOT / "common").glob("*.py")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    code = "\n".join(line.split("#")[0] for line in lines)
    names = set()
    for page in PAGES.values():
        for line in page.replace("\\\n", " ").splitlines():
            if "run_all.sh" in line:
                names |= set(re.findall(r"\b([A-Z_]+)=", line.split("run_all.sh")[0]))
    assert names >= {"SEEDS", "REPORT", "MODEL", "PROCESS", "NPROC", "QUICK", "SCORER", "REFERENCE",
                     "NUM_SAMPLES", "JUDGE", "OUT", "SIZE", "STEPS", "PER_CLASS", "KEEP", "TEXT",
                     "SCORE", "SAMPLER", "TRAIN", "TRAJECTORY", "RUNS"}
    for name in names:
        assert re.search(rf"\$\{{?{name}\b|\.{name}\b", code), name


# ------------------------------------------------------------------------ pages, links and pictures
def test_the_readme_is_read_in_five_minutes():
    lines = README.splitlines()
    assert len(lines) <= 160
    for number, line in enumerate(lines, 1):
        assert len(line) <= 120, (number, line)


def prose_of(page):
    """A page without its code: a # or a bracket in there is neither heading nor link."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.S | re.M)


def anchors_of(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", prose_of(page), flags=re.M)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(words) == len(set(words)), "two headings of a page are alike"
    return set(words)


def targets_of(page):
    text = prose_of(page)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for target in targets_of(PAGES[name]):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / name
        if path:
            file = (file.parent / path).resolve()
        assert file.is_file(), target
        if anchor:
            page = PAGES[file.relative_to(ROOT).as_posix()]
            assert anchor in anchors_of(page), target


def test_the_readme_leads_to_every_page():
    pages = set(PAGES) - {"README.md"}
    subjects = ("results", "reproduction", "lifting", "exercises", "data", "scale")
    assert pages >= {f"docs/{subject}.md" for subject in subjects}
    assert pages <= {target.partition("#")[0] for target in targets_of(README)}


def test_the_pictures_exist_and_are_small():
    shown = set()
    for name, page in PAGES.items():
        pictures = [t for t in targets_of(page) if t.endswith(".png")]
        shown |= {(ROOT / name).parent / picture for picture in pictures}
    assert len(shown) >= 8
    assert shown == set((ROOT / "docs").glob("*.png"))                # none is left over
    assert sum(file.stat().st_size for file in shown) < 500_000
    others = {file.suffix for file in (ROOT / "docs").iterdir() if file.is_file()}
    assert others == {".md", ".png"}


def test_every_stage_of_the_readme_has_its_picture():
    stages = re.split(r"^### ", README, flags=re.M)[1:]
    assert [re.match(r"\d · (\w+)\.py", stage)[1] for stage in stages] == list(SCRIPTS)
    for stage in stages:
        assert len(re.findall(r'<img src="docs/\w+\.png"', stage)) == 1, stage


# ---------------------------------------------------------------------- tables that repeat the code
def equation_map():
    rows = re.findall(r"`((?:\w+/)?\w+\.py):(\w+(?:\.\w+)?)`", PAGES["docs/reproduction.md"])
    assert len(rows) >= 25
    return rows


def test_the_equation_map_names_what_exists():
    for file, name in equation_map():
        thing = importlib.import_module(file[:-3].replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)                              # AttributeError: not there
        # Imported from elsewhere does not count: the reader must find it in the named file.
        source = inspect.getsourcefile(inspect.unwrap(thing))
        assert Path(source) == ROOT / file, (file, name)


def test_the_table_of_encoders_is_that_of_the_code():
    assert f"```\n{encoders.describe()}\n```" in PAGES["docs/scale.md"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_defaults_that_are_values(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and not re.search(r"\(default: (None|True|False)\)", text)
    assert "--out" in text and "(default: " in text
