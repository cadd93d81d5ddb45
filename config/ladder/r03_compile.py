"""Rung 3: torch.compile. Fuses elementwise chains and removes launch overhead. Read in run_module.compile_model()."""

from dataclasses import replace

from config.ladder.r02_bf16 import config as previous

config = replace(previous, compile=True)
