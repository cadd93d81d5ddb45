"""Rung 11: two processes started by torchrun, each with half of every step. Read in run.build()."""

from dataclasses import replace

from config.ladder.r10_blocked import config as previous

config = replace(previous, processes=2)
