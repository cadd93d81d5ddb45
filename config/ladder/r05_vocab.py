"""Rung 5: vocabulary rows padded from 50257 to 50304. Whole matmul tiles. Read in model.GPTConfig.padded_vocab_size."""

from dataclasses import replace

from config.ladder.r04_flash import config as previous

config = replace(previous, vocab_multiple=128)
