"""A small model on enwik8 (the first 100 MB of Wikipedia's XML), with a vocabulary of its own: bits per byte in minutes.

    python prepare_data.py enwik8 --tokenizer=bpe --vocab_size=8192
    python train.py config/enwik8.py

Expect: results/amd-epyc-2-cores/run_enwik8.json: far from the literature's 1.0 bits per byte, which takes a thousand times the
computing; this run sees a twentieth of the text once. The split is the usual one: 90, 5 and 5 million bytes.
"""

from dataclasses import replace

from config.tinystories_sample import config as small

config = replace(small, dataset="enwik8", vocab_size=8192, sample_prompt="The history of ")
