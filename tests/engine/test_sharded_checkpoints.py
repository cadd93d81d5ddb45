"""Checkpoints of several processes: any layout resumes any other, odd shares are refused, full disks are survived by all."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from runs import equal, merged, state
from trained import seal

import train
from base import errors
from base.errors import UserError
from configurator import Config
from engine import checkpoint, folder, parallel, restore
from engine.journal import Progress
from engine.run import build
from model import GPT

CPU = torch.device("cpu")


@pytest.fixture
def cfg(uneven) -> Config:
    return uneven


# ---- saved by one layout, resumed by another ----------------------------------------------------------------------------

LAYOUTS = [("ddp", 1), ("zero1", 2), ("fsdp", 2), ("fsdp", 4)]


def save(cfg: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(the state after two steps, which is saved, and the losses of the next two, which run meanwhile)."""
    run, out = build(cfg), Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for step in range(2):
        train.train_step(run, step)
    before = state(run)
    saver = checkpoint.Saver(out, run.world, parallel.shares_state(run.train_model, run.optimizer), background=True)
    saver.save(folder.snapshot(run, Progress(step=2)), 1, None)
    numbers = [train.train_step(run, step).loss for step in (2, 3)]
    saver.wait()
    saver.close()
    parallel.barrier()
    run.close()
    return before, numbers


def resumed(cfg: Config, folders: list[Path]) -> list[tuple[dict[str, torch.Tensor], list[float]]]:
    """(the state as loaded, the losses of the next two steps) from each of some runs."""
    run = build(cfg)
    found = []
    for out in folders:
        assert folder.resume(run, out).step == 2
        found.append((state(run), [train.train_step(run, step).loss for step in (2, 3)]))
    run.close()
    return found


@pytest.fixture(scope="module")
def saved(tiny_run, tmp_path_factory) -> dict[tuple[str, int], tuple]:
    """{layout: (run's folder, the state in it, the losses of the two steps after it)}."""
    home, found = tmp_path_factory.mktemp("layouts"), {}
    for kind, world in LAYOUTS:
        out = home / f"{kind}_{world}"
        cfg = Config(**tiny_run | dict(learning_rate=1e-3, parallel=kind, out_dir=str(out)))
        parts = ranks.run(world, home / f"{out.name}_ranks", save, cfg) if world > 1 else [save(cfg)]
        found[kind, world] = out, merged([p[0] for p in parts]), parts[0][1]
    return found


@pytest.mark.parametrize(("kind", "world"), [*LAYOUTS[:3], pytest.param(*LAYOUTS[3], marks=pytest.mark.slow)])
def test_any_layout_resumes_any_other(cfg, saved, tmp_path, kind, world):
    """Bit for bit, then the same losses within the rounding of other sums; and each layout is a model to sample from."""
    cfg, folders = replace(cfg, parallel=kind), [out for out, _, _ in saved.values()]
    parts = ranks.run(world, tmp_path / "ranks", resumed, cfg, folders) if world > 1 else [resumed(cfg, folders)]
    for number, (_, expected, losses) in enumerate(saved.values()):
        assert len(expected) == 4 * len(list(GPT(cfg).named_parameters()))
        assert equal(merged([p[number][0] for p in parts]), expected)
        assert parts[0][number][1] == pytest.approx(losses, rel=1e-5)
    model = restore.load_model(str(saved[kind, world][0]))[0]
    assert equal(dict(model.named_parameters()), {n: saved[kind, world][1][n] for n, _ in model.named_parameters()})


@pytest.mark.parametrize("layout", [("zero1", 2), ("fsdp", 4)])
def test_shares_that_do_not_make_a_whole_are_refused(saved, layout, tmp_path):
    """Even where the manifest was made to fit: nothing is left as it happened to be. Shares are those of no other model."""
    out, expected, _ = saved[layout]
    place = restore.newest(Path(shutil.copytree(out, tmp_path / "run")))
    share, first = sorted(place.glob("shard-*.safetensors"))[1::-1]
    content, tensors = share.read_bytes(), safetensors.torch.load_file(share)
    with safetensors.safe_open(share, "pt") as f:
        metadata = f.metadata()
    name = next(n for n in tensors if n.startswith("exp_avg.") and tensors[n].dim() == 2)
    one, kind = tensors[name].clone(), next(iter(metadata))

    def rewritten(tensors: dict, metadata: dict):
        return lambda: safetensors.torch.save_file(tensors, share, metadata)

    odd_tensors = [{name: one[:-1].clone()}, {name: one.long()}, {"exp_avg.of.nothing": one}]
    odd_metadata = ["{}", "[" * 9, metadata[kind].replace("0", "1"), metadata[kind].replace("[", "[-7, ")]
    forgeries = [
        share.unlink,
        lambda: share.write_bytes(pickle.dumps(tensors)),
        lambda: share.write_bytes(first.read_bytes()),
        rewritten({n: t for n, t in tensors.items() if n != name}, metadata),
        *(rewritten(tensors | change, metadata) for change in odd_tensors),
        *(rewritten(tensors, metadata | {kind: text}) for text in odd_metadata),
        rewritten(tensors, {}),
    ]
    run = build(replace(restore.read_config(place), parallel="ddp"))

    def loaded() -> bool:
        """Whether all is what was saved, after a manifest that fits and a load into other weights."""
        seal(place)
        restore.verify(place)
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(9.0)
        restore.load_weights(place, run.model)
        restore.load_training(place, run.model, run.optimizer, 0, CPU)
        return equal(state(run), expected)

    for number, forge in enumerate(forgeries):
        forge()
        message = str(place)
        try:
            assert loaded(), f"forgery {number} was taken"  # one that changes nothing may be
        except UserError as e:
            message = str(e)
        assert str(place) in message or share.name in message
        assert "\n" not in message
        share.write_bytes(content)
    assert loaded()


PLACES = {
    "shares": (dcp.HuggingFaceStorageWriter, "write_data"),
    "folder": (Path, "mkdir"),
    "final": (checkpoint, "write_config"),
}


def full_disk(cfg: Config, where: str, rank: int, step: int) -> list[str]:
    """A run in which that process meets a full disk at that step: what is left in its folder."""
    owner, name = PLACES[where]
    plain = getattr(owner, name)

    def full(target, *args, **how):
        if int(os.environ["RANK"]) == rank and f"step_{step:08d}" in str(getattr(target, "path", target)):
            raise OSError(28, "No space left on device")
        return plain(target, *args, **how)

    setattr(owner, name, full)
    errors.entry(lambda _: train.train(cfg))
    return sorted(p.name for p in Path(cfg.out_dir).iterdir() if "step_" in p.name)


@pytest.mark.parametrize(
    ("kind", "where", "rank"), [("zero1", "shares", 1), ("fsdp", "shares", 0), ("fsdp", "folder", 0), ("zero1", "final", 0)]
)
def test_shared_saves_survive_a_full_disk(cfg, tmp_path, kind, where, rank):
    """Of any process: the run continues with a warning, and the next save is whole."""
    cfg = replace(cfg, parallel=kind, checkpoint_interval=2, eval_interval=6, keep_checkpoints=3)
    with ranks.started(2, tmp_path / "ranks", full_disk, cfg, where, rank, 4) as found:
        ranks.wait(found, 40)
        assert [r.value for r in found] == [["step_00000002", "step_00000006"]] * 2
        output = found[0].stderr + found[1].stderr
    assert "No space left on device" in output
    assert "training continues" in output
    assert restore.newest(Path(cfg.out_dir)).name == "step_00000006"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("why", ["not a run", "No space left on device"])
def test_what_only_the_first_process_finds_ends_all(cfg, tmp_path, kind, why):
    """It reports why, and the others do not bury that under tracebacks. At the end, a save that fails is an error."""
    if why == "not a run":
        Path(cfg.out_dir).mkdir()
        (Path(cfg.out_dir) / "thesis.txt").write_text("years of work")
    with ranks.started(2, tmp_path / "ranks", full_disk, replace(cfg, parallel=kind), "final", 0, 6) as found:
        ranks.wait(found, 30)
        assert found[0].status == 2
        assert found[1].status not in (0, None)
        lines = [r.stderr.splitlines() for r in found]
    assert lines[0][-1].startswith("[rank 0] error: ")
    assert why in lines[0][-1]
    assert len(lines[0]) == 1
    assert len(lines[1]) <= 1, lines[1][-1]
