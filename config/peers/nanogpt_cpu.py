"""What nanoGPT's train.py does on a CPU, for comparison: float32, torch.compile, SDPA, 50,304 rows, AdamW as a loop.

    python bench.py ab config/peers/nanogpt_cpu.py top

nanoGPT uses autocast only on GPUs and fused AdamW only on CUDA. Hardware: any CPU. Expect: the ratio of
results/amd-epyc-family-26-model-2-avx512-bf16-2-cores/ab_nanogpt_cpu_top.json, at the same losses.
"""

from dataclasses import replace

from config.ladder.r00_fp32 import config as plain

config = replace(plain, compile=True, attention="sdpa", vocab_multiple=128)
