"""How each kind of result is shown: one function a kind, result -> blocks, every number computed from raw measurements."""

from collections.abc import Callable

from report import kinds_proof, kinds_runs, kinds_speed, render
from report.render import Block

KINDS: dict[str, Callable[[dict], list[Block]]] = {
    "ladder": kinds_speed.steps_table,
    "ablate": kinds_speed.steps_table,
    "candidates": kinds_speed.steps_table,
    "ab": kinds_speed.ab_table,
    "sampling": kinds_speed.sampling_table,
    "decode": kinds_speed.decode_table,
    "start": kinds_speed.start_table,
    "data": kinds_speed.data_table,
    "why": kinds_speed.why_table,
    "stages": kinds_runs.stages_table,
    "shakespeare": kinds_runs.shakespeare_table,
    "run": kinds_runs.run_table,
    "evaluate": kinds_runs.evaluate_table,
    "scale": kinds_runs.scale_table,
    "verify": kinds_proof.verify_table,
    "safety": kinds_proof.safety_table,
    "kills": kinds_proof.kills_table,
    "faults": kinds_proof.faults_table,
}
# Parts of a result that a document may show by words behind the path: `<!-- begin results/x/ladder.json r03_compile -->`
PARTS: dict[str, Callable[[dict, list[str]], list[Block]]] = {
    "ladder": kinds_speed.ladder_part,
    "verify": kinds_proof.verify_table,
    "shakespeare": kinds_runs.without_sample,
    "run": kinds_runs.without_sample,
}


def blocks(result: dict, words: list[str] | None = None) -> list[Block]:
    """A result as tables and paragraphs, or the part of it that words name. ValueError if there is no such kind or part."""
    kind = result.get("kind")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if not words:
        return KINDS[kind](result)
    if kind not in PARTS:
        raise ValueError(f"only a part of {' or '.join(PARTS)} can be shown, not of {kind}")
    return PARTS[kind](result, words)


def as_text(result: dict) -> str:
    """A result for a terminal."""
    return render.text(blocks(result))


def as_markdown(result: dict, words: list[str] | None = None) -> str:
    """A result, or the part of it that words name, as Markdown."""
    return render.markdown(blocks(result, words))
