"""Text -> token ids as arrays, in a form that travels to worker processes."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import tiktoken

from corpus import pool
from corpus.shards import bytes_per_token
from tokenizer import END_OF_TEXT, Tokenizer

ALONE = 4  # batches; fewer are done before a worker has started
Batch = dict[str, list[tuple[str | bytes, bool]]]  # split -> texts, each with whether <|endoftext|> goes before it
Tag = TypeVar("Tag")


class CannotEncode(ValueError):
    """A text has a character that the tokenizer does not know, or is not UTF-8."""


class Encoder:
    """A tokenizer's encode(), as arrays."""

    def __init__(self, tokenizer: Tokenizer):
        self.end_of_text = tokenizer.end_of_text
        self.dtype = np.dtype(f"<u{bytes_per_token(tokenizer)}")
        self.characters = getattr(tokenizer, "characters", None)
        if self.characters:
            points = np.array([ord(c) for c in self.characters])
            self.id_of = np.full(points.max() + 2, -1, dtype=np.int64)  # the last place: any character above
            self.id_of[points] = np.arange(len(points))
        else:
            # Made anew, because one that tiktoken knows by name would travel by name, and be looked for in files. It needs a
            # special token: with none, tiktoken's search for special ones stops at each character.
            known = tokenizer._encoding
            self.bpe = tiktoken.Encoding(
                tokenizer.name,
                pat_str=known._pat_str,
                mergeable_ranks=known._mergeable_ranks,
                special_tokens={END_OF_TEXT: self.end_of_text},
            )

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids that the tokenizer's encode() gives; bytes are UTF-8. CannotEncode names a character that has none."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as e:
                raise CannotEncode(f"{text[e.start : e.end]!r} is not UTF-8") from None
        if self.characters:
            points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
            ids = self.id_of[np.minimum(points, len(self.id_of) - 1)]
            if len(ids) and ids.min() < 0:
                unknown, known = text[int(np.argmin(ids))], len(self.characters)
                raise CannotEncode(f"the character {unknown!r} is not among the {known} that the tokenizer knows")
            return ids
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())  # '<|endoftext|>' inside a text is text
        except UnicodeEncodeError:  # half of a surrogate pair: as tiktoken's other methods do it
            whole = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
            return self.bpe.encode_to_numpy(whole, disallowed_special=())

    def encode_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """split -> ids of its texts, one behind the other."""
        found = {}
        for split, texts in batch.items():
            parts: list = []
            for text, separated in texts:
                parts += [[self.end_of_text]] * (separated and self.end_of_text is not None)
                parts.append(self.encode(text))
            found[split] = np.concatenate(parts, dtype=self.dtype, casting="unsafe")
        return found


def encode(
    tokenizer: Tokenizer, batches: Iterable[tuple[Tag, Batch]], processes: int
) -> Iterator[tuple[Tag, dict[str, np.ndarray]]]:
    """Each batch's tag and ids, in order, whatever the number of processes."""
    return pool.map_in_order(Encoder(tokenizer).encode_batch, batches, processes, ALONE)
