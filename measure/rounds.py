"""What commands share that measure again and again: a line for each finished measurement, and Ctrl-C keeps what is finished."""

import statistics

from tqdm import tqdm

from base.errors import UserError


def say(name: str, result: dict) -> None:
    """One line of a finished measurement: ms per step and tokens/s, or why there are none."""
    if "error" in result:
        line = f"skipped: {result['error']}"
    else:
        seconds = statistics.median(result["step_s"][result["warmup"] :])
        line = f"{1e3 * seconds:>9,.1f} ms {result['requested']['tokens_per_step'] / seconds:>9,.0f} tok/s"
    tqdm.write(f"{name:<32} {line}")


class UntilCtrlC:
    """`with UntilCtrlC() as until:` Ctrl-C ends the block, not the command."""

    interrupted = False

    def __enter__(self) -> "UntilCtrlC":
        return self

    def __exit__(self, kind: type | None, *_: object) -> bool:
        self.interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        return self.interrupted

    def note(self, finished: object) -> dict:
        """What a result says of it, nothing as a rule. UserError if nothing was finished."""
        if self.interrupted and not finished:
            raise UserError("stopped before the first measurement was finished: there is nothing to keep")
        return {"interrupted": True} if self.interrupted else {}
