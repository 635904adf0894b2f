"""ResNets with a head in the same class, and pyramids on top of them."""

import torch
from torch import nn
from torch.nn import functional as F
from zoo_blocks import Basic, Bottleneck, N, W, conv, double, layer, up


class FlatResNet(nn.Module):
    """A ResNet with torchvision's names and a head in one class."""

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
    """A ResNet whose head has a convolution as wide as the last stage, as attributes of the network."""

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
    """semseg's network: layer0 ... layer4, ppm, cls and, in training, aux."""

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
    """A network with attention to soft regions of an auxiliary map."""

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


class FPN(FlatResNet):
    """A pyramid with lateral and smoothing convolutions as attributes. ``coarser`` adds RetinaNet's extra level."""

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
    """A network with blocks that refine from the coarsest to the finest map."""

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
    """A network with decoder blocks of transposed convolutions, whose results are added to the encoder's maps."""

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
    """ternausnet's network: conv1 ... conv5 of a ResNet, a center behind a pool, and decoders."""

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
