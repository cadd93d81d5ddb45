"""GPT-2 124M from scratch on tiny Shakespeare."""

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
    compile_scope="block",
    eval_interval=1000,
    eval_tokens=16_384,
)
