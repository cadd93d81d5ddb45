"""Rung 2: bf16 autocast. Matmuls read and write half the bytes, at twice TF32's rate. Read in Run.autocast()."""

from dataclasses import replace

from config.ladder.r01_tf32 import config as previous

config = replace(previous, dtype="bfloat16")
