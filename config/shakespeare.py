"""GPT-2's 124M shape from scratch on tiny Shakespeare, in the three minutes that someone waits for a first text.

    python prepare_data.py shakespeare && torchrun train.py config/shakespeare.py

Expect: validation loss about 5.8; on 2 CPU cores with AVX512-BF16 under three minutes with compiling and sampling
(results/amd-epyc-2-cores/shakespeare.json); not yet measured on a GPU. LOG.md says how the sizes were chosen.
Sequences and positions are 64, not 1,024: more, shorter steps learn more in that time, and an untrained position is of no use.
"""

from configurator import Config

config = Config(
    dataset="shakespeare",
    block_size=64,
    vocab_multiple=128,
    batch_size=4,
    tokens_per_step=256,
    max_steps=320,
    learning_rate=5e-4,
    min_lr=5e-5,
    warmup_steps=20,
    compile_scope="block",  # starts 20 s sooner than the whole model, at the same speed
    eval_interval=1000,
    eval_tokens=16_384,
)
