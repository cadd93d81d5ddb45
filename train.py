"""Train a GPT.

    python train.py config/shakespeare.py                 one process
    torchrun --nproc_per_node=8 train.py CONFIG           one process per device
    python train.py config/shakespeare.py --max_steps=50 --compile=False
    python train.py out/shakespeare --max_steps=2000      resume a run with its own settings, a few of them changed
    python train.py config/gpt2_124m.py --plan            what it will take: memory, time, disk; touches no device
    python train.py config/shakespeare.py --prove_resume  kill a short run while it saves, resume it, compare every bit
    python train.py config/shakespeare.py --record_curve  train it three times: the loss curve that later runs compare with
    python train.py --replay out/<run>/crash_<step> --dtype=float32      run the step of a crash capsule again

Every setting of configurator.py is a flag: --name=value. Ctrl-C (or SIGTERM) ends the step, saves, and exits.
"""

import math
import shlex
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import configurator
import evaluate
import optim
import sample
from base import settings
from base.errors import UserError, entry, is_out_of_memory
from base.files import ROOT
from configurator import Config
from corpus.hellaswag import Row, encode_row, load_rows
from engine import checkpoint, folder, machine, parallel, restore
from engine.effective import effective, mismatches
from engine.journal import Journal, Progress, StepResult
from engine.outliers import TrainingStopped
from engine.run import Run, build
from forecast import curve
from safety import capsule
from safety.stop import Stop
from safety.watchdog import Watchdog

SAMPLE_TOKENS = 100  # of a text written while training


# ---- one step ---------------------------------------------------------------------------------------------------------


def accumulate(run: Run, step: int) -> Tensor:
    """Forward and backward of all micro-batches of a step: gradients of the mean loss. Returns this process's mean loss."""
    total = torch.zeros((), device=run.device)
    for micro in range(run.accumulation):
        x, y = run.next_batch(step, micro)
        last = micro == run.accumulation - 1
        with parallel.gradient_sync(run.train_model, on=last):
            with run.autocast():
                loss = run.train_model(x, y) / run.accumulation
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def train_step(run: Run, step: int) -> StepResult:
    """Optimizer step number `step` (0, 1, …). Its loss is the mean over the step's tokens, before the update.

    Raises TrainingStopped, with the parameters unchanged, if loss or gradient norm is not finite, or is an outlier and
    on_outlier="stop". Out of memory, a lone process halves its micro-batch and tries again; several cannot, in the middle of
    an exchange.
    """
    cfg, before = run.cfg, checkpoint.rng_states(run.device)
    while True:
        try:
            total = accumulate(run, step)
            break
        except RuntimeError as e:
            if not is_out_of_memory(e) or run.world.size > 1 or run.micro_batch == 1:
                raise
            why = str(e)
        run.halve_micro_batch(why, before)  # here, where the exception no longer holds on to the activations
    total = parallel.all_reduce_sum(total) / run.world.size
    run.scaler.unscale_(run.optimizer)
    gradient_norm = optim.gradient_norm(run.model)
    loss, norm = torch.stack((total, gradient_norm)).tolist()  # the host's one wait for the device in a step

    # fp16 overflows now and then by design: then the scaler skips the step and scales less
    bad = "loss" if not math.isfinite(loss) else "gradient norm" if not math.isfinite(norm) else None
    reason = outlier = None
    if bad == "loss" or (bad and not run.scaler.is_enabled()):
        remedy = "try a lower --learning_rate, a longer --warmup_steps, or --dtype=float32"
        reason = f"the {bad} is not finite (loss {loss}, gradient norm {norm}); {remedy}"
    else:
        outlier = run.outliers.judge(loss=loss, gradient_norm=norm)
        reason = f"{outlier} (on_outlier=stop)" if outlier and cfg.on_outlier == "stop" else None
    if reason:
        run.optimizer.zero_grad(set_to_none=True)
        raise TrainingStopped(step, reason, before)

    if cfg.grad_clip and norm > cfg.grad_clip:
        optim.clip(run.model, run.optimizer, cfg.grad_clip, gradient_norm)
    lr = optim.learning_rate(cfg, step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if not (outlier and cfg.on_outlier == "skip"):
        run.scaler.step(run.optimizer)
    optim.unclip(run.optimizer)
    run.scaler.update()
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1.0:
        raise TrainingStopped(step, "float16 gradients overflow at any scale; use --dtype=bfloat16 or float32", before)
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=loss, grad_norm=norm, lr=lr, outlier=outlier)


def fit_batch(run: Run) -> None:
    """Find a micro-batch that fits all processes, before they begin to exchange anything: one forward and backward pass
    each, beside memory for what the optimizer will keep. Leaves no trace but the compiled code.
    """
    before = checkpoint.rng_states(run.device)
    while True:
        why = None
        try:
            inner = optim.inner_optimizer(run.optimizer)
            mine = [p for group in inner.param_groups for p in group["params"]]
            moments = [] if inner.state else [torch.empty_like(p) for p in mine for _ in range(2)]
            with parallel.gradient_sync(run.train_model, on=False), run.autocast():
                loss = run.train_model(*run.read(0, 0))
            loss.backward()
            del moments, loss
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            why = str(e)
        if not parallel.any_rank(why is not None, run.device):
            run.model.zero_grad(set_to_none=True)
            checkpoint.set_rng_states(before, run.device)
            return
        if run.micro_batch == 1:
            raise RuntimeError(why or "out of memory in another process")
        run.halve_micro_batch(why or "in another process", before)


# ---- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Session:
    """A run under way: what the loop and its looks at the model share."""

    run: Run
    out: Path
    progress: Progress
    journal: Journal
    saver: checkpoint.Saver
    stop: Stop
    watchdog: Watchdog
    track: curve.Tracker
    hellaswag: list[Row]

    def due(self, interval: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens after this one."""
        return interval > 0 and self.progress.step % interval == 0

    @property
    def last(self) -> bool:
        return self.stop.asked or self.progress.step == self.run.cfg.max_steps


def loop(s: Session) -> None:
    """The steps from progress.step on. Each look at the model is a function of the session."""
    run, cfg, p = s.run, s.run.cfg, s.progress
    start = p.step
    for step in range(start, cfg.max_steps):
        with s.journal.waiting("compiling and first step", show=step == start):
            result = timed_step(run, step)
        p.advance(result)
        s.watchdog.beat(f"after step {p.step}")
        s.stop()
        s.journal.step(p, result, s.last)
        if step == start:
            check_effective(s)
        note_outlier(s, result)
        compare_with_curve(s, s.track.step(p.step, p.loss))
        if s.due(cfg.replica_interval):
            check_replicas(s)
        improved = (s.due(cfg.eval_interval) or p.step == cfg.max_steps) and validate(s)
        if s.due(cfg.hellaswag_interval):
            score_hellaswag(s)
        if s.due(cfg.sample_interval) and not s.last:
            write_sample(s)
        if s.saver.done():
            finish_save(s)
        if s.last or s.due(cfg.checkpoint_interval) or (improved and cfg.keep_best):
            save(s)
        if s.stop.asked:
            break


def first_look(s: Session) -> None:
    """Say the loss of the untrained model on one sequence, without compiling: the first step may compile for a minute. Every
    process must call it.
    """
    run = s.run
    x, y = run.read(0, 0)
    run.model.eval()  # draws nothing from the random states of training
    with torch.no_grad(), run.autocast(), torch.compiler.set_stance("force_eager"):
        loss = run.model(x[:1], y[:1]).item()
    run.model.train()
    uniform = f"ln {run.cfg.vocab_size} = {math.log(run.cfg.vocab_size):.2f}"
    s.journal.say(f"loss before training: {loss:.2f} on one sequence (all tokens equally likely: {uniform})")


def timed_step(run: Run, step: int) -> StepResult:
    """train_step() with the seconds until its work is done."""
    began = time.perf_counter()
    result = train_step(run, step)
    machine.synchronize(run.device)
    return replace(result, seconds=time.perf_counter() - began)


def check_effective(s: Session) -> None:
    """UserError if a setting that was asked for is not on. Reports what is."""
    run, on = s.run, effective(s.run)
    s.journal.write({"event": "effective", "effective": on})
    if wrong := mismatches(run, on):
        raise UserError("; ".join(wrong))
    compiled = f"{on['graphs']} compiled graphs ({on['graph_breaks']} breaks)" if run.cfg.compile else "not compiled"
    adamw = "fused" if on["fused_adamw"] else "unfused"
    attention = on["attention_kernel"].removeprefix("scaled_dot_product_")
    s.journal.say(f"running: {on['dtype']} matmuls, {attention}, {compiled}, {adamw} AdamW, {on['threads']} threads")
    if run.world.size > 1:
        held = ", ".join(f"{mib:,.1f}" for mib in on["state_mib"][:8]) + (", …" if run.world.size > 8 else "")
        s.journal.say(f"parameters, gradients and moments ({on['parallel']}): {held} MiB in processes 0, 1, …")


def note_outlier(s: Session, result: StepResult) -> None:
    cfg, step = s.run.cfg, s.progress.step
    if result.outlier:
        s.journal.event("outlier", step, what=result.outlier, on_outlier=cfg.on_outlier)
        s.journal.say(f"step {step:>6}: {result.outlier}; {s.run.outliers.count} so far")


def compare_with_curve(s: Session, verdict: str) -> None:
    """Report a verdict against the reference curve, if there is a new one, and what might be the cause if it is bad."""
    step = s.progress.step
    if verdict:
        s.journal.say(f"step {step:>6}: {verdict}")
    if causes := s.track.causes():
        s.journal.event("off_track", step, causes=causes)
        s.journal.say(f"step {step:>6}: {causes}")


def check_replicas(s: Session) -> None:
    """UserError if the processes no longer hold the same parameters."""
    if different := parallel.different_replicas(s.run.model):
        raise UserError(
            f"step {s.progress.step}: the processes no longer hold the same parameters ({', '.join(different[:3])}, "
            f"{len(different)} in all), so one of them computes wrongly: use --resume, and check that machine"
        )


def validate(s: Session) -> bool:
    """The loss on the validation split; whether it is the best so far. False if the run ends in the middle of it."""
    run, cfg, p = s.run, s.run.cfg, s.progress
    if s.stop.asked:
        return False
    began = time.perf_counter()
    found = validation(run, s.stop)
    s.watchdog.beat(f"after the validation of step {p.step}")
    if found is None:
        return False
    improved = p.validated(found["loss"])
    numbers = {"val_loss": found["loss"], "val_bits_per_byte": found["bits_per_byte"]}
    s.journal.write({"step": p.step} | numbers | {"eval_ms": 1e3 * (time.perf_counter() - began)})
    verdict = s.track.validated(p.step, p.val_loss)
    s.journal.say(
        f"step {p.step:>6}/{cfg.max_steps} | val_loss {p.val_loss:.4f} | {found['bits_per_byte']:.3f} bits per byte"
        + (f" | {verdict}" if verdict else "")
    )
    s.stop()
    return improved


def validation(run: Run, broken_off=lambda: False) -> dict | None:
    """evaluate.validation() of a run, in the shapes that it trains in. None if broken_off(), asked before each batch."""
    cfg = run.cfg
    sizes = dict(tokens=cfg.eval_tokens, T=cfg.T, batch_size=run.micro_batch, device=run.device)
    how = dict(autocast=run.autocast, world=run.world, broken_off=broken_off)
    return evaluate.validation(run.compiled, run.dataset.split("val"), run.dataset.tokenizer, **sizes, **how)


def score_hellaswag(s: Session) -> None:
    run, step = s.run, s.progress.step
    if s.stop.asked:
        return

    def broken_off() -> bool:
        s.watchdog.beat("in HellaSwag")
        return s.stop()

    sizes = dict(batch_tokens=run.micro_batch * run.cfg.T, autocast=run.autocast, world=run.world, broken_off=broken_off)
    found = evaluate.hellaswag(run.model, run.dataset.tokenizer, s.hellaswag, **sizes)
    s.watchdog.beat(f"after HellaSwag of step {step}")
    if found:
        s.journal.write({"step": step, "hellaswag": found["acc"], "hellaswag_norm": found["acc_norm"]})
        scores = f"HellaSwag acc {found['acc']:.4f} | acc_norm {found['acc_norm']:.4f}"
        s.journal.say(f"step {step:>6}/{run.cfg.max_steps} | {scores}")
        s.stop()


def write_sample(s: Session, count: int = 1) -> None:
    """Let the model write; draws nothing from the random states of training. Every process must call it."""
    run, tokenizer = s.run, s.run.dataset.tokenizer
    prompt = tokenizer.encode(run.cfg.sample_prompt) or [tokenizer.start]
    run.model.eval()
    how = dict(num_samples=count, temperature=0.8, top_k=200, seed=run.cfg.seed)
    with torch.compiler.set_stance("force_eager"):  # each length is a shape of its own
        columns = list(sample.generate(run.model, prompt, SAMPLE_TOKENS, **how))
    run.model.train()
    for ids in torch.stack(columns, dim=1).tolist():
        s.journal.say(f"sample | {run.cfg.sample_prompt}{tokenizer.decode(ids)}".replace("\n", "\n       | "))


def close_with_samples(s: Session) -> None:
    """The last lines of a run that reached its end: three texts, if it wrote any on the way, and what to run next."""
    cfg = s.run.cfg
    if cfg.sample_interval:
        write_sample(s, count=3)
    prompt = f" --prompt={shlex.quote(cfg.sample_prompt)}" if cfg.sample_prompt else ""
    s.journal.say(f"next: python sample.py {s.out}{prompt}")
    s.journal.say(f"      python train.py {s.out} --max_steps={2 * cfg.max_steps}")


def save(s: Session) -> None:
    """Begin to write a checkpoint, once the one before it is written."""
    cfg, p, began = s.run.cfg, s.progress, time.perf_counter()
    finish_save(s)
    s.saver.save(folder.snapshot(s.run, p), cfg.keep_checkpoints, p.best_step if cfg.keep_best else None)
    s.journal.event("saving", p.step, pause_ms=1e3 * (time.perf_counter() - began))
    s.watchdog.beat(f"after the save of step {p.step}")


def finish_save(s: Session, final: bool = False) -> None:
    """Wait for the save under way and report it. A full disk in the middle of a run is a warning; at its end it is an error."""
    cfg = s.run.cfg
    try:
        done = s.saver.wait()
    except UserError as e:
        s.journal.write({"event": "save_failed", "reason": str(e)})
        if final:
            raise
        print(f"WARNING: {e}; training continues, the next attempt is in {cfg.checkpoint_interval} steps", file=sys.stderr)
        return
    if done and s.run.world.is_main:
        place, seconds = done
        s.journal.event("saved", checkpoint.step_of(place), save_ms=1e3 * seconds)
        s.journal.say(
            f"saved {place} in {seconds:.1f} s" + (", in the background" if cfg.background_save and not final else "")
        )


# ---- a run, from its config to its end --------------------------------------------------------------------------------


def open_session(run: Run, watchdog: Watchdog) -> tuple[Session, list]:
    """Everything that a loop needs, and what must be released after it. UserError if the run cannot begin or resume here."""
    cfg, world, out = run.cfg, run.world, Path(run.cfg.out_dir)
    if cfg.wandb != "off" and find_spec("wandb") is None:
        raise UserError("wandb is not installed: run pip install wandb, or use --wandb=off")
    began_before = (out / "log.jsonl").is_file()
    resuming = cfg.resume is True or (cfg.resume == "auto" and bool(checkpoint.candidates(out)))
    progress = folder.resume(run, out) if resuming else Progress()
    parallel.barrier()  # a process that finds no checkpoint must not meet the folder of one that has begun
    # once nothing speaks against the run any more
    held = folder.claim(run, out, resuming or (cfg.resume == "auto" and began_before))
    parallel.barrier()
    journal = Journal(run, out, resumed=resuming)
    journal.say(f"config of {out}:\n{configurator.describe(cfg)}")
    if run.chosen:
        journal.say(textwrap.fill(f"chosen: {'; '.join(run.chosen)}", 120, subsequent_indent="  "))
    journal.say(
        f"{run.model.n_params() / 1e6:.2f}M parameters; {len(run.batches.stream):,} tokens, "
        f"{cfg.max_steps * cfg.tokens_per_step / len(run.batches.stream):.3g} epochs in {cfg.max_steps:,} steps; "
        f"step = {cfg.tokens_per_step} tokens = {run.accumulation} micro-batches x {run.micro_batch} sequences x "
        f"{cfg.T} tokens x {world.size} process(es)"
    )
    if 0 < cfg.max_steps <= cfg.warmup_steps:
        journal.say(
            f"warning: warmup_steps={cfg.warmup_steps} is all of max_steps={cfg.max_steps}: the learning rate never falls"
        )
    if cfg.compile and progress.step < cfg.max_steps:
        journal.say("compiling in the first step: a quarter of a minute to two minutes, less at the next start")
    where = machine.describe(run.device)
    journal.write({"event": "start", "step_done": progress.step, "config": asdict(cfg), "machine": where})
    rows = load_rows(cfg.data_dir, cfg.hellaswag_rows, journal.say) if cfg.hellaswag_interval else []
    for row in rows[:100]:  # not every tokenizer knows every character: known before the first step
        encode_row(row, run.dataset.tokenizer, cfg.block_size)
    session = Session(
        run=run,
        out=out,
        progress=progress,
        journal=journal,
        saver=checkpoint.Saver(out, world, parallel.shares_state(run.train_model, run.optimizer), cfg.background_save),
        stop=Stop(cfg, run.device),
        watchdog=watchdog,
        track=curve.tracker(cfg, run.dataset.sha256, journal.say),
        hellaswag=rows,
    )
    return session, [session.saver.close, journal.close, *([held.release] if held else [])]


def run_session(run: Run, watchdog: Watchdog) -> int:
    """All of a run but its building. Returns the signal that ended it, or 0."""
    s, closings = open_session(run, watchdog)
    cfg, p = run.cfg, s.progress
    try:
        if finished := p.step >= cfg.max_steps:
            more = f"python train.py {s.out} --max_steps={2 * p.step}"
            s.journal.say(f"{s.out} is finished at step {p.step}; use --max_steps=… to train on: {more}")
        elif run.world.size > 1 and cfg.parallel != "fsdp":
            fit_batch(run)  # under fsdp every pass is an exchange
        if p.step == 0 < cfg.max_steps:
            first_look(s)
        loop(s)
        with s.journal.waiting("saving"):
            finish_save(s, final=True)
        if p.step == cfg.max_steps and not s.stop.asked and not finished:
            close_with_samples(s)
        parallel.barrier()
    except TrainingStopped as stopped:
        raise UserError(capsule.report(run, s.out, stopped, folder.snapshot(run, Progress(step=stopped.step)))) from None
    finally:
        for close in closings:
            close()
    if s.stop.signals:
        s.journal.say(f"stopped by a signal after step {p.step}; to continue: python train.py {s.out}")
    elif s.stop.asked:
        s.journal.say(f"stopped after {cfg.max_minutes:g} minutes, after step {p.step}; to continue: python train.py {s.out}")
    return s.stop.signals[0] if s.stop.signals else 0


def train(cfg: Config) -> None:
    """A whole run: build, resume, step, validate, save. Exits with 128 + the number of a signal that ended it."""
    machine.keep_compiled_code()
    if parallel.attempt() and cfg.resume is False:
        cfg = replace(cfg, resume="auto")  # torchrun has restarted a run whose processes were killed
    run = build(cfg)
    watchdog = Watchdog(run.world, 60 * cfg.timeout_minutes)
    try:
        ended_by = run_session(run, watchdog)
    except RuntimeError as e:
        if not parallel.is_lost_peer(e):
            raise
        if watchdog.reporting:
            watchdog.join()  # it reports who is stuck, and ends the process
        lost = str(e).partition("\n")[0][:120]
        raise UserError(f"{watchdog.doing}: another process has ended ({lost}); checkpoints are intact: use --resume") from None
    finally:
        watchdog.close()
    run.close()
    if ended_by:
        sys.exit(128 + ended_by)


def load(argv: list[str]) -> Config:
    """The settings of a run: of a config file and flags, or of a run's folder, which is then resumed. UserError if neither is
    given."""
    places, flags = settings.split_positional(Config(), argv)
    if not argv:
        print("configs:")
        for path in sorted(p for p in (ROOT / "config").rglob("*.py") if p.name != "__init__.py"):
            print(f"  {path.relative_to(ROOT)!s:<40}{configurator.title_of(path)}"[:120])
        raise UserError("give a config file or a run: python train.py config/shakespeare.py")
    if len(places) == 1 and Path(places[0]).is_dir():
        out = Path(places[0])
        notes: list[str] = []  # about damaged checkpoints: resuming prints them
        try:
            trained = restore.read_config(restore.newest(out, notes.append))
        except UserError:
            print(*notes, sep="\n")
            raise
        return settings.parse(replace(trained, resume=True, out_dir=str(out), init_from=""), flags, __doc__)
    cfg = configurator.load(argv, __doc__)
    if cfg.resume is True and not places and checkpoint.candidates(Path(cfg.out_dir)):  # --resume --out_dir=out/run
        return load([cfg.out_dir, *flags])
    return cfg


def main(argv: list[str]) -> None:
    if argv and argv[0].partition("=")[0] == "--replay":
        place, flags = (argv[0][9:], argv[1:]) if "=" in argv[0] else ("".join(argv[1:2]), argv[2:])
        return capsule.replay(Path(place), flags, accumulate)
    if "--prove_resume" in argv:
        from safety import prove

        return prove.prove_resume([a for a in argv if a != "--prove_resume"])
    if "--plan" in argv:
        from forecast import plan

        return plan.main([a for a in argv if a != "--plan"], accumulate)
    if "--record_curve" in argv:
        return curve.record([a for a in argv if a != "--record_curve"])
    train(load(argv))


if __name__ == "__main__":
    entry(main)
