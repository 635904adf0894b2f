"""U-Nets."""

import torch
from torch import nn
from torch.nn import functional as F
from zoo_blocks import Basic, N, conv, double, layer, up


class UNet(nn.Module):
    """The U-Net that is copied most often: inc, down1 ... down4, up1 ... up4, outc."""

    widths = (4, 8, 16, 24, 24)

    def __init__(self):
        super().__init__()
        w = self.widths
        self.inc = double(3, w[0])
        for i in range(4):
            setattr(self, f"down{i + 1}", nn.Sequential(nn.MaxPool2d(2), double(w[i], w[i + 1])))
            setattr(self, f"up{i + 1}", double(w[4 - i] + w[3 - i], w[3 - i]))
        self.outc = nn.Conv2d(w[0], N, 1)

    def forward(self, x):
        maps = [self.inc(x)]
        for i in range(4):
            maps.append(getattr(self, f"down{i + 1}")(maps[-1]))
        y = maps.pop()
        for i in range(4):
            skip = maps.pop()
            y = getattr(self, f"up{i + 1}")(torch.cat((skip, up(y, skip)), 1))
        return self.outc(y)


class FlatUNet(nn.Module):
    """Every convolution is an attribute. Activations and pools are functions."""

    def __init__(self):
        super().__init__()
        w = (3, 4, 8, 16, 24, 32)
        for i in range(1, 6):
            setattr(self, f"conv{i}_1", nn.Conv2d(w[i - 1], w[i], 3, padding=1))
            setattr(self, f"conv{i}_2", nn.Conv2d(w[i], w[i], 3, padding=1))
        for i in range(4, 0, -1):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(w[i + 1], w[i], 2, 2))
            setattr(self, f"dconv{i}_1", nn.Conv2d(2 * w[i], w[i], 3, padding=1))
            setattr(self, f"dconv{i}_2", nn.Conv2d(w[i], w[i], 3, padding=1))
        self.output = nn.Conv2d(4, N, 1)

    def forward(self, x):
        maps = []
        for i in range(1, 6):
            x = F.relu(getattr(self, f"conv{i}_1")(x))
            x = F.relu(getattr(self, f"conv{i}_2")(x))
            maps.append(x)
            x = F.max_pool2d(x, 2)
        x = maps.pop()
        for i in range(4, 0, -1):
            x = torch.cat((maps.pop(), getattr(self, f"upconv{i}")(x)), 1)
            x = F.relu(getattr(self, f"dconv{i}_1")(x))
            x = F.relu(getattr(self, f"dconv{i}_2")(x))
        return self.output(x)


class Down(nn.Module):
    """A block that returns the map for the skip connection and the pooled map for the next level."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.block, self.pool = double(inputs, outputs), nn.MaxPool2d(2)

    def forward(self, x):
        skip = self.block(x)
        return self.pool(skip), skip


class PairUNet(nn.Module):
    def __init__(self):
        super().__init__()
        w = (3, 4, 8, 16, 24)
        self.downs = nn.ModuleList(Down(w[i], w[i + 1]) for i in range(4))
        self.middle = double(24, 32)
        self.ups = nn.ModuleList(double(a, b) for a, b in ((56, 24), (40, 16), (24, 8), (12, 4)))
        self.logits = nn.Conv2d(4, N, 1)

    def forward(self, x):
        skips = []
        for down in self.downs:
            x, skip = down(x)
            skips.append(skip)
        x = self.middle(x)
        for block in self.ups:
            skip = skips.pop()
            x = block(torch.cat((up(x, skip), skip), 1))
        return self.logits(x)


class UNetPlusPlus(nn.Module):
    """A U-Net++ with conv0_0 ... conv4_0, the nested nodes and four outputs."""

    def __init__(self):
        super().__init__()
        w = (4, 8, 16, 24, 32)
        for i in range(5):
            for j in range(5 - i):
                inputs = (3 if i == 0 else w[i - 1]) if j == 0 else j * w[i] + w[i + 1]
                setattr(self, f"conv{i}_{j}", double(inputs, w[i]))
        for j in range(1, 5):
            setattr(self, f"final{j}", nn.Conv2d(w[0], N, 1))

    def forward(self, x):
        nodes = {}
        for j in range(5):
            for i in range(5 - j):
                if j == 0:
                    y = x if i == 0 else F.max_pool2d(nodes[i - 1, 0], 2)
                else:
                    below = up(nodes[i + 1, j - 1], nodes[i, 0])
                    y = torch.cat([*(nodes[i, k] for k in range(j)), below], 1)
                nodes[i, j] = getattr(self, f"conv{i}_{j}")(y)
        return [getattr(self, f"final{j}")(nodes[0, j]) for j in range(1, 5)]


class UNet3Plus(UNet):
    """Each decoder reads all encoder maps, resized to its size."""

    def __init__(self):
        super().__init__()
        for i in range(4):
            delattr(self, f"up{i + 1}")
            for j, c in enumerate(self.widths):
                setattr(self, f"h{j}_to_d{i}", conv(c if j <= i or j == 4 else 20, 4))
            setattr(self, f"d{i}", conv(20, 20))
        self.outc = nn.Conv2d(20, N, 1)

    def forward(self, x):
        maps = [self.inc(x)]
        for i in range(4):
            maps.append(getattr(self, f"down{i + 1}")(maps[-1]))
        nodes = list(maps)
        for i in (3, 2, 1, 0):
            read = []
            for j in range(5):
                m = maps[j] if j <= i else nodes[j]
                m = F.max_pool2d(m, 2 ** (i - j)) if j < i else up(m, maps[i])
                read.append(getattr(self, f"h{j}_to_d{i}")(m))
            nodes[i] = getattr(self, f"d{i}")(torch.cat(read, 1))
        return self.outc(nodes[0])


class AttentionUNet(UNet):
    """A gate for each skip connection."""

    def __init__(self):
        super().__init__()
        w = self.widths
        for i in range(4):
            setattr(self, f"gate{i + 1}", nn.Conv2d(w[4 - i], w[3 - i], 1))
            setattr(self, f"psi{i + 1}", nn.Conv2d(w[3 - i], 1, 1))

    def forward(self, x):
        maps = [self.inc(x)]
        for i in range(4):
            maps.append(getattr(self, f"down{i + 1}")(maps[-1]))
        y = maps.pop()
        for i in range(4):
            skip = maps.pop()
            gate = F.relu(up(getattr(self, f"gate{i + 1}")(y), skip) + skip)
            skip = skip * torch.sigmoid(getattr(self, f"psi{i + 1}")(gate))
            y = getattr(self, f"up{i + 1}")(torch.cat((skip, up(y, skip)), 1))
        return self.outc(y)


class Nested(nn.Module):
    """pix2pix's U-Net: each level holds the next one."""

    def __init__(self, outer, inner, inside=None, inputs=None):
        super().__init__()
        down = nn.Sequential(nn.Conv2d(inputs or outer, inner, 4, 2, 1), nn.BatchNorm2d(inner), nn.LeakyReLU(0.2))
        width = inner if inside is None else 2 * inner
        rise = nn.Sequential(nn.ConvTranspose2d(width, outer, 4, 2, 1), nn.BatchNorm2d(outer), nn.ReLU())
        self.model = nn.Sequential(down, *(() if inside is None else (inside,)), rise)
        self.outermost = inputs is not None

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat((x, self.model(x)), 1)


def nested_unet():
    inside = Nested(8, 16, Nested(16, 24, Nested(24, 32)))
    return nn.Sequential(Nested(8, 8, inside, inputs=3), nn.Conv2d(8, N, 1))


class WNet(nn.Module):
    """Two U-Nets. The second reads the output of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = UNet(), UNet()
        self.between = nn.Conv2d(N, 3, 1)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Hourglass(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.skip, self.low1, self.low3 = Basic(width, width), Basic(width, width), Basic(width, width)
        self.low2 = Hourglass(depth - 1, width) if depth > 1 else Basic(width, width)

    def forward(self, x):
        low = self.low3(self.low2(self.low1(F.max_pool2d(x, 2))))
        return self.skip(x) + up(low, x)


class Hourglasses(nn.Module):
    """Two hourglasses of one width behind a stem."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, stride=2), layer(8, 8))
        self.hg1, self.hg2 = Hourglass(3, 8), Hourglass(3, 8)
        self.out = nn.Conv2d(8, N, 1)

    def forward(self, x):
        return up(self.out(self.hg2(self.hg1(self.stem(x)))), x)


class Tiramisu(nn.Module):
    """Dense blocks, whose layers read all before them, and transitions down and up."""

    class Dense(nn.Module):
        def __init__(self, inputs, growth=4, layers=3):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, growth, 3, padding=1))
                for c in range(inputs, inputs + layers * growth, growth)
            )

        def forward(self, x):
            for dense in self.layers:
                x = torch.cat((x, dense(x)), 1)
            return x

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.dense1, self.dense2, self.dense3 = self.Dense(8), self.Dense(20), self.Dense(32)
        self.trans1, self.trans2, self.trans3 = (
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 1), nn.MaxPool2d(2)) for c in (20, 32, 44)
        )
        self.bottleneck = self.Dense(44)
        self.up3, self.up2, self.up1 = (nn.ConvTranspose2d(a, b, 3, 2, 1, 1) for a, b in ((56, 12), (12, 12), (12, 12)))
        self.dense4, self.dense5, self.dense6 = conv(56, 12), conv(44, 12), conv(32, 12)
        self.classify = nn.Conv2d(12, N, 1)

    def forward(self, x):
        s1 = self.dense1(self.first(x))
        s2 = self.dense2(self.trans1(s1))
        s3 = self.dense3(self.trans2(s2))
        y = self.bottleneck(self.trans3(s3))
        y = self.dense4(torch.cat((self.up3(y), s3), 1))
        y = self.dense5(torch.cat((self.up2(y), s2), 1))
        return self.classify(self.dense6(torch.cat((self.up1(y), s1), 1)))
