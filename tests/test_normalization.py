"""BatchNorm gives the same numbers on one process and on several, and stays BatchNorm otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from processes import ProcessesOf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from service.basics.errors import SpecError
from service.distributed.batchnorm import merged, prepare
from service.distributed.gradient_sync import OverlappedSync
from service.distributed.world import World
from service.plan.samplers import share_of
from service.spec.models import ExchangeSpec

ROWS, MICRO_BATCH = 517, 60  # 9 micro-batches, the last of 37 rows
MODES: tuple[Literal["micro", "sync", "local"], ...] = ("micro", "sync", "local")


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with a forward pass of its own, as timm's BatchNormAct2d has."""

    def forward(self, input: Tensor) -> Tensor:
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert momentum is not None
        normal = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            momentum,
            self.eps,
        )
        return normal.relu()


def _conv_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.BatchNorm2d(7, momentum=0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 4),
        nn.BatchNorm1d(4),
    )


def _rows(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 + 2


def _share(rows: Tensor, shares: Sequence[int], world: World) -> Tensor:
    return rows.split_with_sizes(list(shares))[world.index]


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=within, atol=within, msg=name)


# --- micro ---------------------------------------------------------------------------------


class Forked(nn.Module):
    """Layers that are used by every pass, by some of them, and by none."""

    def __init__(self) -> None:
        super().__init__()
        self.every = nn.BatchNorm1d(5)
        self.some = nn.BatchNorm1d(5)
        self.none = nn.BatchNorm1d(5)
        self.average = nn.BatchNorm1d(5, momentum=None)
        self.untracked = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x: Tensor, *, also: bool) -> Tensor:
        x = self.untracked(self.average(self.every(x)))
        return self.some(x) if also else x


def _micro_batches(world: World) -> list[tuple[int, Tensor]]:
    """This process's (number, rows) of a step; the sequences differ in length."""
    rows = _rows(ROWS, 5, 6)
    own = share_of(-(-ROWS // MICRO_BATCH), index=world.index, of=world.processes)
    return [(n, rows[n * MICRO_BATCH : (n + 1) * MICRO_BATCH, :, : 6 - n % 3]) for n in own]


def _three_micro_steps(world: World) -> dict[str, Tensor]:
    model = Forked().double()
    normalization = prepare(model, "micro", world)
    for step in range(3):
        for number, rows in _micro_batches(world):
            model(rows + step, also=number == 8 and step == 1).sum().backward()
        normalization.finish_step()
    return _statistics(model)


def test_micro_moves_the_same_at_any_number_of_processes(processes: ProcessesOf) -> None:
    [one] = processes(1).run(_three_micro_steps)
    for count in (2, 3):
        for found in processes(count).run(_three_micro_steps):
            _assert_equal(found, one, within=1e-13)
    assert int(one["every.num_batches_tracked"]) == 3
    assert int(one["some.num_batches_tracked"]) == 1, "one micro-batch of one process used it"
    assert int(one["none.num_batches_tracked"]) == 0
    assert one["none.running_mean"].eq(0).all()
    assert one["none.running_var"].eq(1).all()


def test_micro_moves_once_by_the_mean_of_all_micro_batches(alone: World) -> None:
    layer = nn.BatchNorm1d(5, momentum=0.25).double()
    parts = [rows for _, rows in _micro_batches(alone)]
    values = torch.tensor([part.shape[0] * part.shape[2] for part in parts]).double()
    means = torch.stack([part.mean((0, 2)) for part in parts])
    variances = torch.stack([part.var((0, 2)) for part in parts])

    normalization = prepare(layer, "micro", alone)
    for part in parts:
        expected = F.batch_norm(part, None, None, training=True)
        torch.testing.assert_close(layer(part), expected, rtol=0, atol=1e-12)
        assert layer.running_mean is not None
        assert layer.running_mean.eq(0).all(), "it moved before the step was over"
    normalization.finish_step()

    weights = values / values.sum()
    expected_var = 0.75 + 0.25 * (weights @ variances)
    torch.testing.assert_close(layer.running_mean, 0.25 * (weights @ means))
    torch.testing.assert_close(layer.running_var, expected_var)
    everything = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    torch.testing.assert_close(weights @ means, everything.mean(1))


def test_micro_with_one_micro_batch_a_step_is_torch(alone: World) -> None:
    for momentum in (0.1, None):
        plain = nn.BatchNorm2d(5, momentum=momentum)
        ours = copy.deepcopy(plain)
        normalization = prepare(ours, "micro", alone)
        for step in range(4):
            rows = _rows(11, 5, 3, 2, seed=step).float()
            assert torch.equal(plain(rows), ours(rows))
            normalization.finish_step()
        _assert_equal(_statistics(ours), _statistics(plain), within=1e-6)


def test_forget_drops_a_rehearsal_even_of_nan(alone: World) -> None:
    layer = nn.BatchNorm1d(5)
    normalization = prepare(layer, "micro", alone)
    before = _statistics(layer)
    layer(torch.full((7, 5), torch.nan))
    layer(torch.full((7, 5), torch.inf))
    normalization.forget()
    normalization.finish_step()
    _assert_equal(_statistics(layer), before, within=0)
    layer(_rows(7, 5).float())
    normalization.finish_step()
    assert _statistics(layer)["running_mean"].isfinite().all()


def test_a_nan_that_is_not_forgotten_shows_as_in_torch(alone: World) -> None:
    layer = nn.BatchNorm1d(5)
    normalization = prepare(layer, "micro", alone)
    layer(torch.full((7, 5), torch.nan))
    layer(torch.ones(7, 5))
    normalization.finish_step()
    assert _statistics(layer)["running_mean"].isnan().all()


def test_micro_with_no_rows_counts_nothing_and_lets_the_gradient_through(alone: World) -> None:
    model = _conv_net()
    normalization = prepare(model, "micro", alone)
    before = _statistics(model)
    model(torch.zeros(0, 3, 4, 4)).sum().backward()
    normalization.finish_step()
    _assert_equal(_statistics(model), before, within=0)
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


def test_one_value_per_channel_is_torchs_error(alone: World) -> None:
    layer = nn.BatchNorm1d(5)
    prepare(layer, "micro", alone)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1, 5))


def test_activation_checkpointing_changes_no_statistics(alone: World) -> None:
    found = []
    for again in (False, True):
        model = _conv_net()
        normalization = prepare(model, "micro", alone)
        for rows in torch.split(_rows(13, 3, 4, 4).float(), 8):
            rows.requires_grad_()
            out = checkpoint(model, rows, use_reentrant=False) if again else model(rows)
            assert isinstance(out, Tensor)
            torch.sum(out.square()).backward()  # type: ignore[no-untyped-call]
        normalization.finish_step()
        found.append(_statistics(model))
    _assert_equal(found[1], found[0], within=1e-6)


def test_a_layer_with_its_own_forward_pass_moves_once_too(alone: World) -> None:
    theirs, ours = NormAct(3), nn.BatchNorm2d(3)
    states = []
    for layer in (theirs, ours):
        normalization = prepare(layer, "micro", alone)
        for rows in torch.split(_rows(13, 3, 2, 2).float(), 8):
            out = layer(rows)
            assert out.min() >= 0 or layer is ours
        layer(torch.zeros(0, 3, 2, 2))
        assert int(_statistics(layer)["num_batches_tracked"]) == 0
        normalization.finish_step()
        states.append(_statistics(layer))
    assert theirs.momentum == 0.1
    _assert_equal(states[0], states[1], within=0)


# --- sync ----------------------------------------------------------------------------------

# How 517 rows may lie on the processes; a process may have none.
SHARES = [(200, 317), (517, 0), (100, 400, 17), (0, 516, 1)]

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.BatchNorm1d, (5,), {}),
    "1d with length": (nn.BatchNorm1d, (5, 3), {"momentum": None}),
    "2d": (nn.BatchNorm2d, (5, 3, 2), {"affine": False}),
    "2d channels_last": (nn.BatchNorm2d, (5, 3, 2), {"bias": False}),
    "3d": (nn.BatchNorm3d, (5, 2, 1, 2), {"track_running_stats": False}),
}


def _layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    make, _, options = LAYERS[kind]
    layer = make(5, **options).to(dtype)
    for number, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return layer


def _input(kind: str, seed: int = 5) -> Tensor:
    rows = _rows(ROWS, *LAYERS[kind][1], seed=seed)
    return rows.to(memory_format=torch.channels_last) if "channels_last" in kind else rows


def _two_passes(layer: nn.Module, rows: Tensor, factors: Tensor) -> list[Tensor]:
    """[output, gradient of the rows] of the second pass."""
    layer(rows + 1)
    rows = rows.clone().requires_grad_()
    output = layer(rows)
    (output * factors).sum().backward()
    assert rows.grad is not None
    return [output.detach(), rows.grad]


def _sync_passes(world: World, kind: str, shares: tuple[int, ...]) -> dict[str, Any]:
    rows, factors = _input(kind), _input(kind, seed=6)
    layer = _layer(kind)
    prepare(layer, "sync", world)
    own = _share(rows, shares, world), _share(factors, shares, world)
    passes = _two_passes(layer, *own)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"rows": passes, "gradients": gradients, "statistics": _statistics(layer)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_sync_is_one_batchnorm_over_all_rows(
    processes: ProcessesOf, kind: str, shares: tuple[int, ...]
) -> None:
    whole = _layer(kind)
    expected = _two_passes(whole, _input(kind), _input(kind, seed=6))
    found = processes(len(shares)).run(_sync_passes, kind, shares)
    for number, tensor in enumerate(expected):
        joined = torch.cat([answer["rows"][number] for answer in found])
        torch.testing.assert_close(joined, tensor, rtol=1e-12, atol=1e-12)
    for name, parameter in whole.named_parameters():
        summed = torch.stack([answer["gradients"][name] for answer in found]).sum(0)
        # Sums of thousands of terms of either sign.
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-12, atol=1e-10)
    for answer in found:
        _assert_equal(answer["statistics"], _statistics(whole), within=1e-12)


def _train_with_ddp(world: World, rows: int) -> dict[str, Tensor]:
    """Weights and statistics after three steps, the rows being shared out unevenly."""
    model = _conv_net().double()
    prepare(model, "sync", world)
    exchange = OverlappedSync(model, world, spec=ExchangeSpec())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shares = {1: (rows,), 2: (rows - 3, 3), 3: (rows - 8, 0, 8)}[world.processes]
    for step in range(3):
        own = _share(_rows(rows, 3, 4, 4, seed=step), shares, world)
        optimizer.zero_grad()
        exchange.backward(exchange.model(own).square().cos().sum(), rows)
        optimizer.step()
    return dict(model.state_dict())


def test_sync_under_ddp_trains_as_one_process_does(processes: ProcessesOf) -> None:
    [one] = processes(1).run(_train_with_ddp, 51)
    for count in (2, 3):
        for found in processes(count).run(_train_with_ddp, 51):
            _assert_equal(found, one, within=1e-11)


def _far_from_zero(world: World) -> dict[str, Tensor]:
    rows = (_rows(ROWS, 5) + 1e6).float()
    layer = nn.BatchNorm1d(5, momentum=1.0)
    prepare(layer, "sync", world)
    out = layer(_share(rows, (100, 400, 17), world))
    return {"out": out.detach(), **_statistics(layer)}


def test_sync_far_from_zero_keeps_its_digits(processes: ProcessesOf) -> None:
    rows = (_rows(ROWS, 5) + 1e6).float()
    spacing = 1 / 16  # of float32 numbers at 1e6
    found = processes(3).run(_far_from_zero)
    expected = F.batch_norm(rows.double(), None, None, training=True)
    joined = torch.cat([answer["out"] for answer in found]).double()
    torch.testing.assert_close(joined, expected, rtol=0, atol=spacing / 2)
    for answer in found:
        mean, variance = answer["running_mean"].double(), answer["running_var"].double()
        torch.testing.assert_close(mean, rows.double().mean(0), rtol=0, atol=spacing)
        torch.testing.assert_close(variance, rows.double().var(0), rtol=1e-3, atol=0)


def test_merging_many_parts_far_from_zero_keeps_their_digits() -> None:
    parts = [(_rows(n % 7, 5, seed=n) + 1e6).float().double() for n in range(130)]
    parts = [part for part in parts if len(part)]
    everything = torch.cat(parts)
    empty = torch.zeros(1, 5)
    means = torch.cat([empty, torch.stack([part.mean(0) for part in parts]).float()])
    squares = torch.cat([empty, torch.stack([p.var(0, correction=0) * len(p) for p in parts])])
    counts = torch.tensor([0.0, *(len(part) for part in parts)])[:, None]
    mean, square = merged(means, squares.float(), counts)
    torch.testing.assert_close(mean.double(), everything.mean(0), rtol=0, atol=1 / 16)
    expected = everything.var(0, correction=0) * len(everything)
    torch.testing.assert_close(square.double(), expected, rtol=1e-3, atol=0)


def _sync_in_bf16(world: World) -> dict[str, Any]:
    rows = _share(_rows(24, 3, 4, 4).float(), (9, 0, 15), world)
    model = _conv_net()
    prepare(model, "sync", world)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(rows)
    out.float().square().sum().backward()
    return {"dtype": out.dtype, "out": out.detach().float(), "statistics": _statistics(model)}


def test_sync_under_autocast_is_near_the_whole_batch(processes: ProcessesOf) -> None:
    model = _conv_net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(_rows(24, 3, 4, 4).float())
    found = processes(3).run(_sync_in_bf16)
    assert {answer["dtype"] for answer in found} == {torch.bfloat16}
    joined = torch.cat([answer["out"] for answer in found])
    torch.testing.assert_close(joined, expected.float(), rtol=0.05, atol=0.05)
    for answer in found:
        _assert_equal(answer["statistics"], _statistics(model), within=1e-2)
        _assert_equal(answer["statistics"], found[0]["statistics"], within=0)


def _sync_errors(world: World) -> list[str]:
    layer = nn.BatchNorm1d(5)
    prepare(layer, "sync", world)
    errors = []
    for rows in (0, int(world.is_lead)):
        with pytest.raises(ValueError, match="over all processes") as one_row:
            layer(torch.ones(rows, 5))
        errors.append(str(one_row.value)[-1:])
    own = torch.randn(4 + world.index, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(own).square().sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable") as twice:
        torch.autograd.backward(grad.sum())
    return [*errors, type(twice.value).__name__]


def test_sync_says_on_every_process_what_it_cannot_do(processes: ProcessesOf) -> None:
    assert processes(3).run(_sync_errors) == [["0", "1", "RuntimeError"]] * 3


def _sync_in_eval(world: World) -> bool:
    plain = _conv_net().eval()
    ours = copy.deepcopy(plain)
    prepare(ours, "sync", world)
    if world.is_lead:  # alone: evaluation waits for nobody
        rows = _rows(3, 3, 4, 4).float()
        return torch.equal(plain(rows), ours(rows))
    return True


def test_sync_communicates_only_in_training(processes: ProcessesOf) -> None:
    assert processes(2).run(_sync_in_eval, timeout_seconds=120) == [True, True]


def _sync_compiled(world: World) -> dict[str, Tensor]:
    model = _conv_net().double()
    prepare(model, "sync", world)
    compiled = torch.compile(model, backend="aot_eager")
    for rows in torch.split(_rows(13, 3, 4, 4), 7):
        compiled(rows.tensor_split(world.processes)[world.index]).square().sum().backward()
    return _statistics(model)


def test_sync_compiles(processes: ProcessesOf) -> None:
    whole = _conv_net().double()
    for rows in torch.split(_rows(13, 3, 4, 4), 7):
        whole(rows)
    for found in processes(2).run(_sync_compiled):
        _assert_equal(found, _statistics(whole), within=1e-12)


def _sync_on_one_gpu(world: World) -> dict[str, Any]:
    rows = _share(_rows(24, 3, 4, 4).float(), (24, 0), world).cuda()
    model = _conv_net().cuda()
    prepare(model, "sync", world)
    with torch.autocast("cuda", torch.bfloat16):
        out = model(rows)
    out.float().square().sum().backward()
    return {"out": out.float().cpu(), "statistics": _statistics(model.cpu())}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_sync_on_a_gpu_takes_an_empty_share_under_autocast(processes: ProcessesOf) -> None:
    model = _conv_net().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(_rows(24, 3, 4, 4).float().cuda()).float().cpu()
    found = processes(2).run(_sync_on_one_gpu)
    torch.testing.assert_close(found[0]["out"], expected, rtol=0.05, atol=0.05)
    for answer in found:
        _assert_equal(answer["statistics"], _statistics(model.cpu()), within=1e-2)


# --- every mode ----------------------------------------------------------------------------


def _stays_a_batchnorm(world: World) -> None:
    for mode in MODES:
        model = nn.Sequential(
            _conv_net(), nn.BatchNorm3d(2), nn.GroupNorm(1, 2), nn.SyncBatchNorm(2)
        )
        model[1].eval()
        plain = copy.deepcopy(model)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for _ in range(2):  # a second time changes nothing
            prepare(model, mode, world)
        after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert list(plain.state_dict()) == list(model.state_dict())
        assert all(after[name] is tensor for name, tensor in tensors.items())
        assert after.keys() == tensors.keys()
        for old, new in zip(plain.modules(), model.modules(), strict=True):
            assert isinstance(new, type(old))
            assert len(type(new).__mro__) <= len(type(old).__mro__) + 3
            assert old.training == new.training
        assert [type(model[2]), type(model[3])] == [nn.GroupNorm, nn.SyncBatchNorm]
        model.load_state_dict(plain.state_dict())
        rows = _rows(4, 3, 4, 4).float()
        assert torch.equal(plain[0].eval()(rows), model[0].eval()(rows))


def test_the_layers_stay_what_they_were(processes: ProcessesOf) -> None:
    processes(1).run(_stays_a_batchnorm)
    processes(2).run(_stays_a_batchnorm)


def _class_names(world: World) -> list[str]:
    return [type(_prepared_root(mode, world)).__name__ for mode in MODES]


def _prepared_root(mode: Literal["micro", "sync", "local"], world: World) -> nn.Module:
    root = nn.BatchNorm2d(3)
    prepare(root, mode, world)
    return root


def test_only_what_must_change_changes(processes: ProcessesOf) -> None:
    one, two = processes(1).run(_class_names), processes(2).run(_class_names)
    assert one == [["MicroBatchNorm2d", "BatchNorm2d", "BatchNorm2d"]]
    assert two == [["MicroBatchNorm2d", "SyncBatchNorm2d", "BatchNorm2d"]] * 2


def _copies_train_apart(world: World) -> tuple[bool, bool]:
    moved = []
    for mode in ("micro", "sync"):
        model = _conv_net()
        normalization = prepare(model, mode, world)
        twin = copy.deepcopy(model)
        twin(_rows(6, 3, 4, 4).float()).sum().backward()
        normalization.finish_step()
        moved.append(bool(_statistics(model)["1.running_mean"].ne(0).any()))
    return moved[0], moved[1]


def test_a_copy_leaves_the_model_alone(processes: ProcessesOf) -> None:
    assert processes(2).run(_copies_train_apart) == [(False, False)] * 2


def _local_drifts(world: World) -> Tensor:
    layer = nn.BatchNorm1d(5)
    normalization = prepare(layer, "local", world)
    layer(_rows(7, 5, seed=world.index).float())
    normalization.finish_step()
    return _statistics(layer)["running_mean"]


def test_local_drifts_apart(processes: ProcessesOf) -> None:
    first, second = processes(2).run(_local_drifts)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_without_a_size_is_refused_by_name(
    mode: Literal["micro", "sync", "local"], alone: World
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())
    with pytest.raises(SpecError, match=r"layers 1 do not know their size"):
        prepare(model, mode, alone)


def test_sync_refuses_a_forward_pass_that_it_cannot_see_into(alone: World) -> None:
    with pytest.raises(SpecError, match=r"the layer 0 of class NormAct.*Use batchnorm: micro"):
        prepare(nn.Sequential(NormAct(3)), "sync", alone)


def test_micro_works_in_bf16_and_channels_last_and_after_a_move(alone: World) -> None:
    rows = _rows(12, 3, 4, 4).float()
    plain = _conv_net()
    plain(rows)
    for variant in ("autocast", "channels_last", "bfloat16"):
        model = _conv_net()
        normalization = prepare(model, "micro", alone)
        own = rows
        if variant == "channels_last":
            own = rows.to(memory_format=torch.channels_last)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if variant == "bfloat16":
            model, own = model.bfloat16(), rows.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
            model(own).float().sum().backward()
        normalization.finish_step()
        found = {name: b.float() for name, b in _statistics(model).items()}
        expected = {name: b.float() for name, b in _statistics(plain).items()}
        _assert_equal(found, expected, within=1e-5 if variant == "channels_last" else 0.02)


def test_micro_is_compiled_whole_and_only_once(alone: World) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()  # of what other tests have compiled in this process
    states = []
    for compiled in (False, True):
        model = _conv_net()
        normalization = prepare(model, "micro", alone)
        run = torch.compile(model, backend=count, fullgraph=True) if compiled else model
        for _ in range(5):
            for rows in torch.split(_rows(12, 3, 4, 4).float(), 4):
                run(rows).square().sum().backward()
            normalization.finish_step()
        states.append(_statistics(model))
    _assert_equal(states[1], states[0], within=1e-5)
    assert graphs == 1


def test_the_table_says_over_how_many_rows(alone: World) -> None:
    sizes = {"micro_batch": 17, "last": 17, "processes": 3}
    told = {mode: dict(prepare(_conv_net(), mode, alone).table(**sizes)) for mode in MODES}
    assert told["micro"]["normalised over"] == "17 rows, one micro-batch"
    assert told["sync"]["normalised over"].startswith("51 rows")
    assert "separately" in told["local"]["running statistics change"]
    assert told["sync"]["BatchNorm layers"] == "3, batchnorm: sync"
    assert prepare(nn.Linear(2, 2), "sync", alone).table(**sizes) == [("BatchNorm layers", "none")]
