"""Rung 3: torch.compile. Fuses chains of elementwise operations and removes launch overhead. Read in run.compile_model()."""

from dataclasses import replace

from config.ladder.r02_bf16 import config as previous

config = replace(previous, compile=True)
