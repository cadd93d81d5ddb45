"""measure/decoding.py: what is measured, on real models."""

import json

import pytest
import torch

import bench
import train
from configurator import Config
from kernels import decode
from measure import decoding
from measure.config import BenchConfig
from report import kinds
from variants import quantize

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_command_measures_every_form(tmp_path, capsys, own_signals):
    bench.main(["decode", "--device=cpu", "--n_layer=1", "--quick", f"--out={tmp_path}"])
    (path,) = tmp_path.glob("*/decode.trial.json")
    found = json.loads(path.read_text())
    expected = {f"{form}, PyTorch" for form in ("float32", "bfloat16", "int8", "int4")} | {"bfloat16, transformers"}
    expected |= {"bfloat16, kernels/decode.c", "int8, kernels/decode.c"} if not isinstance(decode.build(), str) else set()
    assert {way["name"] for way in found["ways"]} == expected
    C, V = 768, 50304
    read = {way["form"]: way["bytes_per_token"] for way in found["ways"]}
    assert read["float32"] == 2 * read["bfloat16"]
    assert read["bfloat16"] == pytest.approx(2 * (12 * C * C + V * C), rel=0.01)  # and some vectors
    assert read["int8"] == pytest.approx(read["bfloat16"] / 2, rel=0.02)
    assert read["int4"] == pytest.approx(read["bfloat16"] / 4 * 1.25, rel=0.02)  # 4 bits of scale and middle for 32 of 4 bits
    assert found["validation"] == {}
    assert kinds.as_text(found) in capsys.readouterr().out


def test_a_run_is_validated_in_every_form(tiny_run, tmp_path, own_signals):
    train.train(Config(**tiny_run | dict(out_dir=str(tmp_path / "run"), n_embd=64, max_steps=30)))
    sizes = BenchConfig(data_dir=tiny_run["data_dir"], rounds=1, device="cpu")
    found = decoding.decode([str(tmp_path / "run")], sizes, CPU)
    losses = {form: v["loss"] for form, v in found["validation"].items()}
    assert set(losses) == {"float32", "bfloat16", *quantize.FORMS}
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses["float32"] == pytest.approx([r["val_loss"] for r in records if "val_loss" in r][-1], abs=1e-5)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    assert losses["int8"] == pytest.approx(losses["bfloat16"], abs=0.02)
    assert losses["int4"] != losses["int8"]
    assert found["prompt_tokens"] + found["new_tokens"] <= 32  # of the block: the window does not move


def test_sampling_times_both_ways_and_compares_the_tokens(monkeypatch):
    sizes = BenchConfig(n_layer=1, quick=True, device="cpu").by_device("cpu")
    found = decoding.sampling(sizes, CPU)
    assert found["same_tokens"]
    assert {how: len(speeds) for how, speeds in found["tokens_per_s"].items()} == {"cached": 1, "uncached": 1}
    monkeypatch.setattr(decoding, "timed_generate", lambda *args, kv_cache: (1.0, [torch.tensor([int(kv_cache)])]))
    assert not decoding.sampling(sizes, CPU)["same_tokens"]
