"""A small model on two megabytes of TinyStories, with a vocabulary of its own: stories on two CPU cores in minutes.

    python prepare_data.py tinystories_sample.txt --separator='<|endoftext|>' --val_fraction=0.05 \\
        --tokenizer=bpe --vocab_size=4096
    python train.py config/tinystories_sample.py

Expect: results/amd-epyc-2-cores/run_tinystories_sample.json. The text is seen about six times over; on the whole of TinyStories
(python prepare_data.py tinystories) the same model learns on: --dataset=tinystories --vocab_size=50257 --max_steps=20000.
"""

from configurator import Config

config = Config(
    dataset="tinystories_sample",
    vocab_size=4096,
    n_layer=4,
    n_head=4,
    n_embd=256,
    block_size=256,
    dropout=0.0,
    attention="blocked",
    batch_size=16,
    tokens_per_step=8192,
    max_steps=400,
    learning_rate=2e-3,
    min_lr=2e-4,
    warmup_steps=30,
    eval_interval=50,
    eval_tokens=65_536,
    checkpoint_interval=200,
    sample_interval=100,
    sample_prompt="Once upon a time",
)
