"""safety/prove.py: it proves what is so, and nothing else."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from base.settings import flags
from configurator import Config
from engine import checkpoint
from safety import prove


def write_shard(path: Path, names: list[str], value: float = 1.0) -> None:
    """A safetensors file of one number a name, with its header in the order of `names`."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * ord(name), 4 * ord(name) + 4]} for name in names}
    text = json.dumps(header).encode()
    tensors = b"".join(torch.tensor([value]).numpy().tobytes() for _ in range(128))
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def test_a_shard_is_the_same_in_any_order_of_its_header(tmp_path):
    """safetensors writes a header's metadata in a random order, so equal shards differ in their bytes."""
    (tmp_path / "training.json").write_text("{}")
    path, digests = tmp_path / "shard-00001-model-00001-of-00001.safetensors", []
    for names, value in (("ab", 1.0), ("ba", 1.0), ("ab", 2.0), ("abc", 1.0)):
        write_shard(path, list(names), value)
        digests.append(prove.digest(tmp_path))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    return Config(**tiny_run | dict(max_steps=4, checkpoint_interval=1, background_save=False), out_dir=str(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_dies_at_the_byte_that_was_asked_for_or_proves_nothing(cfg):
    with pytest.raises(UserError, match=r"not killed in a save: it ended with status 2 .*bytes were not written"):
        prove.train_until_byte(cfg, 10**9)
    shutil.rmtree(cfg.out_dir)
    assert prove.train_until_byte(cfg, 150_000) == -signal.SIGKILL
    (half,) = Path(cfg.out_dir).glob(checkpoint.WRITING + "*")
    names = [*half.glob("*.safetensors"), *Path(cfg.out_dir).glob("step_*/*.safetensors")]
    assert sum(path.stat().st_size for path in names) == 150_000


@pytest.mark.slow
def test_the_command_proves_a_resumption(cfg, run_script):
    done = run_script("train.py", *flags(cfg), "--prove_resume")
    assert done.returncode == 0, done.stderr
    assert "exit status -9; it left .writing_step_" in done.stdout
    assert "proved: losses, gradient norms and learning rates of all 4 steps are equal in hex" in done.stdout


@pytest.mark.parametrize("what", ["a loss", "a weight", "the last step"])
def test_runs_that_differ_are_told_apart(tmp_path, what):
    for name in ("a", "b"):
        other = name == "b"
        folder = tmp_path / name / f"step_0000000{2 - (other and what == 'the last step')}"
        folder.mkdir(parents=True)
        records = [
            {"step": n, "loss": 1.0 + 2**-50 * (other and what == "a loss"), "grad_norm": 1.0, "lr": 1.0} for n in (1, 2)
        ]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (folder / "model.safetensors").write_text(str(other and what == "a weight"))
        (folder / "training.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prove.restore, "newest", lambda out: checkpoint.candidates(out)[0])
        expected = {"a loss": "step 1: loss, gradient", "a weight": "step_00000002: parameters", "the last step": "one ends at"}
        assert prove.difference(tmp_path / "a", tmp_path / "b").startswith(expected[what])
        shutil.rmtree(tmp_path / "b")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert prove.difference(tmp_path / "a", tmp_path / "b") is None
