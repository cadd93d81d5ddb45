"""Rung 1: TF32. Float32 matmuls round their inputs to 10 bits of mantissa and use tensor cores. Read in machine.set_up()."""

from dataclasses import replace

from config.ladder.r00_fp32 import config as previous

config = replace(previous, fp32_precision="tf32")
