"""Small segmentation networks, laid out as public code lays them out: mostly one class that holds encoder and head.

``ZOO`` has for each a function that builds it and the stages that ``attach`` must find, as name → (channels, stride)
for an image of 64 × 64; or None where it must refuse, as no stages can be told from other maps.
"""

import torch
from torch import nn
from torch.nn import functional as F

N = 5
W = (8, 16, 24, 32)


def conv(inputs, outputs, kernel=3, stride=1, dilation=1, groups=1):
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def double(inputs, outputs):
    return nn.Sequential(conv(inputs, outputs), conv(outputs, outputs))


def up(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    """The residual block of torchvision, with a wide output and a narrow inside."""

    def __init__(self, inputs, outputs, stride=1, dilation=1):
        super().__init__()
        inner = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Basic(nn.Module):
    """The residual block of two convolutions whose last activation is a function."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


def layer(inputs, outputs, stride=1, block=Basic, blocks=2, **options):
    rest = (block(outputs, outputs, **options) for _ in range(blocks - 1))
    return nn.Sequential(block(inputs, outputs, stride, **options), *rest)


# ------------------------------------------------------------------------------------------------------------- ResNets


class FlatResNet(nn.Module):
    """torchvision's names beside the head, in one class."""

    def __init__(self, head, widths=W, strides=(1, 2, 2, 2), block=Basic):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = (8, *widths)
        for i in range(4):
            setattr(self, f"layer{i + 1}", layer(inputs[i], widths[i], strides[i], block))
        self.head = head

    def stages(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        c1 = self.layer1(x)
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return c1, c2, c3, self.layer4(c3)

    def forward(self, x):
        return up(self.head(self.stages(x)[-1]), x)


def resnet_one_projection():
    return FlatResNet(nn.Conv2d(W[-1], N, 1))


def resnet_fcn_head():
    return FlatResNet(nn.Sequential(conv(W[-1], W[-1]), nn.Dropout(0.1), nn.Conv2d(W[-1], N, 1)), block=Bottleneck)


class FlatHead(FlatResNet):
    """A convolution as wide as the last stage, in attributes of its own."""

    def __init__(self):
        super().__init__(None)
        self.head_conv, self.head_bn = nn.Conv2d(W[-1], W[-1], 3, padding=1), nn.BatchNorm2d(W[-1])
        self.cls = nn.Conv2d(W[-1], N, 1)

    def forward(self, x):
        return up(self.cls(F.relu(self.head_bn(self.head_conv(self.stages(x)[-1])))), x)


class Pyramid(nn.Module):
    """semseg's pooling module."""

    def __init__(self, inputs, width, bins=(1, 2, 3, 6)):
        super().__init__()
        self.features = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(b), conv(inputs, width, 1)) for b in bins)

    def forward(self, x):
        return torch.cat([x, *(up(f(x), x) for f in self.features)], 1)


class PSPNet(nn.Module):
    """semseg's: layer0 ... layer4, ppm, cls and, in training, aux."""

    def __init__(self, dilated=True, block=Bottleneck):
        super().__init__()
        self.layer0 = nn.Sequential(conv(3, 4, stride=2), conv(4, 8), nn.MaxPool2d(3, 2, 1))
        self.layer1 = layer(8, 16, 1, block)
        self.layer2 = layer(16, 32, 2, block)
        self.layer3 = layer(32, 48, 1 if dilated else 2, block)
        self.layer4 = layer(48, 64, 1 if dilated else 2, block)
        self.ppm = Pyramid(64, 16)
        self.cls = nn.Sequential(conv(128, 32), nn.Dropout2d(0.1), nn.Conv2d(32, N, 1))
        self.aux = nn.Sequential(conv(48, 16), nn.Dropout2d(0.1), nn.Conv2d(16, N, 1))

    def forward(self, x):
        c3 = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        logits = up(self.cls(self.ppm(self.layer4(c3))), x)
        return (logits, up(self.aux(c3), x)) if self.training else logits


class OCRNet(FlatResNet):
    """Soft regions of an auxiliary map, and attention to them."""

    def __init__(self):
        super().__init__(None, strides=(1, 2, 1, 1))
        self.dsn = nn.Sequential(conv(W[2], 16), nn.Conv2d(16, N, 1))
        self.bottleneck = conv(W[3], 16)
        self.query, self.key = nn.Conv2d(16, 8, 1), nn.Conv1d(16, 8, 1)
        self.out = nn.Conv2d(32, N, 1)

    def forward(self, x):
        _, _, c3, c4 = self.stages(x)
        coarse, y = self.dsn(c3), self.bottleneck(c4)
        regions = y.flatten(2) @ coarse.flatten(2).softmax(-1).transpose(1, 2)
        similarity = (self.query(y).flatten(2).transpose(1, 2) @ self.key(regions)).softmax(-1)
        context = (similarity @ regions.transpose(1, 2)).transpose(1, 2).reshape(y.shape)
        return up(self.out(torch.cat((y, context), 1)), x), up(coarse, x)


class ASPP(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.convs = nn.ModuleList([conv(inputs, width, 1), *(conv(inputs, width, dilation=d) for d in (2, 3))])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(inputs, width, 1))
        self.project = conv(4 * width, width, 1)

    def forward(self, x):
        return self.project(torch.cat([*(c(x) for c in self.convs), up(self.pool(x), x)], 1))


class DeepLabV3Plus(FlatResNet):
    def __init__(self):
        super().__init__(None, strides=(1, 2, 2, 1))
        self.aspp = ASPP(W[-1], 16)
        self.low = conv(W[0], 8, 1)
        self.decoder = nn.Sequential(conv(24, 16), conv(16, 16), nn.Conv2d(16, N, 1))

    def forward(self, x):
        c1, _, _, c4 = self.stages(x)
        return up(self.decoder(torch.cat((self.low(c1), up(self.aspp(c4), c1)), 1)), x)


# ------------------------------------------------------------------------------------------- pyramids on top of a ResNet


class FPN(FlatResNet):
    """Laterals and smoothing as attributes. ``coarser`` adds RetinaNet's extra level."""

    def __init__(self, width=32, coarser=False, bottom_up=False):
        super().__init__(None)
        for i, c in enumerate(W):
            setattr(self, f"lateral{i + 1}", nn.Conv2d(c, width, 1))
            setattr(self, f"smooth{i + 1}", nn.Conv2d(width, width, 3, padding=1))
        self.p6 = nn.Conv2d(W[-1], width // 2, 3, 2, 1) if coarser else None
        self.down = nn.ModuleList(conv(width, width, stride=2) for _ in range(3)) if bottom_up else None
        self.predict = nn.Conv2d(width, N, 1)

    def forward(self, x):
        maps = self.stages(x)
        laterals = [getattr(self, f"lateral{i + 1}")(c) for i, c in enumerate(maps)]
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + up(laterals[i + 1], laterals[i])
        p = [getattr(self, f"smooth{i + 1}")(m) for i, m in enumerate(laterals)]
        if self.down is not None:
            for i in range(3):
                p[i + 1] = p[i + 1] + self.down[i](p[i])
        if self.p6 is not None:
            p.append(F.relu(self.p6(maps[-1])))
            p[3] = p[3] + up(self.predict_extra(p[4]), p[3])
        return up(self.predict(sum(up(m, p[0]) for m in p[:4])), x)

    def predict_extra(self, x):
        return x.repeat(1, 2, 1, 1)


class RefineNet(FlatResNet):
    """Blocks that refine from the coarsest to the finest map."""

    def __init__(self):
        super().__init__(None)
        self.adapt = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1) for c in W)
        self.refine = nn.ModuleList(layer(16, 16) for _ in W)
        self.chain = nn.ModuleList(conv(16, 16) for _ in W)
        self.clf = nn.Conv2d(16, N, 3, padding=1)

    def forward(self, x):
        maps = self.stages(x)
        y = None
        for i in (3, 2, 1, 0):
            z = self.refine[i](self.adapt[i](maps[i]))
            z = z if y is None else z + up(y, z)
            y = z + self.chain[i](F.max_pool2d(z, 5, 1, 2))
        return up(self.clf(y), x)


class LinkNet(FlatResNet):
    """Decoder blocks of transposed convolutions, added to the encoder's maps."""

    def __init__(self):
        super().__init__(None)
        widths = (*W[::-1], 8)
        for i in range(4):
            a, b = widths[i], widths[i + 1]
            block = nn.Sequential(conv(a, a // 4, 1), nn.ConvTranspose2d(a // 4, a // 4, 2, 2), conv(a // 4, b, 1))
            setattr(self, f"decoder{4 - i}", block)
        self.final = nn.ConvTranspose2d(8, N, 2, 2)

    def forward(self, x):
        c1, c2, c3, c4 = self.stages(x)
        d = self.decoder4(c4) + c3
        d = self.decoder3(d) + c2
        return self.final(self.decoder1(self.decoder2(d) + c1))


class ResUNet(nn.Module):
    """ternausnet's: conv1 ... conv5 of a ResNet, a center behind a pool, and decoders."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), self.pool)
        self.conv2, self.conv3, self.conv4 = layer(8, 8), layer(8, 16, 2), layer(16, 24, 2)
        self.center = double(24, 24)
        self.dec4, self.dec3, self.dec2 = double(48, 16), double(32, 16), double(24, 8)
        self.final = nn.Conv2d(8, N, 1)

    def forward(self, x):
        c2 = self.conv2(self.conv1(x))
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        center = self.center(self.pool(c4))
        d = self.dec4(torch.cat((up(center, c4), c4), 1))
        d = self.dec3(torch.cat((up(d, c3), c3), 1))
        return up(self.final(self.dec2(torch.cat((up(d, c2), c2), 1))), x)


# --------------------------------------------------------------------------------------------------------------- U-Nets


class UNet(nn.Module):
    """The one most often copied: inc, down1 ... down4, up1 ... up4, outc."""

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
    """Every convolution is an attribute, activations and pools are functions."""

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
    """Gives the map for the skip connection and the pooled one for the next level."""

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
    """conv0_0 ... conv4_0 and the nested nodes, with four outputs."""

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
    """Each decoder reads all encoder maps, brought to its size."""

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
    """Two U-Nets, the second on the first one's output."""

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


# --------------------------------------------------------------------------------------------------------- VGG and light


class SegNet(nn.Module):
    """VGG's convolutions, pools with indices, unpooling."""

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
    """Scores at strides 8, 16 and 32, added."""

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
    """The first DeepLab: one Sequential of VGG, whose last layers are dilated and give the logits."""

    def __init__(self):
        super().__init__()
        tail = [nn.Conv2d(24, 32, 3, padding=4, dilation=4), nn.ReLU(), nn.Dropout(), nn.Conv2d(32, N, 1)]
        self.net = nn.Sequential(*vgg((4, 8, 16, 24), 3), *tail)

    def forward(self, x):
        return up(self.net(x), x)


class ENet(nn.Module):
    """Bottlenecks as attributes, downsampling that pools with indices, a decoder that unpools."""

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
    """An inverted residual: a wide inside, a narrow output without activation."""

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
    """The image itself, pooled, joins each level."""

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


# -------------------------------------------------------------------------------------------------- several branches


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
    """Two branches that exchange maps twice; activations between are shared or functions."""

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
    """Three branches; the one of the lowest resolution hands its maps to the others and takes none."""

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
    """Branches, and the sum of all of them, brought to the size of each."""

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


# --------------------------------------------------------------------------------------------------------- transformers


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
    """patch_embed1, block1, norm1 ... and the head's linear layers, in one class."""

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
    """The official layer, whose merging of patches is its end."""

    def __init__(self, width, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(Windows(width) for _ in range(2))
        self.downsample = Merge(width, outputs) if outputs else None

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """The encoder's layers and one projection on the last map, in one class."""

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
    """Swin-Unet's rise: a linear layer whose channels become pixels."""

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
    """Four depths, brought to four resolutions."""

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
    """downsample_layers and stages as lists beside the head."""

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


# ------------------------------------------------------------------------------------------------------ nothing to find


class FullResolution(nn.Module):
    """No map is smaller than the image."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), *(conv(8, 8, dilation=d) for d in (1, 2, 4)))
        self.cls = nn.Conv2d(8, N, 1)

    def forward(self, x):
        return self.cls(self.body(x))


class Shallow(nn.Module):
    """A U-Net of strides 1, 2 and 4: one map alone is coarse enough."""

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


class Detour(FlatResNet):
    """The maps leave PyTorch in the middle of the model, so that no operation links its two halves."""

    def forward(self, x):
        x = torch.from_numpy(self.maxpool(self.relu(self.bn1(self.conv1(x)))).detach().numpy().copy())
        return up(self.head(self.layer4(self.layer3(self.layer2(self.layer1(x))))), x)


def named(names, channels, strides=(4, 8, 16, 32)):
    return dict(zip(names, zip(channels, strides), strict=True))


LAYERS = ("layer1", "layer2", "layer3", "layer4")
DOWNS = ("down2", "down3", "down4")
SPACED = ("blocks.1", "blocks.3", "blocks.5", "blocks.7")

ZOO = {
    "ResNet, one projection": (resnet_one_projection, named(LAYERS, W)),
    "ResNet, FCN head": (resnet_fcn_head, named(LAYERS, W)),
    "ResNet, head in attributes": (FlatHead, named(LAYERS, W)),
    "PSPNet, dilated": (PSPNet, named(LAYERS, (16, 32, 48, 64), (4, 8, 8, 8))),
    "PSPNet, not dilated": (lambda: PSPNet(False, Basic), named(LAYERS, (16, 32, 48, 64))),
    "OCRNet": (OCRNet, named(LAYERS, W, (4, 8, 8, 8))),
    "DeepLabV3+": (DeepLabV3Plus, named(LAYERS, W, (4, 8, 16, 16))),
    "FPN": (FPN, named(LAYERS, W)),
    "FPN, wider than the encoder": (lambda: FPN(48), named(LAYERS, W)),
    "FPN with a coarser level": (lambda: FPN(32, coarser=True), named(LAYERS, W)),
    "PANet": (lambda: FPN(bottom_up=True), named(LAYERS, W)),
    "RefineNet": (RefineNet, named(LAYERS, W)),
    "LinkNet": (LinkNet, named(LAYERS, W)),
    "U-Net on a ResNet": (ResUNet, named(("conv2", "conv3", "conv4", "center"), (8, 16, 24, 24))),
    "U-Net": (UNet, named(DOWNS, (16, 24, 24), (4, 8, 16))),
    "U-Net, every layer an attribute": (
        FlatUNet,
        named(("conv3_2", "conv4_2", "conv5_2"), (16, 24, 32), (4, 8, 16)),
    ),
    "U-Net, levels that give pairs": (
        PairUNet,
        named(("downs.2.block", "downs.3.block", "middle"), (16, 24, 32), (4, 8, 16)),
    ),
    "U-Net++": (UNetPlusPlus, named(("conv2_0", "conv3_0", "conv4_0"), (16, 24, 32), (4, 8, 16))),
    "U-Net 3+": (UNet3Plus, named(DOWNS, (16, 24, 24), (4, 8, 16))),
    "Attention U-Net": (AttentionUNet, named(DOWNS, (16, 24, 24), (4, 8, 16))),
    "U-Net, nested": (
        nested_unet,
        named([f"0{'.model.1' * i}.model.0" for i in (1, 2, 3)], (16, 24, 32), (4, 8, 16)),
    ),
    "W-Net": (WNet, named([f"first.{name}" for name in DOWNS], (16, 24, 24), (4, 8, 16))),
    "Hourglasses": (
        Hourglasses,
        named(("hg1.low1", "hg1.low2.low1", "hg1.low2.low2.low3"), (8, 8, 8), (4, 8, 16)),
    ),
    "Tiramisu": (Tiramisu, named(("dense3", "bottleneck"), (44, 56), (4, 8))),
    "SegNet": (SegNet, named(("bn32", "bn42", "bn52"), (16, 24, 24), (4, 8, 16))),
    "FCN-8s": (FCN8s, named(("features.13", "features.18", "features.23", "fc6"), (16, 24, 24, 40), (4, 8, 16, 32))),
    "DeepLab, LargeFOV": (LargeFOV, named(("net.13", "net.20"), (16, 32), (4, 8))),
    "ENet": (ENet, named(("regular1_2", "dilated3_1"), (16, 32), (4, 8))),
    "MobileNet, LR-ASPP": (
        MobileNet,
        named(("features.3", "features.5", "features.8", "features.10"), (8, 12, 24, 96)),
    ),
    "Fast-SCNN": (FastSCNN, named(("dsconv1", "dsconv2", "bottleneck1", "bottleneck3"), (12, 16, 24, 40))),
    "ESPNet": (ESPNet, named(("b2", "b3"), (35, 64), (4, 8))),
    "BiSeNet": (BiSeNet, named(LAYERS, W)),
    "BiSeNet V2": (BiSeNetV2, named(("stem2", "s3", "s4", "s5_4"), (4, 8, 16, 32))),
    "DDRNet": (DDRNet, named(("layer2", "layer3", "layer4", "layer5"), (8, 16, 32, 48), (8, 16, 32, 64))),
    "PIDNet": (PIDNet, named(("layer2", "layer3", "layer4", "layer5"), (16, 24, 32, 48), (8, 16, 32, 64))),
    "HRNet": (HRNet, named([f"stage4[{i}]" for i in range(4)], (4, 8, 16, 32))),
    "HRNet, more exchanges": (lambda: HRNet(2), named([f"stage4[{i}]" for i in range(4)], (4, 8, 16, 32))),
    "SegFormer": (SegFormer, named([f"norm{i}" for i in (1, 2, 3, 4)], W)),
    "Swin": (Swin, named([*(f"layers.{i}.blocks.1" for i in range(3)), "norm"], W)),
    "Swin-Unet": (SwinUNet, named([*(f"layers.{i}.blocks.1" for i in range(3)), "norm"], (8, 16, 32, 64))),
    "ConvNeXt": (ConvNeXt, named([f"stages.{i}" for i in range(4)], W)),
    "DPT": (DPT, named(SPACED, (16,) * 4, (16,) * 4)),
    "ViT, SETR": (ViT, None),
    "no map smaller than the image": (FullResolution, None),
    "one coarse map": (Shallow, None),
    "operations outside PyTorch": (lambda: Detour(nn.Conv2d(W[-1], N, 1)), None),
}
"""Name → how the network is built; the stages, or None where ``attach`` must refuse."""
