"""The definition of the Contextrast loss on the CPU beside the relatives' published code, on the same maps.

    CONTEXTRAST_PEERS=<folder of checkouts> pytest benchmarks/bench_relatives.py --benchmark-enable

Each is another loss, timed forward and backward: what a step costs, not which is better. peers.py names the checkouts.
"""

import functools
import os
import pathlib
from dataclasses import replace

import pytest
import torch

import contextrast_kernels as ck
from benchmarks import peers, results
from contextrast_kernels import cases, measure

FOLDER = pathlib.Path(os.environ["CONTEXTRAST_PEERS"]) if "CONTEXTRAST_PEERS" in os.environ else None
CASE = replace(cases.CASES["cityscapes"], batch=2, height=256, width=384, dtype=torch.float32)
OURS = "reference"


@functools.cache
def inputs() -> cases.Inputs:
    made = CASE.inputs()
    return made._replace(features=[x.requires_grad_() for x in made.features])


def ours():
    with ck.backend("reference"):
        return ck.contextrast_loss(inputs().features, inputs().labels, inputs().logits, **CASE.loss_options)


@pytest.mark.parametrize("name", [OURS, *peers.RELATIVES])
def test_a_step_of_the_loss(benchmark, name):
    found = [peers.Peer(OURS, ours, "Contextrast in plain PyTorch, 4 layers")]
    if name != OURS:
        given = inputs()
        found += peers.losses(FOLDER, given.features, given.labels, given.logits, CASE.num_classes)
    [peer] = [peer for peer in found if peer.name == name]
    if peer.call is None:
        pytest.skip(peer.note)

    def step():
        return torch.autograd.grad(peer.call(), inputs().features, allow_unused=True)

    with peers.quiet():
        try:
            step()
        except Exception as error:
            pytest.skip(peers.failure(error))
        syncs = measure.syncs(step, torch.device("cpu"))
        benchmark.pedantic(step, rounds=7, warmup_rounds=1)
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        row = results.Row(
            **results.of_case(CASE),
            what="contextrast_loss forward+backward" if name == OURS else "relative's loss forward+backward",
            by=name,
            threads=torch.get_num_threads(),
            exact="yes" if name == OURS else "another loss",
            note=peer.note,
            syncs=syncs,
            median_ms=1e3 * stats.median,
            iqr_ms=1e3 * stats.iqr,
            **results.environment(),
        )
        results.record(results.path_of(row.device), row)
