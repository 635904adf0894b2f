"""benchmarks/peers.py: other people's code leaves no module behind, and its crashes become lines of the table.

The relatives' files are replaced here by a few lines with the same names and signatures. If CONTEXTRAST_PEERS names a
folder of checkouts, the real ones run too.
"""

import os
import pathlib
import sys

import pytest
import torch

from benchmarks import peers
from benchmarks.results import Absent
from contextrast_kernels import measure

CPU = torch.device("cpu")


def small_case():
    """Features of four layers, labels and logits: 19 classes in large squares, since the relatives fail where an image
    has no class of a few pixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 19, (2, 1, 2, 3), generator=generator)
    labels = torch.nn.functional.interpolate(coarse.float(), (256, 384)).long()[:, 0]
    labels[:, -8:] = 255
    logits = torch.randn(2, 19, 64, 96, generator=generator)
    logits += 3 * torch.nn.functional.one_hot(labels[:, ::4, ::4].clamp(max=18), 19).movedim(3, 1)
    features = [torch.randn(2, 256, 64 >> i, 96 >> i, generator=generator).requires_grad_() for i in range(4)]
    return features, labels, logits


FILES = {
    "ContrastiveSeg/lib/loss/loss_contrast.py": """
        import lib.helper
        class PixelContrastLoss:
            def __init__(self, configer):
                assert configer.exists('loss', 'params') and configer.get('contrast', 'max_samples') == 1024
            def __call__(self, feats, labels, predict):
                assert feats.norm(dim=1).allclose(torch.ones(())) and predict.shape == (2, 64, 96)
                return feats.cuda().sum()
        """,
    "ContrastiveSeg/lib/helper.py": "",
    "MS_CS_ContrSeg/losses/__init__.py": "raise ImportError('the package is not asked for')",
    "MS_CS_ContrSeg/losses/DenseContrastiveLossV2_ms.py": """
        from utils import DATASETS_INFO, printlog, Logger as Log
        class DenseContrastiveLossV2_ms:
            def __init__(self, config):
                printlog('not shown'), Log.info('not shown')
                self.ignored = len(DATASETS_INFO[config['dataset']].CLASS_INFO[config['experiment']][1]) - 1
                assert config['weights'] == [1.0, 0.7, 0.4, 0.1]
            def __call__(self, labels, features):
                assert int(labels.max()) == self.ignored == 19
                return sum(x.cuda().mean() for x in features)
        """,
    "PNE_Loss/mmseg/models/losses/reverse_contrastive_loss.py": """
        import mmcv, ipdb
        from torchvision import transforms
        from ..builder import LOSSES
        from .utils import weight_reduce_loss
        from mmseg.utils import get_root_logger
        @LOSSES.register_module()
        class ReverseContrastiveLoss:
            def __init__(self, patch_size, temp, loss_weight, cal_function, cal_gate): pass
            def __call__(self, cls_score, label, con_seg_logit):
                assert label.shape[1] == 1 and cls_score.shape[2:] == con_seg_logit.shape[2:] == (32, 48)
                return label.type(torch.cuda.FloatTensor).mean() * con_seg_logit.sum()
        """,
    "RegionContrast/pyseg/models/decoder_contrast.py": """
        from .base import nothing
        class dec_deeplabv3_contrast(torch.nn.Module):
            def __init__(self, in_planes, num_classes):
                super().__init__()
                self.register_buffer('queue0', torch.zeros(256))
            def forward(self, x):
                fea = self.head(self.aspp(x))
                assert self.final(fea).shape == (2, 19, 32, 48) and not self.queue0.requires_grad
                self.queue0 = self.queue0 + fea.mean((0, 2, 3))
                return None, self.queue0.sum()
        """,
    "RegionContrast/pyseg/models/base.py": "nothing = None",
}


@pytest.fixture
def checkouts(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        indent = 8 if lines and not lines[0] else 0
        file.write_text("import torch\n" + "\n".join(line[indent:] for line in lines) + "\n")
    return tmp_path


def assert_every_loss_runs(folder):
    features, labels, logits = small_case()
    for name in peers.RELATIVES:
        call, _ = peers.official(name, folder, features, labels, logits)
        for _ in range(2):
            call().backward()
        assert any(x.grad is not None and bool(x.grad.isfinite().all()) for x in features), name
        for x in features:
            x.grad = None


def test_every_relative_is_loaded_called_and_unloaded(checkouts):
    modules, path, cuda = set(sys.modules), list(sys.path), torch.Tensor.cuda
    assert_every_loss_runs(checkouts)
    left = {name.split(".")[0] for name in set(sys.modules) - modules}
    assert not left & {"lib", "utils", "losses", "mmseg", "mmcv", "ipdb", "pyseg"}
    assert sys.path == path and torch.Tensor.cuda is cuda and torch.cuda.FloatTensor is not torch.FloatTensor


def test_the_real_checkouts_run():
    folder = os.environ.get("CONTEXTRAST_PEERS")
    if not folder:
        pytest.skip("set CONTEXTRAST_PEERS to a folder with checkouts of the relatives: see benchmarks/peers.py")
    assert_every_loss_runs(pathlib.Path(folder))


def test_an_absent_checkout_and_a_broken_one_raise_different_errors(tmp_path):
    (tmp_path / "PNE_Loss").mkdir()
    with pytest.raises(ModuleNotFoundError) as error:
        peers.official("PNE_Loss", tmp_path, *small_case())
    assert peers.failure(error.value).startswith("failed: ModuleNotFoundError: No module named")
    for name, folder in (("ContrastiveSeg", tmp_path), *((name, None) for name in peers.RELATIVES)):
        with pytest.raises(Absent, match=f"no checkout {name}"):
            peers.official(name, folder, *small_case())


def test_views_have_the_published_number_unless_the_code_would_fail(checkouts):
    features, labels, logits = small_case()
    notes = [
        peers.official("ContrastiveSeg", checkouts, features, y, logits)[1]
        for y in (labels, torch.arange(256 * 384).view(1, 256, 384).expand(2, -1, -1) // 4 % 400 // 4 % 100)
    ]
    assert notes[0].endswith("at most 100 views") and not notes[1].endswith("at most 100 views")


@pytest.mark.parametrize(
    ("waits", "call"),
    [
        (0, lambda x: x.exp().sum()),
        (1, lambda x: x.sum().item()),
        (2, lambda x: (x[x > 0], bool((x > 0).any()))),
        (2, lambda x: (x.nonzero(), torch.unique(x))),
    ],
)
def test_what_the_host_waits_for_is_counted(waits, call):
    assert measure.syncs(lambda: call(torch.linspace(-1, 1, 5)), CPU) == waits
