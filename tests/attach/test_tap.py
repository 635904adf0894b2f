"""The tap works under what commonly breaks hooks: copies, compilation, in-place writes, checkpointing, evaluation,
several processes, sharding, and changes of the model's precision."""

import copy
import io
import socket

import pytest
import torch
from nets import IMAGES, LABELS, N, Net, Wrapped, attached, call, found, step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import contextrast_kernels as ck
from contextrast_kernels.attach import FeatureTap

pytestmark = pytest.mark.usefixtures("reference")


def test_a_deep_copy_has_a_tap_of_its_own():
    """Exponential moving averages copy the model, hooks included."""
    model, tap = attached()
    model(IMAGES)  # recorded and not fetched; a copy must not fail because of it
    ema = torch.optim.swa_utils.AveragedModel(model)
    other = ema.module.contextrast_heads
    assert isinstance(other, FeatureTap) and other is not tap
    expected = tap.features()
    ema.train()
    ema(IMAGES)
    with pytest.raises(RuntimeError, match="taken already"):
        tap.features()
    for x, y in zip(other.features(), expected, strict=True):
        torch.testing.assert_close(x, y)
    ema.update_parameters(model)
    other.detach()
    assert not hasattr(ema.module, "contextrast_heads")
    assert step(model, tap) > 0


def test_a_copy_of_a_part_is_only_that_part():
    """The copy, such as a teacher's encoder, contains neither the model nor the tap, and records nothing."""
    model, tap = attached(Wrapped(lambda x, maps: maps))
    part = copy.deepcopy(model.encoder)
    model(IMAGES)
    part(torch.zeros_like(IMAGES))
    expected = model.encoder.net.maps(IMAGES)[1]
    torch.testing.assert_close(tap.features()[1], copy.deepcopy(tap.heads[1])(expected))
    assert len(part._forward_hooks) == 4 and all(hook.tap is None for hook in part._forward_hooks.values())


def test_a_copy_that_reaches_a_part_before_the_model_raises():
    """The part is copied without a tap, and the model's copy then holds it."""
    for order in (("model", "encoder"), ("encoder", "model")):
        parent, (model, _) = nn.Module(), attached(Wrapped(lambda x, maps: maps))
        for name in order:
            parent.add_module(name, {"model": model, "encoder": model.encoder}[name])
        twin = copy.deepcopy(parent).model
        twin(IMAGES)
        if order[0] == "model":
            assert len(twin.contextrast_heads.features()) == 4
        else:
            with pytest.raises(RuntimeError, match=r"gave no feature map .* register the model before its parts"):
                twin.contextrast_heads.features()


def test_a_forward_that_raises_leaves_nothing_behind():
    class Broken(Net):
        broken = False

        def forward(self, x):
            logits = super().forward(x)
            if self.broken:
                raise ValueError("out of patience")
            return logits

    model, tap = attached(Broken())
    model.broken = True
    with pytest.raises(ValueError, match="out of patience"):
        model(IMAGES)
    assert tap._maps is None
    model.stages[0](model.stem(IMAGES))  # called directly: no hook runs
    sentence = r"nothing was recorded: the last forward raised an exception\. Call model\(images\) again\.$"
    with pytest.raises(RuntimeError, match=sentence):
        tap.features()
    model.broken = False
    assert step(model, tap) > 0
    twin = copy.deepcopy(model)
    twin.broken = True
    with pytest.raises(ValueError, match="out of patience"):
        twin(IMAGES)
    assert twin.contextrast_heads._maps is None
    tap.detach()
    assert not model._forward_hooks and not model._forward_hooks_always_called


def test_an_attached_model_can_be_saved_whole():
    model, tap = attached()
    model(IMAGES)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match=r"copy of the model has not run\. Call it on images\.$"):
        loaded.contextrast_heads.features()
    loaded(IMAGES)
    for x, y in zip(loaded.contextrast_heads.features(), tap.features(), strict=True):
        torch.testing.assert_close(x, y)


def test_an_attached_model_can_be_compiled():
    """First the model alone is compiled and evaluated before it trains. Then model, heads and loss are one graph."""
    model, tap = attached(Net(inplace=True))
    twin = copy.deepcopy(model)
    expected = step(twin, twin.contextrast_heads)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.eval()
    with torch.no_grad():
        compiled(IMAGES)
    model.train()
    assert step(compiled, tap) == pytest.approx(expected, rel=1e-4)

    model, _ = attached(layers=["stages.0", "stages.2"])

    def whole(model, images, labels):
        logits = model(images)
        features = model.contextrast_heads.features()
        options = {"layer_weights": (1.0, 0.4), "negatives": "semi-hard"}  # distances take long to trace
        return ck.contextrast_loss(features, labels, logits, num_classes=N, **options)

    expected = whole(copy.deepcopy(model), IMAGES, LABELS)
    loss = torch.compile(whole, backend="eager", fullgraph=True)(model, IMAGES, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_attaching_after_compile_is_refused():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(IMAGES)
    with pytest.raises(RuntimeError, match=r"before torch\.compile"):
        attached(compiled)
    _, tap = attached(model)
    logits = compiled(IMAGES)
    assert logits.requires_grad
    with pytest.raises(RuntimeError, match=r"'stages.0' gave no feature map .* then compile"):
        tap.features()
    in_place = Net()
    in_place.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"before torch\.compile"):
        attached(in_place)
    parts = Net()
    parts.stages[1].compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"before torch\.compile.* got 'stages\.1' compiled\. .* or its parts"):
        attached(parts)
    parts = Net()
    parts.stages[2] = torch.compile(parts.stages[2], backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"got 'stages\.2' compiled"):
        attached(parts)


def test_a_layer_that_is_overwritten_is_copied():
    """The layer is a BatchNorm before a ReLU(inplace=True): the tap keeps what it returned before the ReLU."""
    model, tap = attached(Net(inplace=True), layers=["stages.0.1", "stages.1.2"])
    assert [layer.overwritten for layer in tap.layers] == [True, False]
    assert "copied" in tap.table().splitlines()[1] and "copied" not in tap.table().splitlines()[2]
    seen = []
    tap.heads[0].register_forward_pre_hook(lambda head, args: seen.append(args[0].detach().clone()))
    model(IMAGES)
    sum(x.sum() for x in tap.features()).backward()
    twin = copy.deepcopy(model)
    twin.train()
    expected = twin.stages[0][1](twin.stages[0][0](twin.stem(IMAGES)))
    assert expected.min() < -1
    torch.testing.assert_close(seen[0], expected.detach())


def test_a_layer_that_is_overwritten_in_training_only_is_refused():
    class Overwriting(Net):
        def forward(self, x):
            maps = self.maps(x)
            if self.training:
                maps[2].mul_(0.5)
            return self.classifier(maps[0])

    model, tap = attached(Overwriting())
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.2' was overwritten in place"):
        tap.features()


def test_checkpointing_works_if_it_is_not_reentrant():
    """Non-reentrant checkpointing does not change the results, and its recomputation records nothing. With reentrant
    checkpointing the features have no gradient, which raises an error."""
    values = []
    for run in (call, lambda s, x: checkpoint(s, x, use_reentrant=False)):
        torch.manual_seed(0)
        model, tap = attached(Net(run=run), layers=["stages.0.1", "stages.1", "stages.2"])
        values.append((step(model, tap), [p.grad for p in model.stages[:3].parameters()]))
        with pytest.raises(RuntimeError, match="taken already"):
            tap.features()
    assert values[0][0] == values[1][0]
    for x, y in zip(values[0][1], values[1][1], strict=True):
        torch.testing.assert_close(x, y)
    model, tap = attached(Net(run=lambda s, x: checkpoint(s, x, use_reentrant=True)), layers=["stages.1.0", "stages.2"])
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.1.0' carries no gradient.*use_reentrant=False"):
        tap.features()


def test_recomputing_the_whole_model_keeps_what_a_later_forward_recorded():
    """Checkpointing runs the model again in the backward pass."""
    model, tap = attached()
    others = IMAGES.flip(0, 3)
    first = checkpoint(model, IMAGES, use_reentrant=False).sum() + sum(x.sum() for x in tap.features())
    checkpoint(model, others, use_reentrant=False)
    first.backward()
    twin = copy.deepcopy(model)
    twin(others)
    for x, y in zip(tap.features(), twin.contextrast_heads.features(), strict=True):
        torch.testing.assert_close(x, y)
    checkpoint(model, IMAGES, use_reentrant=False).sum().backward()
    tap.features()
    assert tap._maps is None


def test_a_replaced_layer_raises_and_heads_may_be_replaced():
    model, tap = attached(layers=["stages.0.1", "stages.1"])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()  # SyncBatchNorm trains on a GPU alone
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in tap.modules()) == 2
    tap.train()
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.0.1' .* replaced after attach\(\), as convert_sync"):
        tap.features()


def test_evaluation_records_nothing():
    model, tap = attached()
    model.forward(IMAGES)
    with pytest.raises(RuntimeError, match=r"not run since attach\(\)\. Call model\(images\), not model\.forward"):
        tap.features()
    model.eval()
    model(IMAGES)
    assert tap._maps is None
    with pytest.raises(RuntimeError, match=r"evaluation mode\. Call model\.train\(\), and freeze normalisation"):
        tap.features()
    model.train()
    with torch.no_grad():
        model(IMAGES)
    assert tap._maps is None
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        tap.features()
    model(IMAGES)
    tap.features()
    assert tap._maps is None
    evaluated, its_tap = attached(Net().eval())
    evaluated(IMAGES)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        its_tap.features()
    model.stages.eval()  # frozen normalisation, while the model trains
    model(IMAGES)
    assert len(tap.features()) == 4


def test_ddp_trains_when_a_batch_has_nothing_to_contrast(one_rank):
    """With an all-ignored batch the loss still depends on every head. DDP raises an error if it does not."""
    model, tap = attached()
    ddp = nn.parallel.DistributedDataParallel(model)
    for labels in (LABELS, torch.full_like(LABELS, 255), LABELS):
        model.zero_grad()
        step(ddp, tap, labels=labels)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match="plain model, got DistributedDataParallel"):
        attached(ddp)
    F.cross_entropy(ddp(IMAGES), LABELS).backward()
    with pytest.raises(RuntimeError, match="finished reduction"):
        ddp(IMAGES)


def test_a_sharded_model_gets_the_loss_and_gradients_of_the_plain_model(one_rank):
    """Under FSDP2 the heads are not sharded after the model's forward, unless it reshards them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    plain, _ = attached()
    for whole, and_heads in ((True, False), (False, True)):
        model, twin = copy.deepcopy(plain), copy.deepcopy(plain)
        tap = model.contextrast_heads
        expected = step(twin, twin.contextrast_heads)
        for part in (*model.stages, *(tap.heads if and_heads else ())):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=not whole)
        assert step(model, tap) == pytest.approx(expected, rel=1e-6)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    model = fully_shard(copy.deepcopy(plain), mesh=mesh, reshard_after_forward=True)
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"expected whole projection heads.*fully_shard\(head\) for each head"):
        model.contextrast_heads.features()
    for late in (fully_shard(Net(), mesh=mesh), nn.Sequential(fully_shard(Net(), mesh=mesh))):
        with pytest.raises(
            RuntimeError, match=r"^model: expected the plain model, got (FSDPNet|Sequential)\. .* shard"
        ):
            attached(late)


def test_heads_sharded_away_raise_a_clear_error():
    """With two or more ranks FullyShardedDataParallel leaves flat parameters after its forward."""
    model, tap = attached()
    model(IMAGES)
    tap.heads[0][0].weight = nn.Parameter(tap.heads[0][0].weight.detach().flatten()[:5])
    with pytest.raises(RuntimeError, match=r"whole projection heads, got .* \(5,\) .*inside the wrapped module's"):
        tap.features()


def _train_on_a_rank(rank, port, outcome):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tap = attached()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        optimizer.zero_grad()
        step(ddp, tap, images=images, labels=torch.full_like(LABELS, 255) if rank == 0 else LABELS)
        optimizer.step()
    outcome[rank] = [p.detach() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_stay_equal_when_one_has_nothing_to_contrast():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        outcome = manager.dict()
        torch.multiprocessing.spawn(_train_on_a_rank, (port, outcome), nprocs=2)
        first, second = outcome[0], outcome[1]
    torch.manual_seed(0)
    before = list(attached()[0].parameters())
    for x, y, z in zip(first, second, before, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
        assert x.ndim == 1 or not torch.equal(x, z)


def test_the_heads_belong_to_the_model():
    model, tap = attached()
    names = dict(model.named_parameters())
    assert "contextrast_heads.heads.0.0.weight" in names and "contextrast_heads.heads.3.3.bias" in names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {k: v.detach().clone() for k, v in tap.named_parameters()}
    step(model, tap)
    optimizer.step()
    assert all(not torch.equal(before[k], v) for k, v in tap.named_parameters() if k.endswith("weight"))
    model.double()
    assert all(p.dtype == torch.float64 for p in tap.parameters())
    model(IMAGES.double())
    assert all(x.dtype == torch.float64 for x in tap.features())
    clone, _ = attached()
    clone.load_state_dict(model.state_dict())
    tap.detach()
    tap.detach()
    assert model.state_dict().keys() == Net().state_dict().keys()
    with pytest.raises(RuntimeError, match="detached"):
        tap.features()
    torch.export.export(model.eval(), (IMAGES.double(),))
    assert len(found(model, example_input=IMAGES.double())) == 4  # and may be attached again


def test_other_ranks_print_nothing(one_rank, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    ck.attach(Net(), dim=8)
    assert capsys.readouterr().out == ""
