"""What a training run has left behind, read strictly: its log, its losses bit for bit, its last checkpoint."""

import hashlib
import json
from pathlib import Path

import torch

from configurator import Config
from engine import checkpoint, restore
from engine.run import Run
from safety import capsule


def no_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def records(cfg: Config) -> list[dict]:
    """log.jsonl: whole lines, and nothing that is not JSON (NaN)."""
    text = (Path(cfg.out_dir) / "log.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def events(cfg: Config, name: str) -> list[dict]:
    """The records of one kind of event, such as "saved"."""
    return [r for r in records(cfg) if r.get("event") == name]


def numbers(cfg: Config, key: str) -> list:
    """A value of all records that have it, in order."""
    return [r[key] for r in records(cfg) if key in r]


def losses(cfg: Config) -> dict[int, str]:
    """{step: loss, gradient norm and learning rate in hex}, the last of each step."""
    return {r["step"]: " ".join(r[k].hex() for k in ("loss", "grad_norm", "lr")) for r in records(cfg) if "loss" in r}


def digest(cfg: Config) -> str:
    """sha256 of the last checkpoint's weights, moments, step counters and random states."""
    folder = restore.newest(Path(cfg.out_dir))
    assert folder.name == f"step_{cfg.max_steps:08d}"
    return hashlib.sha256(b"".join((folder / f"{name}.safetensors").read_bytes() for name in ("model", "training"))).hexdigest()


def assert_same(a: Config, b: Config) -> None:
    """Losses, gradient norms and learning rates of all steps, and the last checkpoint, bit for bit."""
    assert losses(a) == losses(b)
    assert digest(a) == digest(b)


def weights(run: Run) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def contents(folder: Path) -> dict[str, bytes]:
    """{path: content} of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the state of a run that several processes share out ------------------------------------------------------------------


def state(run: Run) -> dict[str, torch.Tensor]:
    """Weights and moments, whole: under zero1 the moments that this process keeps."""
    weights, moments = checkpoint.state_tensors(run.model, run.optimizer)
    return {name: capsule.full(t).clone() for name, t in (weights | moments).items()}


def merged(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One state from those of all processes; what several have must be equal."""
    whole = {}
    for found in states:
        for name, t in found.items():
            assert torch.equal(whole.setdefault(name, t), t), name
    return whole


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
