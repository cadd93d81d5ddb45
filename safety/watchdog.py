"""Watchdog: ends a run whose processes are stuck, and names the one that is."""

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from base.files import ROOT
from engine.parallel import World


class Watchdog(threading.Thread):
    """Ends this process, and reports which one is stuck, if nothing has called beat() for so many seconds.

    A collective waits for the slowest process, so when one is stuck all are. Each then writes to the store where it is; one
    that writes nothing does not answer. This is a thread, since the main one may be waiting in a collective, and it ends the
    process by os._exit, since no clean-up can be relied on. What was saved stays saved.
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
        """Note that the run makes progress, and what it is doing."""
        self.last, self.doing = time.monotonic(), doing

    def run(self) -> None:
        pause = min(1.0, self.seconds / 4)
        while True:
            before = time.monotonic()
            if self.ended.wait(pause):
                return
            if time.monotonic() - before > pause + self.seconds / 2:
                self.last = time.monotonic()  # this process itself was stopped meanwhile, and continues
            if time.monotonic() - self.last > self.seconds:
                self.reporting = True
                self.report()
                os._exit(2)

    def where(self) -> str:
        """File (as a path in the repository) and line of this program at which the main thread is."""
        frame = sys._current_frames().get(self.main)
        while frame:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
                return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
        return "an unknown place"

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
            told, says = {self.world.rank: ""}, f"the store, kept by rank 0 or torchrun, does not answer either ({e})"
        if self.world.rank == min(told):
            line = f"[rank {self.world.rank}] error: nothing has finished for {self.seconds:.0f} s (timeout_minutes): {says}"
            print(f"{line}; saved checkpoints are intact: use --resume", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)  # until that one has reported: its collective fails once this process ends

    def close(self) -> None:
        self.ended.set()
