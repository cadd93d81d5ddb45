"""Scaling laws of small models: a family of them (family.py), trained in worker processes (training.py), a law fitted to their
losses (fit.py) and checked by predicting a larger run before it is trained (study.py). How one model trains does not belong
here: that is train.py's.
"""
