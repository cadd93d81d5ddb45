"""What the tests of the engine share: a trained model and its checkpoint, and forms of the tiny run."""

from dataclasses import replace
from pathlib import Path

import pytest
from trained import Trained, make

from configurator import Config


@pytest.fixture
def plain(cfg) -> Config:
    """The tiny run with every toggle named, and in its plain form."""
    off = dict(attention="naive", vocab_multiple=1, fp32_precision="ieee", fused_adamw=False, prefetch=False)
    return replace(cfg, **off, dropout=0.0)


@pytest.fixture
def uneven(cfg) -> Config:
    """The tiny run, without dropout: its 18 characters are no multiple of 4, so shares of processes differ in size."""
    return replace(cfg, dropout=0.0, learning_rate=1e-3, fused_adamw=True)


@pytest.fixture
def trained(tiny) -> Trained:
    return make(tiny(n_layer=1))


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """One checkpoint, of step 10, in a run's folder."""
    return trained.save(tmp_path / "run", 10)
