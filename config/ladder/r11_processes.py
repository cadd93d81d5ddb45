"""Rung 10: two processes started by torchrun, each with half of every step. Read in train.build()."""

from dataclasses import replace

from config.ladder.r09_prefetch import config as previous

config = replace(previous, processes=2)
