"""A model two steps into its training, and its checkpoints, for the tests that read, write, damage and forge them."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import optim
from base.files import sha256_of
from configurator import Config, GPTConfig
from engine import checkpoint, restore
from model import GPT
from tokenizer import CharTokenizer, Tokenizer

CPU = torch.device("cpu")
EXTRA = {  # what train.py adds to training.json
    "data_sha256": "",
    "scaler": {},
    "outliers": {"count": 0, "before": {}},
    "val_loss": None,
    "best_step": None,
    "best_val_loss": None,
}
FILES = ["config.json", "model.safetensors", "tokenizer.json", "training.json", "training.safetensors"]


@dataclass
class Trained:
    cfg: Config
    model: GPT
    optimizer: torch.optim.AdamW
    tokenizer: CharTokenizer

    def save(self, run_dir: Path, step: int, keep: int = 5, states: list | None = None) -> Path:
        states = [checkpoint.rng_states(CPU)] if states is None else states
        return checkpoint.save(run_dir, self.snapshot(step, states), keep)

    def snapshot(self, step: int, states: list) -> checkpoint.Snapshot:
        tensors = checkpoint.state_tensors(self.model, self.optimizer)
        return checkpoint.Snapshot(step, *tensors, states, self.cfg, self.tokenizer, EXTRA | {"loss": 1.5})

    def load(self, folder: Path) -> dict:
        """Weights, optimizer and random state, into the objects that are there."""
        restore.load_weights(folder, self.model)
        return restore.load_training(folder, self.model, self.optimizer, 0, CPU)


def make(shape: GPTConfig, seed: int = 0, steps: int = 2) -> Trained:
    torch.manual_seed(seed)
    cfg = Config(**vars(shape) | dict(tokens_per_step=32, fused_adamw=True))
    model = GPT(cfg)
    optimizer = optim.adamw(cfg, model)
    for _ in range(steps):
        idx = torch.randint(cfg.vocab_size, (2, 9))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(cfg, model, optimizer, CharTokenizer([chr(65 + i) for i in range(cfg.vocab_size)]))


def save_run(folder: Path, model: GPT, tokenizer: Tokenizer, extra: dict | None = None) -> None:
    """A model as the only checkpoint of a run. extra: what training.json has besides."""
    cfg = Config(**vars(model.cfg), tokens_per_step=model.cfg.block_size)
    tensors = checkpoint.state_tensors(model, torch.optim.AdamW(model.parameters()))
    checkpoint.save(folder, checkpoint.Snapshot(1, *tensors, [torch.get_rng_state()], cfg, tokenizer, extra or {}), keep=1)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def seal(folder: Path) -> None:
    """Make the manifest fit the files, as a forger would."""
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    edit_manifest(folder, lambda values: values.update(files=entries))


class Bomb(str):
    """A path. Whoever unpickles it makes that folder."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def build(cfg: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(seed)
    return GPT(cfg).to(dtype).eval()


def randomised(cfg: GPTConfig, seed: int = 0) -> GPT:
    """A model with every parameter random, padding rows included: zero biases and unit gains would hide mistakes."""
    model = build(cfg, seed)
    for p in model.parameters():
        p.data.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    return model


@torch.inference_mode()
def assert_same_logits(a, b, V: int, T: int = 8, atol: float = 1e-4) -> None:
    """Of two models, ours or of transformers."""
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3))
    left, right = (out if isinstance(out, Tensor) else out.logits for out in (a(idx), b(idx)))
    assert left.std() > 0.1  # there is something to compare
    torch.testing.assert_close(left, right, rtol=0, atol=atol)
