"""Rung 5: vocabulary padded from 50257 to 50304 rows: whole matmul tiles. Read in GPTConfig.padded_vocab_size."""

from dataclasses import replace

from config.ladder.r04_flash import config as previous

config = replace(previous, vocab_multiple=128)
