"""Other models made out of a GPT: convert(model, ...) replaces some of its modules and leaves model.py as it is. Quantisation
is here; LoRA or mixtures of experts would be. A variant computes something else than the model it came from, so it is judged
by the loss that it reaches and by what it costs. What computes the same, faster, belongs in kernels/.
"""
