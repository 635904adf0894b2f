"""Networks of several branches, and some without stages that can be found."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from zoo_blocks import Bottleneck, N, W, conv, double, layer, up
from zoo_resnets import FlatResNet, Pyramid


class BiSeNet(FlatResNet):
    """A spatial path of stride 8 beside a ResNet with attention, in one class."""

    def __init__(self):
        super().__init__(None)
        self.sp1, self.sp2, self.sp3 = conv(3, 8, 7, 2), conv(8, 8, stride=2), conv(8, 8, stride=2)
        self.arm16, self.arm32 = conv(W[2], 16), conv(W[3], 16)
        self.gate16, self.gate32, self.avg = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), conv(W[3], 16, 1)
        self.ffm = conv(24, 24, 1)
        self.out = nn.Sequential(conv(24, 24), nn.Conv2d(24, N, 1))

    def forward(self, x):
        spatial = self.sp3(self.sp2(self.sp1(x)))
        _, _, c3, c4 = self.stages(x)
        y = self.arm32(c4)
        y = y * torch.sigmoid(self.gate32(y.mean((2, 3), keepdim=True)))
        y = y + self.avg(c4.mean((2, 3), keepdim=True))
        z = self.arm16(c3)
        z = z * torch.sigmoid(self.gate16(z.mean((2, 3), keepdim=True))) + up(y, z)
        return up(self.out(self.ffm(torch.cat((spatial, up(z, spatial)), 1))), x)


class BiSeNetV2(nn.Module):
    """A detail branch and a semantic branch, which meet at the end."""

    def __init__(self):
        super().__init__()
        self.detail = nn.Sequential(conv(3, 8, stride=2), conv(8, 8, stride=2), conv(8, 16, stride=2))
        self.stem = conv(3, 4, stride=2)
        self.stem2 = conv(4, 4, stride=2)
        self.s3, self.s4, self.s5_4 = layer(4, 8, 2), layer(8, 16, 2), layer(16, 32, 2)
        self.ce = nn.Conv2d(32, 32, 1)
        self.right, self.left = nn.Conv2d(32, 16, 3, padding=1), conv(16, 16)
        self.head = nn.Sequential(conv(16, 16), nn.Conv2d(16, N, 1))

    def forward(self, x):
        detail = self.detail(x)
        y = self.s5_4(self.s4(self.s3(self.stem2(self.stem(x)))))
        y = y + self.ce(y.mean((2, 3), keepdim=True))
        return up(self.head(self.left(detail) * torch.sigmoid(up(self.right(y), detail))), x)


class DDRNet(nn.Module):
    """Two branches that exchange maps twice. The activations in between are shared modules or functions."""

    def __init__(self, high=8):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Sequential(conv(3, 8, stride=2), conv(8, 8, stride=2))
        self.layer1, self.layer2 = layer(8, 8), layer(8, high, 2)
        self.layer3, self.layer4, self.layer5 = layer(high, 16, 2), layer(16, 32, 2), layer(32, 48, 2, Bottleneck, 1)
        self.layer3_, self.layer4_ = layer(high, high), layer(high, high)
        self.layer5_ = layer(high, 16, 1, Bottleneck, 1)
        self.compression3, self.compression4 = conv(16, high, 1), conv(32, high, 1)
        self.down3, self.down4 = conv(high, 16, stride=2), nn.Sequential(conv(high, 16, stride=2), conv(16, 32, 3, 2))
        self.spp, self.reduce = Pyramid(48, 12, (1, 2)), conv(72, 16, 1)
        self.final = nn.Sequential(conv(16, 16), nn.Conv2d(16, N, 1))

    def forward(self, x):
        y = self.relu(self.layer2(self.relu(self.layer1(self.conv1(x)))))
        low, high = self.layer3(y), self.layer3_(y)
        low, high = low + self.down3(self.relu(high)), high + up(self.compression3(self.relu(low)), high)
        z, high = self.layer4(self.relu(low)), self.layer4_(self.relu(high))
        low, high = z + self.down4(self.relu(high)), high + up(self.compression4(self.relu(z)), high)
        high = self.layer5_(self.relu(high))
        low = self.reduce(self.spp(self.layer5(self.relu(low))))
        return up(self.final(high + up(low, high)), x)


class PIDNet(nn.Module):
    """Three branches. The one of the lowest resolution passes its maps to the others and receives none."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 8, stride=2), conv(8, 8, stride=2))
        self.layer1, self.layer2 = layer(8, 8), layer(8, 16, 2)
        self.layer3, self.layer4, self.layer5 = layer(16, 24, 2), layer(24, 32, 2), layer(32, 48, 2, Bottleneck, 1)
        self.compression3, self.compression4 = conv(24, 16, 1), conv(32, 16, 1)
        self.layer3_, self.layer4_, self.layer5_ = layer(16, 16), layer(16, 16), layer(16, 16, 1, Bottleneck, 1)
        self.layer3_d, self.layer4_d, self.layer5_d = layer(16, 16), layer(16, 16), layer(16, 16)
        self.diff3, self.diff4 = conv(24, 16), conv(32, 16)
        self.spp, self.reduce = Pyramid(48, 12, (1, 2)), conv(72, 16, 1)
        self.final = nn.Sequential(conv(16, 16), nn.Conv2d(16, N, 1))

    def forward(self, x):
        x0 = self.layer2(self.layer1(self.conv1(x)))
        p, d, i = self.layer3_(x0), self.layer3_d(x0), self.layer3(x0)
        p, d = p + up(self.compression3(i), p), d + up(self.diff3(i), d)
        i = self.layer4(i)
        p, d = self.layer4_(p), self.layer4_d(d)
        p, d = p + up(self.compression4(i), p), d + up(self.diff4(i), d)
        p, d = self.layer5_(p), self.layer5_d(d)
        i = up(self.reduce(self.spp(self.layer5(i))), p)
        gate = torch.sigmoid(d)
        return up(self.final(gate * p + (1 - gate) * i), x)


class HRModule(nn.Module):
    """Parallel branches. Each returns the sum of all branches at its own size."""

    def __init__(self, widths):
        super().__init__()
        self.branches = nn.ModuleList(layer(c, c) for c in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self.link(a, b, i, j) for j, a in enumerate(widths)) for i, b in enumerate(widths)
        )

    @staticmethod
    def link(a, b, i, j):
        if i == j:
            return nn.Identity()
        if j > i:
            return nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.Upsample(scale_factor=2 ** (j - i)))
        return nn.Sequential(*(conv(a if k == 0 else b, b, stride=2) for k in range(i - j)))

    def forward(self, maps):
        maps = [branch(m) for branch, m in zip(self.branches, maps)]
        return [F.relu(sum(link(m) for link, m in zip(links, maps))) for links in self.fuse]


class HRNet(nn.Module):
    """The official layout: stages, transitions and the head in one class."""

    def __init__(self, modules=1):
        super().__init__()
        c = (4, 8, 16, 32)
        self.conv1, self.conv2, self.layer1 = conv(3, 16, stride=2), conv(16, 16, stride=2), layer(16, 32)
        self.transition1 = nn.ModuleList([conv(32, c[0]), conv(32, c[1], stride=2)])
        self.stage2 = nn.Sequential(*(HRModule(c[:2]) for _ in range(modules)))
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), conv(c[1], c[2], stride=2)])
        self.stage3 = nn.Sequential(*(HRModule(c[:3]) for _ in range(modules)))
        self.transition3 = nn.ModuleList([nn.Identity()] * 3 + [conv(c[2], c[3], stride=2)])
        self.stage4 = nn.Sequential(*(HRModule(c) for _ in range(modules)))
        self.last_layer = nn.Sequential(conv(sum(c), sum(c), 1), nn.Conv2d(sum(c), N, 1))

    def forward(self, x):
        y = self.layer1(self.conv2(self.conv1(x)))
        maps = self.stage2([t(y) for t in self.transition1])
        maps = self.stage3([t(m) for t, m in zip(self.transition2, (*maps, maps[-1]))])
        maps = self.stage4([t(m) for t, m in zip(self.transition3, (*maps, maps[-1]))])
        return up(self.last_layer(torch.cat([up(m, maps[0]) for m in maps], 1)), x)


class FullResolution(nn.Module):
    """No map is smaller than the image."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), *(conv(8, 8, dilation=d) for d in (1, 2, 4)))
        self.cls = nn.Conv2d(8, N, 1)

    def forward(self, x):
        return self.cls(self.body(x))


class Shallow(nn.Module):
    """A U-Net of strides 1, 2 and 4. Only one map is coarse enough."""

    def __init__(self):
        super().__init__()
        self.enc1, self.enc2, self.enc3 = double(3, 8), double(8, 16), double(16, 24)
        self.dec2, self.dec1, self.cls = double(40, 16), double(24, 8), nn.Conv2d(8, N, 1)

    def forward(self, x):
        e1 = self.enc1(x)
        e2 = self.enc2(F.max_pool2d(e1, 2))
        e3 = self.enc3(F.max_pool2d(e2, 2))
        d = self.dec2(torch.cat((e2, up(e3, e2)), 1))
        return self.cls(self.dec1(torch.cat((e1, up(d, e1)), 1)))


class TwoStreams(nn.Module):
    """Two encoders, such as those of colour and depth, whose maps are added at every stage, or only the last ones."""

    def __init__(self, early):
        super().__init__()
        self.stem, self.second_stem = conv(3, 8, stride=2), conv(3, 8, stride=2)
        self.stages, self.second = (
            nn.ModuleList(nn.Sequential(conv(a, b, stride=2), conv(b, b)) for a, b in pairwise((8, *W)))
            for _ in range(2)
        )
        self.head, self.early = nn.Conv2d(W[-1], N, 1), early

    def forward(self, image):
        x, y = self.stem(image), self.second_stem(image)
        for stage, second in zip(self.stages, self.second):
            x, y = stage(x + y if self.early else x), second(y)
        return up(self.head(x + y), image)


class Detour(FlatResNet):
    """The maps leave PyTorch in the middle of the model, so that no operation links its two halves."""

    def forward(self, x):
        x = torch.from_numpy(self.maxpool(self.relu(self.bn1(self.conv1(x)))).detach().numpy().copy())
        return up(self.head(self.layer4(self.layer3(self.layer2(self.layer1(x))))), x)
