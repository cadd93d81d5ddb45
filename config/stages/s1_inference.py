"""Stage 1: inference. GPT-2's shape with random weights; with OpenAI's it is `python sample.py gpt2` (needs the hub).

    python sample.py config/stages/s1_inference.py --prompt "Hello, I'm a language model,"

Expect: word salad, every token about equally likely (the loss of such a model is near ln 50257 = 10.825).
"""

from configurator import Config

config = Config()
