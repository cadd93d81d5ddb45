"""A 0.9M-parameter GPT on tiny Shakespeare with a BPE of its own: the main job, three minutes from the command to a text.

    python prepare_data.py shakespeare_bpe
    python train.py config/shakespeare.py

Hardware: 2 CPU cores, or any GPU. Expect: about 2.10 bits per byte of the validation split after two and a half minutes
on 2 cores of an EPYC (results/amd-epyc-family-26-model-2-avx512-bf16-2-cores/shakespeare.json). Not measured on a GPU yet.
LOG.md shows how the sizes were chosen. GPT-2's shape on this text: config/shakespeare_124m.py.
"""

from configurator import Config

config = Config(
    dataset="shakespeare_bpe",
    vocab_size=2048,
    block_size=64,
    n_layer=3,
    n_head=4,
    n_embd=128,
    attention="blocked",
    batch_size=24,
    tokens_per_step=24 * 64,
    max_steps=4000,
    learning_rate=6e-3,
    min_lr=6e-5,
    weight_decay=0.7,  # 18 epochs: with the usual 0.1 it learns the text by heart, and dropout doubles a step's time on a CPU
    compile_scope="block",  # the first step compiles in less time than with the whole model
    log_interval=100,
    eval_interval=1000,
    sample_interval=1000,
)
