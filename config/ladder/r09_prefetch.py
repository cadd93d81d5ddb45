"""Rung 9: the next batch is read, and its copy to the GPU queued, while this one computes. Read in run_module.Run."""

from dataclasses import replace

from config.ladder.r08_micro_batch import config as previous

config = replace(previous, prefetch=True)
