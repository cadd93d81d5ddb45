"""Which tokens each process sees at each step.

A batch is a pure function of (seed, step, rank, world size): there is no iterator whose state a checkpoint could lose. The
tokens come from a corpus.shards.TokenStream, memory-mapped shards read as one long sequence.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from corpus.shards import TokenStream


def sequence_count(stream: TokenStream, T: int, what: str) -> int:
    """How many whole sequences of T inputs with their targets a stream holds; UserError if none."""
    n = (len(stream) - 1) // T
    if n < 1:
        remedy = f"use --sequence_length={len(stream) - 1}" if len(stream) > 1 else "prepare a longer text"
        raise UserError(f"{what} has {len(stream)} tokens, too few for a sequence length of {T}: {remedy}")
    return n


class TrainBatches:
    """Which training tokens are seen when. Sequence number g = 0, 1, 2 … of the run lies in epoch g // n; each epoch is a
    new permutation of the n sequences, so each of its n·T target tokens is seen exactly once, whatever the batch or world
    size. The (tokens - 1) mod T that do not fill a sequence are left out at a different place in each epoch.
    """

    def __init__(self, stream: TokenStream, T: int, seed: int, order: str):
        self.stream, self.T, self.seed, self.order = stream, T, seed, order
        self.n = sequence_count(stream, T, "the training split")

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one long-lived object; a batch may straddle two epochs
    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        # Philox is counter-based: (seed, epoch) alone decides the numbers
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        offset = int(random.integers((len(self.stream) - 1) % self.T + 1))
        return offset, random.permutation(self.n)

    def start_of(self, g: int) -> int:
        """Position in the stream of the g-th sequence of the run."""
        if self.order == "shuffled":
            offset, permutation = self._epoch(g // self.n)
            return offset + int(permutation[g % self.n]) * self.T
        return g % self.n * self.T  # sequential

    def batch(
        self, step: int, micro: int, batch_size: int, accumulation: int, rank: int, world_size: int
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch_size, T) int64 each, of one forward pass of one process.

        The sequences of a step are dealt out micro-step by micro-step, then rank by rank: which of them belong to the step
        depends on their number alone.
        """
        first = (micro * world_size + rank) * batch_size
        if self.order != "one_batch":
            first += step * accumulation * world_size * batch_size
        starts = [self.start_of(g) for g in range(first, first + batch_size)]
        tokens = torch.from_numpy(np.stack([self.stream.read(s, self.T + 1) for s in starts]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def validation_batches(stream: TokenStream, T: int, limit: int, batch_size: int, rank: int, world_size: int):
    """Yield (inputs, targets) that cover the first `limit` target tokens of a split once, in order, over all ranks.

    Shapes are always (batch_size, T), so that a compiled model sees one shape; what lies past the end has target -100.
    Every rank yields equally often.
    """
    sequence_count(stream, T, "the validation split")
    total = min(len(stream) - 1, limit)
    rows = -(-total // T)
    for first in range(rank * batch_size, rows + rank * batch_size, world_size * batch_size):
        x = np.zeros((batch_size, T), dtype=np.int64)
        y = np.full((batch_size, T), -100, dtype=np.int64)
        for row in range(first, min(first + batch_size, rows)):
            start = row * T
            tokens = stream.read(start, min(T, total - start) + 1)
            x[row - first, : len(tokens) - 1], y[row - first, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        yield torch.from_numpy(x), torch.from_numpy(y)
