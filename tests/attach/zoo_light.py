"""Networks made of VGG's layers, and networks for real time."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from zoo_blocks import Basic, N, W, conv, up
from zoo_resnets import Pyramid


class SegNet(nn.Module):
    """A network of VGG's convolutions, pools with indices, and unpooling."""

    def __init__(self):
        super().__init__()
        w = (3, 4, 8, 16, 24, 24)
        for i in range(1, 6):
            for j, inputs in ((1, w[i - 1]), (2, w[i])):
                setattr(self, f"conv{i}{j}", nn.Conv2d(inputs, w[i], 3, padding=1))
                setattr(self, f"bn{i}{j}", nn.BatchNorm2d(w[i]))
            last = N if i == 1 else w[i - 1]
            for j, outputs in ((2, w[i]), (1, last)):
                setattr(self, f"conv{i}{j}d", nn.Conv2d(w[i], outputs, 3, padding=1))
                setattr(self, f"bn{i}{j}d", nn.BatchNorm2d(outputs))

    def forward(self, x):
        pools = []
        for i in range(1, 6):
            for j in (1, 2):
                x = F.relu(getattr(self, f"bn{i}{j}")(getattr(self, f"conv{i}{j}")(x)))
            x, indices = F.max_pool2d(x, 2, 2, return_indices=True)
            pools.append(indices)
        for i in range(5, 0, -1):
            x = F.max_unpool2d(x, pools.pop(), 2, 2)
            x = F.relu(getattr(self, f"bn{i}2d")(getattr(self, f"conv{i}2d")(x)))
            x = getattr(self, f"conv{i}1d")(x)
            x = F.relu(getattr(self, f"bn{i}1d")(x)) if i > 1 else x
        return x


def vgg(widths, pools):
    layers, inputs = [], 3
    for i, width in enumerate(widths):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = width
        if i < pools:
            layers.append(nn.MaxPool2d(2, 2))
    return layers


class FCN8s(nn.Module):
    """A network that adds scores of strides 8, 16 and 32."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*vgg((4, 8, 16, 24, 24), 5))
        self.fc6, self.fc7 = nn.Conv2d(24, 40, 3, padding=1), nn.Conv2d(40, 40, 1)
        self.score, self.score4, self.score3 = nn.Conv2d(40, N, 1), nn.Conv2d(24, N, 1), nn.Conv2d(16, N, 1)
        self.up2, self.up4 = nn.ConvTranspose2d(N, N, 2, 2), nn.ConvTranspose2d(N, N, 2, 2)
        self.up8 = nn.ConvTranspose2d(N, N, 8, 8)

    def forward(self, x):
        maps = []
        for module in self.features:
            x = module(x)
            if isinstance(module, nn.MaxPool2d):
                maps.append(x)
        y = F.dropout(F.relu(self.fc7(F.dropout(F.relu(self.fc6(x)), 0.5, self.training))), 0.5, self.training)
        y = self.up2(self.score(y)) + self.score4(maps[3])
        return self.up8(self.up4(y) + self.score3(maps[2]))


class LargeFOV(nn.Module):
    """The first DeepLab, a Sequential of VGG's layers. The last ones are dilated and give the logits."""

    def __init__(self):
        super().__init__()
        tail = [nn.Conv2d(24, 32, 3, padding=4, dilation=4), nn.ReLU(), nn.Dropout(), nn.Conv2d(32, N, 1)]
        self.net = nn.Sequential(*vgg((4, 8, 16, 24), 3), *tail)

    def forward(self, x):
        return up(self.net(x), x)


class ENet(nn.Module):
    """A network with bottlenecks as attributes, pools with indices, and a decoder that unpools."""

    class Neck(nn.Module):
        def __init__(self, width, dilation=1):
            super().__init__()
            self.ext = nn.Sequential(conv(width, width // 4, 1), conv(width // 4, width // 4, dilation=dilation))
            self.out, self.act = conv(width // 4, width, 1), nn.PReLU()

        def forward(self, x):
            return self.act(x + self.out(self.ext(x)))

    class DownNeck(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.pool = nn.MaxPool2d(2, 2, return_indices=True)
            self.ext = nn.Sequential(conv(inputs, inputs, 2, 2), conv(inputs, outputs, 1))
            self.grown, self.act = outputs - inputs, nn.PReLU()

        def forward(self, x):
            y, indices = self.pool(x)
            y = F.pad(y, (0, 0, 0, 0, 0, self.grown))
            return self.act(y + self.ext(x)[:, :, : y.shape[2], : y.shape[3]]), indices

    def __init__(self):
        super().__init__()
        self.initial = conv(3, 8, stride=2)
        self.downsample1_0, self.regular1_1, self.regular1_2 = self.DownNeck(8, 16), self.Neck(16), self.Neck(16)
        self.downsample2_0, self.regular2_1, self.dilated2_2 = self.DownNeck(16, 32), self.Neck(32), self.Neck(32, 2)
        self.regular3_0, self.dilated3_1 = self.Neck(32), self.Neck(32, 4)
        self.main4, self.ext4, self.regular4_1 = nn.Conv2d(32, 16, 1), nn.ConvTranspose2d(32, 16, 2, 2), self.Neck(16)
        self.main5, self.ext5, self.regular5_1 = nn.Conv2d(16, 8, 1), nn.ConvTranspose2d(16, 8, 2, 2), self.Neck(8)
        self.transposed = nn.ConvTranspose2d(8, N, 2, 2)

    def forward(self, x):
        x = self.initial(x)
        x, first = self.downsample1_0(x)
        x = self.regular1_2(self.regular1_1(x))
        x, second = self.downsample2_0(x)
        x = self.dilated3_1(self.regular3_0(self.dilated2_2(self.regular2_1(x))))
        x = self.regular4_1(F.max_unpool2d(self.main4(x)[:, :16], second[:, :16], 2) + self.ext4(x))
        x = self.regular5_1(F.max_unpool2d(self.main5(x)[:, :8], first[:, :8], 2) + self.ext5(x))
        return self.transposed(x)


class MobileBlock(nn.Module):
    """An inverted residual block, which is wide inside and has a narrow output without activation."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        wide = 4 * inputs
        self.conv = nn.Sequential(
            conv(inputs, wide, 1),
            conv(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """A flat list of blocks and a wide last convolution, with the head of LR-ASPP."""

    def __init__(self):
        super().__init__()
        plan = [(8, 4, 1), (4, 8, 2), (8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1), (16, 24, 1)]
        self.features = nn.Sequential(
            conv(3, 8, stride=2), *(MobileBlock(*p) for p in plan), MobileBlock(24, 32, 2), conv(32, 96, 1)
        )
        self.cbr = conv(96, 16, 1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(96, 16, 1), nn.Sigmoid())
        self.high = nn.Conv2d(16, N, 1)

    def forward(self, x):
        y = self.features(x)
        return up(self.high(self.cbr(y) * self.scale(y)), x)


class UniversalBlock(nn.Module):
    """MobileNet V4's inverted residual block, with a convolution before the wide inside and the strided one in it."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        wide = 4 * inputs
        self.dw_start, self.pw_exp = conv(inputs, inputs, 3, groups=inputs), conv(inputs, wide, 1)
        self.dw_mid, self.pw_proj = conv(wide, wide, 3, stride, groups=wide), conv(wide, outputs, 1)
        self.residual = stride == 1

    def forward(self, x):
        y = self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x))))
        return x + y if self.residual else y


class MobileNetV4(nn.Module):
    """Stages of blocks in a Sequential, as timm has them, and one projection."""

    def __init__(self):
        super().__init__()
        self.conv_stem = conv(3, 8, stride=2)
        self.blocks = nn.Sequential(
            *(nn.Sequential(UniversalBlock(a, b, 2), UniversalBlock(b, b)) for a, b in pairwise((8, *W)))
        )
        self.head = nn.Conv2d(W[-1], N, 1)

    def forward(self, x):
        return up(self.head(self.blocks(self.conv_stem(x))), x)


class FastSCNN(nn.Module):
    """A shared stem of stride 8, a branch of stride 32 with a pyramid, and their fusion."""

    def __init__(self):
        super().__init__()
        self.conv, self.dsconv1, self.dsconv2 = conv(3, 8, stride=2), conv(8, 12, stride=2), conv(12, 16, stride=2)
        self.bottleneck1, self.bottleneck2 = MobileBlock(16, 24, 2), MobileBlock(24, 32, 2)
        self.bottleneck3 = MobileBlock(32, 40)
        self.ppm, self.reduce = Pyramid(40, 10), conv(80, 40, 1)
        self.low, self.high = conv(40, 32), conv(16, 32, 1)
        self.classifier = nn.Sequential(conv(32, 32), nn.Conv2d(32, N, 1))

    def forward(self, x):
        high = self.dsconv2(self.dsconv1(self.conv(x)))
        low = self.reduce(self.ppm(self.bottleneck3(self.bottleneck2(self.bottleneck1(high)))))
        return up(self.classifier(F.relu(self.high(high) + self.low(up(low, high)))), x)


class ESPNet(nn.Module):
    """A network that concatenates the pooled image with each level."""

    def __init__(self):
        super().__init__()
        self.level1 = conv(3, 8, stride=2)
        self.b1 = nn.Sequential(nn.BatchNorm2d(11), nn.PReLU(11))
        self.level2_0, self.level2 = conv(11, 16, stride=2), nn.ModuleList(Basic(16, 16) for _ in range(2))
        self.b2 = nn.Sequential(nn.BatchNorm2d(35), nn.PReLU(35))
        self.level3_0, self.level3 = conv(35, 32, stride=2), nn.ModuleList(Basic(32, 32) for _ in range(3))
        self.b3 = nn.Sequential(nn.BatchNorm2d(64), nn.PReLU(64))
        self.classifier = nn.Conv2d(64, N, 1)

    def forward(self, x):
        half = F.avg_pool2d(x, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        y = self.b1(torch.cat((self.level1(x), half), 1))
        first = z = self.level2_0(y)
        for block in self.level2:
            z = block(z)
        y = self.b2(torch.cat((z, first, quarter), 1))
        first = z = self.level3_0(y)
        for block in self.level3:
            z = block(z)
        return up(self.classifier(self.b3(torch.cat((first, z), 1))), x)
