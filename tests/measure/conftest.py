"""What the tests of measuring share: workers that answer at once."""

import pytest
from stand_ins import CEILINGS, result

from configurator import Config
from measure import ab, ladder
from measure.ladder import Rung


@pytest.fixture
def workers(monkeypatch):
    """workers(answer) -> the list of (config, keywords) of the processes that would have been started."""

    def arrange(answer=result) -> list[tuple[Config, dict]]:
        started = []

        def in_fresh_process(cfg, what="measure", **how):
            if what == "ceilings":
                return CEILINGS
            started.append((cfg, how))
            return answer(cfg)

        for module in (ladder, ab):
            monkeypatch.setattr(module, "in_fresh_process", in_fresh_process)
        return started

    return arrange


@pytest.fixture
def rungs() -> list[Rung]:
    """The real ones."""
    return ladder.load_ladder()


@pytest.fixture
def available(monkeypatch, rungs):
    """available(*names of settings): where a rung changes one of these, it is not available; everything else is."""

    def arrange(*refused: str) -> None:
        plain = rungs[0].cfg

        def reason(cfg: Config, device) -> str | None:
            off = [f for f in refused if getattr(cfg, f) != getattr(plain, f)]
            return f"no {off[0]} here" if off else None

        monkeypatch.setattr(ladder, "unavailable", reason)
        monkeypatch.setattr(ladder, "pointless", lambda cfg, device: None)

    return arrange
