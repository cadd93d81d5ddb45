"""Stage 1: inference. GPT-2's shape with random weights; `python sample.py gpt2` uses OpenAI's, from the hub.

    python sample.py config/stages/s1_inference.py --prompt "Hello, I'm a language model,"

Hardware: any. Expect: random words. Every token is about equally likely: such a model's loss is near ln 50257 = 10.825.
"""

from configurator import Config

config = Config()
