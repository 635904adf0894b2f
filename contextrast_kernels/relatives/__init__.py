"""The published relatives of Contextrast on the same kernels: ContrastiveSeg, MS/CS, RegionContrast and PNE."""

from contextrast_kernels.relatives.memory_bank import MemoryBank
from contextrast_kernels.relatives.multi_scale import MultiScaleContrastLoss
from contextrast_kernels.relatives.pixel_contrast import PixelContrastLoss
from contextrast_kernels.relatives.pne import PNELoss
from contextrast_kernels.relatives.region_contrast import RegionContrastLoss
from contextrast_kernels.relatives.samplers import Sampler

__all__ = ["MemoryBank", "MultiScaleContrastLoss", "PNELoss", "PixelContrastLoss", "RegionContrastLoss", "Sampler"]
