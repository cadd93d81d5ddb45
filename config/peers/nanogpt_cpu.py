"""What nanoGPT's train.py does on a CPU, for comparison: float32, torch.compile, SDPA, 50,304 rows, AdamW as a loop.

    python bench.py ab config/peers/nanogpt_cpu.py config/ladder/r10_blocked.py --batch_size=4 --sequence_length=256

There, autocast is for GPUs alone and `fused` for CUDA alone; rows are padded, which here as there changes no loss to speak of.
"""

from dataclasses import replace

from config.ladder.r00_fp32 import config as plain

config = replace(plain, compile=True, attention="sdpa", vocab_multiple=128)
