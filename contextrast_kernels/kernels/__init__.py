"""Fused Triton kernels of the losses. Nothing here is imported until an op needs it.

To read them: ``contextrast`` is the whole loss in three phases. ``anchors``, ``_log_sums``, ``pixel_anchor`` and
``_finish`` have their kernels, ``_gradient`` those of the backward pass, ``_tiles`` the pieces that they share, and
``_codes`` and ``_sums`` what goes between them. ``_launch`` and ``_tile_table`` decide how they are launched.
``info_nce`` stands alone, with ``_pairs`` for the pieces of its kernels.
"""
