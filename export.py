"""Write a model in the Hugging Face layout, for transformers and everything that reads it.

    python export.py out/shakespeare exported      a run, a checkpoint, a model folder or gpt2; then a new folder

AutoModelForCausalLM.from_pretrained("exported") and AutoTokenizer.from_pretrained("exported") read it. If transformers is
installed, it reads the export back and its logits are compared before success is reported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from base import settings
from base.errors import UserError, entry


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How to export."""

    to: Literal["hf"] = "hf"
    """the layout: Hugging Face's, with its tokenizer"""


def main(argv: list[str]) -> None:
    places, flags = settings.split_positional(ExportConfig(), argv)
    settings.parse(ExportConfig(), flags, __doc__)
    if len(places) != 2:
        raise UserError("use python export.py out/shakespeare exported (a model, then a folder that does not exist yet)")
    from engine import pretrained, restore  # after --help

    model, tokenizer = restore.load_model(places[0])
    pretrained.export_hf(model, tokenizer, Path(places[1]), print)


if __name__ == "__main__":
    entry(main)
