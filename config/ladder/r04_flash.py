"""Rung 4: flash attention. The T x T scores never leave the cache. Read in model.Attention."""

from dataclasses import replace

from config.ladder.r03_compile import config as previous

config = replace(previous, attention="sdpa")
