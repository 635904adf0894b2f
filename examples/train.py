"""Contextrast in a plain PyTorch loop, with mixed precision and DDP.

python examples/train.py                          # one process, on the GPU if there is one
torchrun --nproc-per-node 4 examples/train.py     # DDP
"""

import argparse
import os

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from toy import NUM_CLASSES, Network, Scenes

import contextrast_kernels as ck


def train(steps: int, batch: int, dtype: torch.dtype) -> list[float]:
    """The loss of every step."""
    many = "RANK" in os.environ  # set by torchrun
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if many:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    model = Network().to(device)
    tap = ck.attach(model)  # after pretrained weights, before DDP and the optimizer, which must both include the heads
    criterion = ck.ContextrastCriterion(NUM_CLASSES)
    network = DistributedDataParallel(model) if many else model
    # For torch.compile: network = torch.compile(network), here and not before attach.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # float16 gradients underflow without a scaler; bfloat16 and float32 need none.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    data = Scenes(steps * batch * (distributed.get_world_size() if many else 1))
    loader = DataLoader(data, batch, sampler=DistributedSampler(data) if many else None)
    losses = []
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = network(images)
            loss = criterion(tap.features(), labels, logits)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        if len(losses) % 10 == 0 and (not many or distributed.get_rank() == 0):
            parts = criterion.last
            print(f"{len(losses):4d}  cross-entropy {parts['cross_entropy']:.3f}  contrast {parts['contrast']:.3f}")

    tap.detach()  # leaves the plain network, to be saved and deployed
    if many:
        distributed.destroy_process_group()
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="images in each process")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.batch, getattr(torch, arguments.dtype))
