"""Rung 9: prefetch. The next batch is read and copied while this one computes. Read in Run.next_batch()."""

from dataclasses import replace

from config.ladder.r08_micro_batch import config as previous

config = replace(previous, prefetch=True)
