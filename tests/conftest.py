"""What all tests share: the import path, one thread, a tiny model's configuration, and a way to run a script."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the scripts are flat modules, not an installed package

# The same examples every time, and no folder of found ones: a red run is red for its commit, not for its luck.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and sums come out in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, with the scripts."""
    return ROOT


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes) -> a GPTConfig small enough for milliseconds."""
    from configurator import GPTConfig

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


# ---- training runs in miniature -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def text() -> str:
    """20,000 characters with something to learn in them: words of a small dictionary, in no order."""
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat,", "ran", "after", "its", "tail", "and", "fell.\n"]
    return " ".join(random.choice(words, 6000))[:20_000]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, text) -> Path:
    """A data_dir with one data set, "tiny": the text above, one id per character."""
    import prepare_data

    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny.txt").write_text(text, encoding="utf-8")
    prepare_data.main([str(folder / "tiny.txt"), "--tokenizer=char", f"--data_dir={folder}"])
    return folder


@pytest.fixture(scope="session")
def tiny_run(prepared) -> dict:
    """The settings, as keywords of Config, of a training run of milliseconds: a CPU, float32, 0.03M parameters."""
    from corpus.shards import open_dataset

    model = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=open_dataset(prepared / "tiny").tokenizer.vocab_size)
    steps = dict(batch_size=4, tokens_per_step=256, max_steps=6, learning_rate=1e-2, min_lr=1e-3, warmup_steps=2)
    where = dict(dataset="tiny", data_dir=str(prepared), device="cpu", dtype="float32", compile=False, reuse_memory=False)
    return model | steps | where | dict(eval_interval=3, eval_tokens=1000)


@pytest.fixture(scope="session")
def tiny_flags(tiny_run) -> list[str]:
    """The same as flags."""
    return [f"--{name}={value}" for name, value in tiny_run.items()]


@pytest.fixture(scope="session")
def finished(tiny_run, tmp_path_factory) -> str:
    """The folder of the tiny run at its end: to be read, not changed."""
    import train
    from configurator import Config

    folder = str(tmp_path_factory.mktemp("out") / "tiny")
    train.train(Config(**tiny_run, out_dir=folder, curve="off"))
    return folder


@pytest.fixture
def own_run(finished, tmp_path) -> str:
    """A copy of it, to be continued and written to."""
    return shutil.copytree(finished, str(tmp_path / "run"))


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def own_signals():
    """Put pytest's signal handlers back: train.train() has its own."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def cfg(tiny_run, tmp_path):
    """The tiny run, into a fresh folder; with dropout, so that random numbers matter."""
    from configurator import Config

    return Config(**tiny_run, out_dir=str(tmp_path / "run"), dropout=0.1)


@pytest.fixture
def uninterrupted(cfg, tmp_path):
    """The run of cfg as it is when nothing happens to it: its config, with another folder."""
    import train

    whole = replace(cfg, out_dir=str(tmp_path / "whole"))
    train.train(whole)
    return whole


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(step, action) -> during that step (1, 2, …) of training the action happens, once."""
    import train

    def arrange(step: int, action):
        plain, pending = train.train_step, [action]

        def train_step(run, number):
            if number == step - 1 and pending:
                pending.pop()()
            return plain(run, number)

        monkeypatch.setattr(train, "train_step", train_step)

    return arrange


@pytest.fixture(scope="session")
def gpt2_files():
    """Skip, with a message, where GPT-2's vocabulary is available neither from its address nor from the package index."""
    import tokenizer
    from base.errors import UserError

    try:
        tokenizer.GPT2Tokenizer().encode("a")
    except UserError as e:
        pytest.skip(f"no GPT-2 vocabulary: {e}")
