"""What all tests share: the import path, one thread, a tiny model's configuration, and a way to run a script."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are flat modules, not an installed package

# The same examples every time, and no folder of found ones: a red run is red for its commit, not for its luck.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and sums come out in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, where the scripts lie."""
    return ROOT


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes) -> a GPTConfig small enough for milliseconds."""
    from model import GPTConfig

    return lambda **changes: GPTConfig(**dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=65) | changes)


@pytest.fixture(scope="session")
def run_script():
    """run_script("train.py", "--max_steps=1", env={...}, cwd=..., input="...") -> CompletedProcess, with text streams."""

    def run(script: str, *args: object, env: dict[str, str] | None = None, timeout: float = 120, **how):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        how = {"cwd": ROOT, "encoding": "utf-8", "capture_output": True} | how
        return subprocess.run(command, env=env, timeout=timeout, **how)

    return run
