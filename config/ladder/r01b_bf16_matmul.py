"""Rung 1's CPU form, beside the ladder: oneDNN may round float32 matmuls to bfloat16. Read in machine.set_up()."""

from dataclasses import replace

from config.ladder.r00_fp32 import config as previous

config = replace(previous, fp32_precision="bf16")
