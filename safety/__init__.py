"""What keeps a run from losing work, and what shows that it does: when to stop (signals, time limits), what to do about a
stuck process, the crash capsule of a step that went wrong and its replay, and the proof that a killed and resumed run is the
run that was never interrupted. Checkpoints are in engine/, since every script reads them; what counts as an outlier is in
engine/outliers.py. Nothing here imports a script: a function of train.py that is needed is passed in.
"""
