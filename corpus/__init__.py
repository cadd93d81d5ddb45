"""From text to checked token shards: where documents come from, encoding on all cores, training a BPE, the shard format and its
writer, HellaSwag's questions. Nothing here, and nothing that it imports, may import torch: worker processes start quickly and
stay small. What a model sees when is data.py's subject, and text <-> ids tokenizer.py's.
"""
