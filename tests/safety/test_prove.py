"""safety/prove.py: it proves what is so, and nothing else."""

import json
import struct
from pathlib import Path

import pytest

from base.errors import UserError
from base.settings import flags
from configurator import Config
from engine import checkpoint
from safety import prove


def test_a_shard_is_the_same_in_any_order_of_its_header(tmp_path):
    """safetensors writes a header's metadata in a random order, so equal shards differ in their bytes."""
    (tmp_path / "training.json").write_text("{}")
    digests = []
    for names, value in (("ab", 1.0), ("ba", 1.0), ("ab", 2.0), ("abc", 1.0)):
        places = {name: [4 * ord(name), 4 * ord(name) + 4] for name in names}
        header = json.dumps({name: dict(dtype="F32", shape=[1], data_offsets=at) for name, at in places.items()}).encode()
        shard = len(header).to_bytes(8, "little") + header + struct.pack("<128f", *[value] * 128)
        (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(shard)
        digests.append(prove.digest(tmp_path))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.slow
def test_the_command_proves_a_resumption_or_nothing(tiny_run, tmp_path, run_script):
    cfg = Config(**tiny_run | dict(max_steps=4, checkpoint_interval=1, background_save=False), out_dir=str(tmp_path / "run"))
    done = run_script("train.py", *flags(cfg), "--prove_resume")
    assert done.returncode == 0, done.stderr
    assert "exit status -9; it left .writing_step_" in done.stdout
    assert "proved: losses, gradient norms and learning rates of all 4 steps are equal in hex" in done.stdout
    with pytest.raises(UserError, match=r"not killed in a save: it ended with status 2 .*bytes were not written"):
        prove.train_until_byte(cfg, 10**9)


def leave(out: Path, loss: float = 1.0, weight: str = "x", last: int = 2) -> None:
    """What a run of two steps leaves, as far as runs are compared."""
    folder = out / f"step_{last:08d}"
    folder.mkdir(parents=True)
    records = [{"step": n, "loss": loss, "grad_norm": 1.0, "lr": 1.0} for n in (1, 2)]
    (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "model.safetensors").write_text(weight)
    (folder / "training.json").write_text("{}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(loss=1.0 + 2**-50), "step 1: loss, gradient"),
        (dict(weight="y"), "step_00000002: parameters"),
        (dict(last=1), "one ends at"),
        (dict(), "None"),
    ],
)
def test_runs_that_differ_are_told_apart(tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(prove.restore, "newest", lambda out: checkpoint.candidates(out)[0])
    leave(tmp_path / "a")
    leave(tmp_path / "b", **changes)
    assert str(prove.difference(tmp_path / "a", tmp_path / "b")).startswith(said)
