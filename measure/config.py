"""BenchConfig: on what to measure, and how often."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from base import settings
from configurator import Config

# --quick measures this instead of GPT-2 124M: a first step compiles in seconds, and its ratios are those of another model
QUICK_LAYERS, QUICK_STEPS, QUICK_WIDTH = 1, 3, dict(n_embd=192, n_head=3)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure on; every command takes these."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to measure"""
    batch_size: int = 0
    """micro-batch of the first rung; 0: 16 on a GPU, 4 on a CPU"""
    sequence_length: int = 0
    """T; 0: 1024 on a GPU, 256 on a CPU"""
    tokens_per_step: int = 0
    """tokens per optimizer step on every rung; 0: four micro-batches on a GPU, one on a CPU"""
    n_layer: int = 0
    """layers; 0: 12, as GPT-2 124M has, or 1 with --quick; fewer are for a first try"""
    rounds: int = 3
    """how often everything is measured"""
    steps: int = 8
    """steps from the same start whose losses are compared, in the first round"""
    quick: bool = False
    """one round of few steps of a small model on short sequences: a first look in a minute or two, not a measurement"""
    data_dir: str = "data"
    """folder of the prepared data sets"""
    out: str = "results"
    """folder for the results"""
    seeds: int = 5
    """ab: seeds per config"""
    max_regression: str = ""
    """compare: how much slower B may be than A, e.g. 3%; more ends with exit status 1"""

    def __post_init__(self):
        settings.check_types(vars(self), BenchConfig)
        settings.check_at_least(self, 1, "rounds", "steps", "seeds")
        settings.check_at_least(self, 0, "batch_size", "sequence_length", "tokens_per_step", "n_layer")

    def by_device(self, device_type: str) -> "BenchConfig":
        """The same with every 0 filled in."""
        gpu = device_type == "cuda"
        B = self.batch_size or (16 if gpu else 4)
        T = self.sequence_length or (1024 if gpu else 256) // (8 if self.quick else 1)
        few = dict(rounds=1, seeds=min(self.seeds, 2), steps=min(self.steps, QUICK_STEPS)) if self.quick else {}
        tokens = self.tokens_per_step or B * T * (4 if gpu else 1)
        layers = self.n_layer or (QUICK_LAYERS if self.quick else 12)
        return replace(self, batch_size=B, sequence_length=T, tokens_per_step=tokens, n_layer=layers, **few)

    def apply(self, cfg: Config, base_batch_size: int) -> Config:
        """cfg at these sizes; its micro-batch keeps its ratio to the first rung's."""
        return replace(
            self.narrow(cfg),
            device=self.device,
            n_layer=self.n_layer,
            batch_size=max(1, cfg.batch_size * self.batch_size // base_batch_size),
            sequence_length=self.sequence_length,
            tokens_per_step=self.tokens_per_step,
            data_dir=self.data_dir,
        )

    def narrow(self, cfg: Config) -> Config:
        """With --quick, cfg at the width of a small model."""
        return replace(cfg, **QUICK_WIDTH) if self.quick and cfg.n_embd > QUICK_WIDTH["n_embd"] else cfg

    def of_file(self, cfg: Config) -> Config:
        """A config file's config as it is, but for what was given on the command line; with --quick, a small one like it."""
        given = self.given()
        if self.quick:
            T = given.setdefault("sequence_length", max(1, cfg.T // 4))
            given.setdefault("batch_size", 1 << min(2, cfg.batch_size.bit_length() - 1))  # 1, 2 or 4: each divides the step
            given.setdefault("tokens_per_step", max(4, given["batch_size"]) * T)
            given.setdefault("n_layer", min(cfg.n_layer, QUICK_LAYERS))
        return replace(self.narrow(cfg), **given)

    def given(self) -> dict[str, Any]:
        """The settings that were given on the command line."""
        names = ("batch_size", "sequence_length", "tokens_per_step", "n_layer")
        found: dict[str, Any] = {k: v for k in names if (v := getattr(self, k))}
        if "sequence_length" in found and "batch_size" in found:
            found.setdefault("tokens_per_step", found["sequence_length"] * found["batch_size"])
        if self.device != "auto":
            found["device"] = self.device
        return found | {"data_dir": self.data_dir}
