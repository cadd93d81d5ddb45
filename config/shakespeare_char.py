"""Characters of tiny Shakespeare with a 10.6M-parameter GPT: minutes on a GPU.

    python prepare_data.py shakespeare_char
    python train.py config/shakespeare_char.py

Hardware: one GPU; on a CPU use shakespeare_char_cpu.py. Expect: the sizes are those of nanoGPT's baby GPT, which reaches a
validation loss of 1.4697 (its README). Not measured by us yet.
"""

from configurator import Config

config = Config(
    dataset="shakespeare_char",
    vocab_size=65,
    n_layer=6,
    n_head=6,
    n_embd=384,
    block_size=256,
    dropout=0.2,
    bias=False,
    batch_size=64,
    tokens_per_step=64 * 256,
    max_steps=5000,
    learning_rate=1e-3,
    min_lr=1e-4,
    beta2=0.99,
    eval_interval=500,
)
