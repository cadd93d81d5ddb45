"""Rung 1: TF32. Float32 matmuls round their inputs to 10 bits of mantissa and use the tensor cores. Read in run_module.build()."""

from dataclasses import replace

from config.ladder.r00_fp32 import config as previous

config = replace(previous, fp32_precision="tf32")
