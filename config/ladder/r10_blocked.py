"""Rung 10: attention by blocks of queries (CPU), each with the keys up to its own end. Read in model.Attention."""

from dataclasses import replace

from config.ladder.r09_prefetch import config as previous

config = replace(previous, attention="blocked")
