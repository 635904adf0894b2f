"""The training loops of examples/ run, and their losses fall."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def in_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_plain_loop(dtype):
    from train import train

    losses = train(steps=12, batch=2, dtype=dtype)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.slow
def test_plain_loop_with_two_processes():
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", "--steps", "20"],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    steps = re.findall(r"(\d+)  cross-entropy ([\d.]+)  contrast ([\d.]+)", result.stdout)
    assert [row[0] for row in steps] == ["10", "20"]  # the first rank prints, the other is silent
    assert float(steps[1][1]) < float(steps[0][1])


def test_volumes():
    from volumes import train

    losses = train(steps=12, batch=1)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_lightning(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed; pip install lightning")
    from lightning_module import main

    trainer = main(
        max_steps=12,
        log_every_n_steps=1,
        accelerator="cpu",
        precision="bf16-mixed",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    assert trainer.global_step == 12
    assert trainer.callback_metrics["contrast"] > 0
    assert trainer.callback_metrics["cross_entropy"] < 1.4  # chance is log 5 = 1.6
    heads = {id(p) for p in trainer.model.model.contextrast_heads.parameters()}
    assert heads <= {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def test_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed; pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="accelerate is not installed; pip install transformers accelerate")
    from transformers_trainer import main

    trainer = main(
        **{"output_dir": str(tmp_path), "max_steps": 12, "logging_steps": 3, "per_device_train_batch_size": 2},
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no"},
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert not hasattr(trainer.model.model, "contextrast_heads")
    assert trainer.evaluate()["eval_loss"] > 0
