"""Kernels that replace a part of the model where the hardware suits them, each beside its plain reference: the tests compare
it with model.py in float64. A kernel here wraps a model from outside and gives the same numbers but for rounding. What
approximates, or changes the mathematics, belongs in variants/.
"""
