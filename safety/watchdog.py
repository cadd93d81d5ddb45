"""A process that is stuck: who it is, and an end to it."""

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from base.files import ROOT
from engine.parallel import World


class Watchdog(threading.Thread):
    """Ends this process, and says who is stuck, if nothing here has called beat() for so many seconds.

    A collective waits for the slowest process, so when one is stuck all are. Each then tells the store where it stands; who
    tells nothing does not answer. It is a thread, since the main one may be waiting inside a collective, and it leaves
    by os._exit, since no clean-up can be relied on: what was saved stays saved.
    """

    def __init__(self, world: World, seconds: float):
        super().__init__(name="watchdog", daemon=True)
        self.world, self.seconds = world, seconds
        self.main = threading.main_thread().ident
        self.ended, self.reporting = threading.Event(), False
        self.beat("starting")
        if world.store is not None:
            self.start()

    def beat(self, doing: str) -> None:
        """Note that the run goes on, and with what."""
        self.last, self.doing = time.monotonic(), doing

    def run(self) -> None:
        pause = min(1.0, self.seconds / 4)
        while True:
            before = time.monotonic()
            if self.ended.wait(pause):
                return
            if time.monotonic() - before > pause + self.seconds / 2:
                self.last = time.monotonic()  # this process itself was stopped meanwhile, and goes on again
            if time.monotonic() - self.last > self.seconds:
                self.reporting = True
                self.report()
                os._exit(2)

    def where(self) -> str:
        """File and line of this program at which the main thread stands."""
        frame, home = sys._current_frames().get(self.main), str(ROOT)
        while frame and not (frame.f_code.co_filename.startswith(home) and "site-packages" not in frame.f_code.co_filename):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "an unknown place"

    def report(self) -> None:
        """Print one line, from the first process that can."""
        store, ranks = self.world.store, range(self.world.size)
        try:
            store.set_timeout(timedelta(seconds=5))
            store.set(f"stuck/{self.world.rank}", f"{self.doing}, at {self.where()}")
            time.sleep(3.0)  # for the others to do the same
            told = {r: store.get(f"stuck/{r}").decode() for r in ranks if store.check([f"stuck/{r}"])}
            silent = [f"rank {r} does not answer" for r in ranks if r not in told]
            says = "; ".join(silent + [f"rank {r} waits ({text})" for r, text in told.items()][:4])
        except RuntimeError as e:
            told, says = {self.world.rank: ""}, f"nor does the store answer, which rank 0 or torchrun kept ({e})"
        if self.world.rank == min(told):
            print(
                f"[rank {self.world.rank}] error: nothing has finished for {self.seconds:.0f} s (timeout_minutes): {says}; "
                f"saved checkpoints are untouched: type --resume",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(2.0)  # that one's exchange fails once this process has gone

    def close(self) -> None:
        self.ended.set()
