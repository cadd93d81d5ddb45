"""BenchConfig: on what to measure, and how often."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from base import settings
from configurator import Config


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
    n_layer: int = 12
    """layers; 12 is GPT-2 124M, fewer are for a first try"""
    rounds: int = 3
    """how often everything is measured"""
    steps: int = 8
    """steps from the same start whose losses are compared, in the first round"""
    quick: bool = False
    """one round of few steps on shorter sequences: a first look, not a measurement"""
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
        settings.check_at_least(self, 1, "n_layer", "rounds", "steps", "seeds")
        settings.check_at_least(self, 0, "batch_size", "sequence_length", "tokens_per_step")

    def by_device(self, device_type: str) -> "BenchConfig":
        """The same with every 0 filled in."""
        gpu = device_type == "cuda"
        B = self.batch_size or (16 if gpu else 4)
        T = self.sequence_length or (1024 if gpu else 256) // (4 if self.quick else 1)
        few = dict(rounds=1, steps=min(self.steps, 4)) if self.quick else {}
        tokens = self.tokens_per_step or B * T * (4 if gpu else 1)
        return replace(self, batch_size=B, sequence_length=T, tokens_per_step=tokens, **few)

    def apply(self, cfg: Config, base_batch_size: int) -> Config:
        """cfg at these sizes; its micro-batch keeps its ratio to the first rung's."""
        return replace(
            cfg,
            device=self.device,
            n_layer=self.n_layer,
            batch_size=max(1, cfg.batch_size * self.batch_size // base_batch_size),
            sequence_length=self.sequence_length,
            tokens_per_step=self.tokens_per_step,
            data_dir=self.data_dir,
        )

    def given(self) -> dict[str, Any]:
        """The settings that were given on the command line, for a config file that is otherwise measured as it is."""
        found: dict[str, Any] = {k: v for k in ("batch_size", "sequence_length", "tokens_per_step") if (v := getattr(self, k))}
        if "sequence_length" in found and "batch_size" in found:
            found.setdefault("tokens_per_step", found["sequence_length"] * found["batch_size"])
        if self.device != "auto":
            found["device"] = self.device
        if self.n_layer != BenchConfig.n_layer:
            found["n_layer"] = self.n_layer
        return found | {"data_dir": self.data_dir}
