"""Rung 7: keep freed memory in the process (CPU). No page is zeroed and faulted in anew at each step. Read in run_module.build()."""

from dataclasses import replace

from config.ladder.r06_fused import config as previous

config = replace(previous, reuse_memory=True)
