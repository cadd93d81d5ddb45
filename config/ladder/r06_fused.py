"""Rung 6: fused AdamW. One pass over parameters, gradients and moments instead of a dozen. Read in optim.adamw()."""

from dataclasses import replace

from config.ladder.r05_vocab import config as previous

config = replace(previous, fused_adamw=True)
