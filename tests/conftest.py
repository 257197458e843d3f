"""Puts the repository root on the path and keeps tests on few threads, so that two of them do not fight for cores."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run by .ci/run after the fast ones")
