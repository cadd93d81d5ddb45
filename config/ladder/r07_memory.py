"""Rung 7: keep freed memory in the process (CPU). Steps no longer fault in zeroed pages. Read in machine.set_up()."""

from dataclasses import replace

from config.ladder.r06_fused import config as previous

config = replace(previous, reuse_memory=True)
