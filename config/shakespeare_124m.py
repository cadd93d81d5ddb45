"""GPT-2's 124M shape from scratch on tiny Shakespeare, for three minutes: what config/shakespeare.py trains is a small model.

    python prepare_data.py shakespeare
    python train.py config/shakespeare_124m.py

Hardware: 2 CPU cores, or any GPU. Expect: a validation loss of about 5.8 after two and a half minutes on 2 cores with
AVX512-BF16: words without sense. Not measured on a GPU yet. LOG.md shows how the sizes were chosen.
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
    compile_scope="block",  # the first step compiles faster than with the whole model (results/…/start.json)
    eval_interval=1000,
    eval_tokens=16_384,
)
