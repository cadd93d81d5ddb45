"""Rung 8: twice the micro-batch at equal tokens per step. Larger matmuls, fewer launches. Read in Config.split_step()."""

from dataclasses import replace

from config.ladder.r07_memory import config as previous

config = replace(previous, batch_size=2 * previous.batch_size)
