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


def test_the_volume_example_lowers_the_loss():
    from volumes import train

    losses = train(steps=12, batch=1)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_lightning_example_trains(tmp_path):
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


def test_the_transformers_example_trains(tmp_path):
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


def nnunet_plans(spacing):
    """A plan with a network of four stages, for patches of 16 pixels a side."""
    dims = len(spacing)
    network = {
        **{"n_stages": 4, "features_per_stage": [4, 8, 8, 8], "conv_op": f"torch.nn.modules.conv.Conv{dims}d"},
        **{"kernel_sizes": [[3] * dims] * 4, "strides": [[1] * dims, *[[2] * dims] * 3]},
        **{"n_conv_per_stage": [1] * 4, "n_conv_per_stage_decoder": [1] * 3, "conv_bias": True},
        **{"norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d", "norm_op_kwargs": {"affine": True}},
        **{"dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {}},
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    configuration = {
        **{"data_identifier": "tiny", "batch_size": 2, "patch_size": [16] * dims, "spacing": spacing},
        **{"batch_dice": False, "normalization_schemes": ["ZScoreNormalization"]},
        "architecture": {"network_class_name": name, "arch_kwargs": network, "_kw_requires_import": imported},
    }
    return {
        **{"dataset_name": "Dataset001_Tiny", "plans_name": "tiny", "continue_training": False},
        **{"label_manager": "LabelManager", "configurations": {"tiny": configuration}},
    }


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [[1.0, 1.0], [2.5, 1.0, 1.0]], ids=["maps", "volumes"])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_nnunet_trainer_trains_and_reloads(tmp_path, monkeypatch, spacing, ignored):
    """Training steps train the heads and lower the loss, validation has nnU-Net's own loss, and checkpoints reload."""
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed; pip install nnunetv2")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    data = tmp_path / "Dataset001_Tiny" / "tiny"
    data.mkdir(parents=True)
    (data / "case.npz").touch()  # nnU-Net reads the type of its data from the names
    from nnunet_trainer import nnUNetTrainerContextrast

    names = {"background": 0, "a": 1, "b": 2, **({"ignore": 3} if ignored else {})}
    dataset = {"labels": names, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
    torch.manual_seed(0)
    trainer = nnUNetTrainerContextrast(nnunet_plans(spacing), "tiny", 0, dataset, torch.device("cpu"))
    trainer.initialize()
    network = trainer.network

    labels = torch.randint(0, 3 + ignored, (2, 1, *[4] * len(spacing)))
    for axis in range(2, labels.ndim):
        labels = labels.repeat_interleave(4, axis)
    targets = [labels[(..., *[slice(None, None, 2**i)] * len(spacing))].short() for i in range(3)]
    batch = {"data": labels.float() + 0.1 * torch.randn(labels.shape), "target": targets}
    network.train()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(p.grad.any() for p in network.contextrast_heads.parameters() if p.ndim > 1)
    assert trainer.loss.contrast.last["loss"].gt(0).all()

    network.eval()
    with torch.no_grad():
        output = network(batch["data"])
        assert trainer.loss(output, targets) == trainer.loss.loss(output, targets)
    manager, configuration = trainer.plans_manager, trainer.configuration_manager
    again = trainer.build_network_architecture(manager, configuration, 1, 3, False)
    again.load_state_dict(network.state_dict())


@pytest.mark.slow
def test_the_nnunet_trainer_refuses_regions(tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed; pip install nnunetv2")
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    from nnunet_trainer import nnUNetTrainerContextrast

    names = {"background": 0, "whole": [1, 2], "core": 2}
    dataset = {"labels": names, "regions_class_order": [1, 2], "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
    trainer = nnUNetTrainerContextrast(nnunet_plans([1.0, 1.0]), "tiny", 0, dataset, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^labels: overlapping regions are not supported\. "):
        trainer.initialize()
