"""Transformers, and ConvNeXt."""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from zoo_blocks import Basic, N, W, conv, up


class Attention(nn.Module):
    """Attention over tokens. Keys and values may be reduced by a convolution, as in SegFormer."""

    def __init__(self, width, reduce=1):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, reduce, reduce) if reduce > 1 else None
        self.norm = nn.LayerNorm(width) if reduce > 1 else None

    def forward(self, x, side):
        y = x
        if self.sr is not None:
            y = self.sr(x.transpose(1, 2).unflatten(2, side)).flatten(2).transpose(1, 2)
            y = self.norm(y)
        k, v = self.kv(y).chunk(2, -1)
        return self.proj(F.scaled_dot_product_attention(self.q(x), k, v))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    def __init__(self, width, reduce=1):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, reduce)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x, side=None):
        x = x + self.attn(self.norm1(x), side)
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.LayerNorm(outputs)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:]


class SegFormer(nn.Module):
    """A network with patch_embed1, block1, norm1 ... and the head's linear layers in one class."""

    def __init__(self):
        super().__init__()
        inputs = (3, *W)
        for i in range(4):
            setattr(self, f"patch_embed{i + 1}", Patches(inputs[i], W[i], 7 if i == 0 else 3, 4 if i == 0 else 2))
            reduce = (8, 4, 2, 1)[i]
            setattr(self, f"block{i + 1}", nn.ModuleList(TransformerBlock(W[i], reduce) for _ in range(2)))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(W[i]))
            setattr(self, f"linear_c{i + 1}", nn.Linear(W[i], 32))
        self.linear_fuse, self.linear_pred = conv(128, 32, 1), nn.Conv2d(32, N, 1)

    def forward(self, images):
        x, maps = images, []
        for i in range(1, 5):
            x, side = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, side)
            x = getattr(self, f"norm{i}")(x)
            maps.append(getattr(self, f"linear_c{i}")(x).transpose(1, 2).unflatten(2, side))
            x = x.transpose(1, 2).unflatten(2, side)
        y = self.linear_fuse(torch.cat([up(m, maps[0]) for m in maps], 1))
        return up(self.linear_pred(y), images)


class Windows(nn.Module):
    """Swin's block on tokens: attention within windows of 2 × 2."""

    def __init__(self, width):
        super().__init__()
        self.block = TransformerBlock(width)

    def forward(self, x):
        B, L, C = x.shape
        side = round(L**0.5)
        x = x.view(B, side // 2, 2, side // 2, 2, C).transpose(2, 3).reshape(-1, 4, C)
        return self.block(x).view(B, side // 2, side // 2, 2, 2, C).transpose(2, 3).reshape(B, L, C)


class Merge(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, outputs, bias=False)

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        x = x.unflatten(1, (side, side))
        x = torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), -1)
        return self.reduction(self.norm(x.flatten(1, 2)))


class SwinLayer(nn.Module):
    """The official layer, which ends with the merging of patches."""

    def __init__(self, width, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(Windows(width) for _ in range(2))
        self.downsample = Merge(width, outputs) if outputs else None

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """A network with the encoder's layers and one projection of the last map in one class."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, W[0], 4, 4)
        self.layers = nn.ModuleList(SwinLayer(W[i], W[i + 1] if i < 3 else None) for i in range(4))
        self.norm = nn.LayerNorm(W[3])
        self.head = nn.Conv2d(W[3], N, 1)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        for stage in self.layers:
            x = stage(x)
        side = round(x.shape[1] ** 0.5)
        return up(self.head(self.norm(x).transpose(1, 2).unflatten(2, (side, side))), images)


class Expand(nn.Module):
    """Swin-Unet's upsampling: a linear layer whose channels become pixels."""

    def __init__(self, width):
        super().__init__()
        self.expand, self.norm = nn.Linear(width, 2 * width, bias=False), nn.LayerNorm(width // 2)

    def forward(self, x):
        B, L, C = x.shape
        side = round(L**0.5)
        x = self.expand(x).view(B, side, side, 2, 2, C // 2).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(B, 4 * L, C // 2))


class SwinUNet(nn.Module):
    def __init__(self):
        super().__init__()
        w = (8, 16, 32, 64)
        self.patch_embed = nn.Conv2d(3, w[0], 4, 4)
        self.layers = nn.ModuleList(SwinLayer(w[i], w[i + 1] if i < 3 else None) for i in range(4))
        self.norm = nn.LayerNorm(w[3])
        self.expands = nn.ModuleList(Expand(w[i]) for i in (3, 2, 1))
        self.concats = nn.ModuleList(nn.Linear(2 * w[i], w[i]) for i in (2, 1, 0))
        self.ups = nn.ModuleList(SwinLayer(w[i], None) for i in (2, 1, 0))
        self.output = nn.Conv2d(w[0], N, 1)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        skips = []
        for stage in self.layers:
            skips.append(x)
            x = stage(x)
        x = self.norm(x)
        skips.pop()
        for expand, concat, stage in zip(self.expands, self.concats, self.ups):
            x = stage(concat(torch.cat((expand(x), skips.pop()), -1)))
        side = round(x.shape[1] ** 0.5)
        return up(self.output(x.transpose(1, 2).unflatten(2, (side, side))), images)


class ViT(nn.Module):
    """A plain transformer with one projection: SETR's naive head."""

    def __init__(self, depth=6, width=16, patch=8):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(conv(width, width, 1), nn.Conv2d(width, N, 1))

    def depths(self, images):
        x = self.patch_embed(images)
        self.side = x.shape[2:]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1)
        return [x := block(x) for block in self.blocks]

    def as_map(self, x):
        return x[:, 1:].transpose(1, 2).unflatten(2, self.side)

    def forward(self, images):
        return up(self.head(self.as_map(self.norm(self.depths(images)[-1]))), images)


class DPT(ViT):
    """A transformer with four depths, which are resized to four resolutions."""

    def __init__(self):
        super().__init__(depth=8, patch=16)
        self.project = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(16, 16, 4, 4),
                nn.ConvTranspose2d(16, 16, 2, 2),
                nn.Identity(),
                nn.Conv2d(16, 16, 3, 2, 1),
            ]
        )
        self.fuse = nn.ModuleList(Basic(16, 16) for _ in range(4))

    def forward(self, images):
        maps = [self.as_map(x) for x in self.depths(images)[1::2]]
        maps = [r(p(m)) for r, p, m in zip(self.resize, self.project, maps)]
        y = self.fuse[3](maps[3])
        for i in (2, 1, 0):
            y = self.fuse[i](maps[i] + up(y, maps[i]))
        return up(self.head(y), images)


class ConvNeXt(nn.Module):
    """A network with downsample_layers and stages as lists beside the head."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
            self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.gamma = nn.Parameter(torch.ones(width))

        def forward(self, x):
            y = self.norm(self.dwconv(x).movedim(1, 3))
            return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).movedim(3, 1)

    def __init__(self):
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Conv2d(3, W[0], 4, 4)])
        self.downsample_layers.extend(
            nn.Sequential(nn.BatchNorm2d(W[i]), nn.Conv2d(W[i], W[i + 1], 2, 2)) for i in range(3)
        )
        self.stages = nn.ModuleList(nn.Sequential(*(self.Block(c) for _ in range(2))) for c in W)
        self.head = nn.Sequential(conv(W[3], W[3]), nn.Conv2d(W[3], N, 1))

    def forward(self, x):
        y = x
        for down, stage in zip(self.downsample_layers, self.stages):
            y = stage(down(y))
        return up(self.head(y), x)


class StridedMixer(nn.Module):
    """EfficientFormer V2's residual block, whose branch works at half the resolution."""

    def __init__(self, width):
        super().__init__()
        self.stride_conv, self.local, self.out = conv(width, width, stride=2), conv(width, width), conv(width, width, 1)

    def forward(self, x):
        return x + self.out(F.interpolate(self.local(self.stride_conv(x)), scale_factor=2.0))


class EfficientFormer(nn.Module):
    """Stages of a strided convolution and two blocks; in the third stage the blocks leave its resolution."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(conv(a, b, stride=2), *(StridedMixer(b) if b == W[2] else Basic(b, b) for _ in range(2)))
                for a, b in pairwise((8, *W))
            )
        )
        self.head = nn.Conv2d(W[-1], N, 1)

    def forward(self, x):
        return up(self.head(self.stages(self.stem(x))), x)


class EfficientViT(nn.Module):
    """Stages with residual blocks before and after their downsampling, followed by blocks of a different kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, stride=2), conv(8, 8, stride=2))
        self.stages = nn.Sequential(
            nn.Sequential(OrderedDict(blocks=nn.Sequential(Strange(8), Strange(8)))),
            *(
                nn.Sequential(
                    OrderedDict(
                        downsample=nn.Sequential(
                            OrderedDict(res1=Basic(a, a), merge=conv(a, b, stride=2), res2=Basic(b, b))
                        ),
                        blocks=nn.Sequential(Strange(b), Strange(b)),
                    )
                )
                for a, b in pairwise(W)
            ),
        )
        self.head = nn.Conv2d(W[-1], N, 1)

    def forward(self, x):
        return up(self.head(self.stages(self.stem(x))), x)


class Strange(nn.Sequential):
    """A block without a class in common with the residual ones."""

    def __init__(self, width):
        super().__init__(conv(width, width), conv(width, width, 1))
