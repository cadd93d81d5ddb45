"""Raw measurements in results/<hardware>/*.json become what people read: text for a terminal, the generated blocks of README.md
and docs/, plots, and the page docs/index.html. Statistics and the comparison of two results belong here. Measuring does not:
these files read JSON and never import torch, so the figures can be checked on any machine. Run it as `python -m report`.
"""
