"""The head for MMSegmentation inside the real mmseg: a Runner trains from a config file, then predicts.

docs/attach.md says what to install. The other tests of the head, in test_mmseg.py, run on a stub of mmseg's classes.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

for name in ("mmengine", "mmcv", "mmseg"):
    pytest.importorskip(name, reason=f"{name} is not installed: docs/attach.md says what to install")

pytestmark = pytest.mark.slow

CONFIG = """
default_scope = "mmseg"
custom_imports = dict(imports=["contextrast_kernels.mmseg"])
norm = dict(type="BN")
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=(64, 64)),
    dict(type="PackSegInputs"),
]
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[128.0] * 3, std=[64.0] * 3, size=(64, 64), seg_pad_val=255
    ),
    backbone=BACKBONE,
    decode_head=dict(
        type="ContextrastHead",
        head=dict(
            type="HEAD", in_channels=IN_CHANNELS, in_index=IN_INDEX, channels=16, num_classes=3, norm_cfg=norm,
            loss_decode=dict(type="CrossEntropyLoss"), align_corners=False,
        ),
        in_channels=STAGES,
        dim=16,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset", data_root="ROOT", data_prefix=dict(img_path="images", seg_map_path="labels"),
        metainfo=dict(classes=("a", "b", "c"), palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]]),
        img_suffix=".png", seg_map_suffix=".png", pipeline=pipeline,
    ),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=4)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9))
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4),
)
log_processor = dict(by_epoch=False, window_size=1)
"""
RESNET = 'dict(type="ResNetV1c", depth=18, base_channels=16, norm_cfg=norm, norm_eval=False)'
MIT = (
    'dict(type="MixVisionTransformer", embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],'
    " sr_ratios=[8, 4, 2, 1])"
)
NETWORKS = {
    "FCNHead": (RESNET, "128", "3", [16, 32, 64, 128]),
    "SegformerHead": (MIT, "[16, 32, 64, 128]", "[0, 1, 2, 3]", [16, 32, 64, 128]),
}
PROGRAM = """
import json, sys, torch
from mmengine.config import Config
from mmengine.runner import Runner

config = Config.fromfile(sys.argv[1])
config.work_dir = sys.argv[2]
runner = Runner.from_cfg(config)
runner.train()
history = runner.message_hub.log_scalars
losses = {name: history[f"train/{name}"].data[0].tolist() for name in ("loss_contrast", "decode.loss_ce", "loss")
          if f"train/{name}" in history}
losses |= {name: history[name].data[0].tolist() for name in history if "contrast" in name}
model = runner.model.eval()
data = model.data_preprocessor({"inputs": [torch.zeros(3, 64, 64)], "data_samples": None}, False)
result = model(data["inputs"], mode="predict")
print(json.dumps({"losses": losses, "prediction": list(result[0].pred_sem_seg.data.shape)}))
"""


@pytest.fixture
def frames(tmp_path):
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        labels = random.integers(0, 3, (6, 6), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        image = np.stack([labels * 80, 255 - labels * 80, labels * 40], -1) + random.integers(0, 20, (96, 96, 3))
        labels[:4] = 255
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("head", NETWORKS)
def test_a_runner_trains_from_a_config_file_and_predicts(frames, head):
    backbone, in_channels, in_index, stages = NETWORKS[head]
    text = CONFIG.replace("ROOT", str(frames)).replace("BACKBONE", backbone).replace("HEAD", head)
    text = text.replace("IN_CHANNELS", in_channels).replace("IN_INDEX", in_index).replace("STAGES", str(stages))
    config = frames / "config.py"
    config.write_text(text)
    command = [sys.executable, "-c", PROGRAM, str(config), str(frames / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    contrast = next(values for name, values in found["losses"].items() if "contrast" in name)
    assert len(contrast) == 4 and all(np.isfinite(contrast)) and contrast[0] > 0
    assert found["prediction"] == [1, 64, 64]
    assert (frames / "work" / "iter_4.pth").exists()
