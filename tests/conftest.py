"""Puts the repository root on the path and keeps tests on few threads, so that two of them do not fight for cores."""
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run by .ci/run after the fast ones")


def make_data(folder, sizes=(20, 17, 13), side=8, channels=1, seed=0):
    """A data folder as data.py writes it: noisy images whose brightness is their class, with a bright left column so that mirroring shows."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    images = (rng.integers(0, 100, (len(labels), side, side, channels)) + 40 * labels[:, None, None, None]).astype(np.uint8)
    images[:, :, 0] = 255
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "classes.txt").write_text("".join(f"class{c}\n" for c in range(len(sizes))))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "sha256": digest, "num_classes": len(sizes)}))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """50 images 8 x 8 x 1 in 3 classes. Shared by all tests: read only."""
    return make_data(tmp_path_factory.mktemp("tiny") / "data")
