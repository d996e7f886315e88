"""Predicted memory and work: hand-computed numbers, real allocations, what the CUDA scan takes."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from tiny_models import tiny_denoiser, tiny_unet, tiny_vae
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gspn2_diffusers import GSPN2Block, GSPN2Config, apply_gspn2, gspn2_sites
from gspn2_diffusers.families import family_of
from gspn2_diffusers.fuse import fuse_block
from gspn2_diffusers.kernels import cuda_scan, launch
from gspn2_diffusers.kernels.layout import LineLayout, TokenLayout, pad
from gspn2_diffusers.kernels.plans import FORWARD
from gspn2_diffusers.pipelines.cards import CARDS, card_rates, measure_rates, specified_rates
from gspn2_diffusers.pipelines.parts import without_data
from gspn2_diffusers.pipelines.tracing import SCAN_DEVICE, Rates, Work, trace

MAP = 4 * 1024 * 16  # bytes of what `meta()` makes
RATES = Rates(
    matmul=1e12, conv=5e11, attention=2e12, bandwidth=1e9, launch=1e-6, wide=0.5, transfer=1e8
)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape or (1024, 16), dtype=dtype, device="meta")


# ---- memory


def test_a_temporary_that_is_dropped_makes_room_for_the_next():
    x = meta()

    def run():
        a = x + 1
        b = a * 2
        del a
        return b + 3

    cost = trace(run)
    assert (cost.peak_bytes, cost.kept_bytes) == (2 * MAP, MAP)


def test_a_local_of_a_caller_counts_while_the_callee_runs():
    x = meta()

    def inner(y):
        return (y + 1).exp()

    def holds():
        a = x + 1
        return inner(a) + a

    def hands_over():
        return inner(x + 1)

    assert trace(holds).peak_bytes == 3 * MAP
    assert trace(hands_over).peak_bytes == 3 * MAP  # the arguments of a call live as long as it
    assert trace(lambda: (x + 1).exp().exp()).peak_bytes == 2 * MAP


def test_views_and_work_in_place_cost_nothing():
    x = meta()

    def run():
        a = x + 1
        a.mul_(2).t()[3:].unflatten(1, (-1, 2)).add_(1)
        F.silu(a, inplace=True)
        return a.view(-1)

    cost = trace(run)
    assert (cost.peak_bytes, cost.kept_bytes, cost.launches) == (MAP, MAP, 4)


def test_inputs_and_weights_count_neither_as_memory_nor_when_parts_of_them_are_returned():
    weight, x = meta(8, 16), meta(2, 512, 16)
    assert trace(lambda: torch.ops.aten._unsafe_view(x, [1024, 16])).peak_bytes == 0
    assert trace(lambda: x.add_(1)).peak_bytes == 0
    assert trace(lambda: F.linear(x, weight)).peak_bytes == MAP // 2


def test_a_view_keeps_the_whole_storage_alive():
    x = meta()
    assert trace(lambda: (x + 1)[:1]).kept_bytes == MAP


def test_every_tensor_is_rounded_up_as_the_allocator_does():
    assert trace(lambda: [meta(1), meta(129)]).kept_bytes == 512 + 1024


def test_writing_into_a_tensor_that_is_there_takes_no_memory():
    x, out = meta(), meta()
    cost = trace(lambda: torch.add(x, x, out=out[:]))
    assert (cost.peak_bytes, cost.moved_bytes) == (0, 3 * MAP)


def test_pieces_of_the_same_shape_are_all_counted():
    x = meta(64, 1024, 16)

    def run():
        whole = torch.empty_like(x)
        for index, piece in enumerate(x):
            whole[index] = piece.exp().clamp_(max=1) @ piece.mT.softmax(-1)[:, :16]
        return whole

    pieces = trace(run)
    x = torch.zeros(x.shape)
    assert pieces == trace(run, "cpu")
    assert pieces.works[Work("plain", 0, 2 * MAP, wide=False)] == 4 * 64


def test_a_contiguous_copy_of_a_strip_is_part_of_a_convolution():
    x, weight = meta(1, 8, 64, 16), meta(8, 8, 3, 3)
    strip = 4 * 8 * 32 * 16
    assert trace(lambda: F.conv2d(x[:, :, :32], weight, padding=1)).peak_bytes == 2 * strip
    assert trace(lambda: F.conv2d(x, weight, padding=1)).peak_bytes == 2 * strip


def test_nothing_is_followed_after_the_trace():
    kept = []

    def run():
        kept.append(meta() + 1)
        return kept[0] + 1

    cost = trace(run)
    kept.clear()
    assert cost == trace(run) and cost.kept_bytes == 2 * MAP


def test_an_error_ends_the_trace():
    def fail():
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        trace(fail)
    x, weight = torch.randn(1, 2, 4, 8), torch.randn(3, 8)
    assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
    assert F.linear(x, weight).shape == (1, 2, 4, 3)


def forward(model: nn.Module, device: str, height: int = 24, width: int = 16):
    """A function that runs a denoiser on `device`."""
    with torch.device(device):
        inputs = family_of(model).conditioning(model)
        sample = torch.zeros(1, model.config.in_channels, height, width)
        timestep = torch.zeros(1, dtype=torch.long)
    return lambda: model(sample, timestep=timestep, **inputs, return_dict=False)[0]


def patched(model: nn.Module, **options) -> nn.Module:
    with pytest.warns(UserWarning, match="untrained"):
        return apply_gspn2(model, GSPN2Config(**options))


@pytest.mark.parametrize("family", ["unet", "sdxl", "pixart", "dit"])
@pytest.mark.parametrize("gspn2", [False, True])
def test_a_model_without_data_has_the_peak_of_the_model_in_earnest(family, gspn2):
    model, _ = tiny_denoiser(family)
    if gspn2:
        patched(model)
    size = (16, 16) if family == "dit" else (24, 16)
    real = trace(forward(model, "cpu", *size), "cpu")
    ghost = trace(forward(without_data(model), "meta", *size))
    assert ghost.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)


def test_the_peak_is_what_the_cpu_allocator_hands_out():
    # Work whose CPU kernels take no memory of their own, in sizes that nobody rounds.
    norm, feed_forward, tokens = nn.LayerNorm(64), FeedForward(64), torch.randn(1, 4096, 64)

    def run():
        return (feed_forward(norm(tokens)) + tokens).mT.contiguous()

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    taken, events = [0], seen.profiler.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            taken.append(taken[-1] + event.nbytes())
    cost = trace(run, "cpu")
    assert (cost.peak_bytes, cost.kept_bytes) == (max(taken), taken[-1])
    assert cost.kept_bytes == result.nbytes


def test_a_vae_can_be_traced():
    vae = without_data(tiny_vae())
    latents = meta(1, 4, 16, 16)
    assert trace(lambda: vae.decode(latents, return_dict=False)[0]).kept_bytes == 4 * 3 * 64 * 64


# ---- attention and scans


@pytest.mark.parametrize("by_name", [False, True])
def test_attention_takes_no_matrix_of_all_pairs(by_name):
    query, key = meta(2, 4, 4096, 8), meta(2, 4, 1024, 8)
    names = {"query": query, "key": key, "value": key}

    def run():
        attend = F.scaled_dot_product_attention
        result = attend(**names) if by_name else attend(query, key, key)
        return result.transpose(1, 2).reshape(2, 4096, 32)  # a view of what a fused kernel writes

    cost = trace(run)
    result, row_sums = 4 * query.numel(), 4 * 2 * 4 * 4096
    assert cost.peak_bytes == result + row_sums
    assert cost.works == {Work("attention", 4 * 2 * 4 * 4096 * 1024 * 8, 5 * result // 2, True): 1}


@pytest.mark.parametrize("shape", [(64, 8), (3, 64, 8), (2, 3, 5, 64, 8)])
def test_attention_of_any_number_of_dimensions_has_the_shape_of_the_query(shape):
    query = meta(*shape)
    shapes = []
    trace(lambda: shapes.append(F.scaled_dot_product_attention(query, query, query).shape))
    assert shapes == [query.shape]


@pytest.fixture
def unlaunched(monkeypatch):
    """The very code that runs on CUDA, but for the launch of its kernels."""
    monkeypatch.setattr(launch, "launch", lambda *_: None)
    monkeypatch.setattr(launch, "_readable", lambda lines: lines)  # they have no addresses
    monkeypatch.setattr(launch.Device, "of", lambda _: SCAN_DEVICE)
    launch._plan.cache_clear()
    yield
    launch._plan.cache_clear()


def check_allocations(real, predicted):
    assert predicted.kept_bytes == real.kept_bytes
    slack = 6 * 512  # six tensors, each rounded up, and the counters of the blocks
    assert real.peak_bytes - slack <= predicted.peak_bytes <= real.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height, width, groups", [(5, 9, 1), (64, 48, 4), (3, 5000, 1)])
def test_a_scan_takes_what_the_cuda_path_allocates(unlaunched, dtype, height, width, groups):
    proxy_dim = 8
    layout = TokenLayout(proxy_dim, groups)
    x = meta(1, height * width, proxy_dim, dtype=dtype)
    params = meta(1, height * width, layout.width, dtype=dtype)
    sizes = height, width, groups, 0
    real = trace(lambda: cuda_scan.scan_tokens_now(x, params, *sizes, (0, 0)))
    scan = torch.ops.gspn2_diffusers.torch_scan_tokens
    check_allocations(real, trace(lambda: scan(x, params, *sizes, 0, 0)))


def test_a_scan_of_tokens_packs_them_and_waits_for_its_lines():
    block = GSPN2Block(16, GSPN2Config()).to("meta")
    tokens = meta(1, 40 * 30, 16)
    works = trace(lambda: block(tokens, (40, 30))).works
    assert [work.lines for work in works if work.kind == "scan"] == [40]
    assert sum(work.kind == "pack" for work in works) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "height, width, channels", [(5, 9, 8), (64, 48, 8), (3, 5000, 8), (96, 72, 32)]
)
def test_a_scan_of_lines_takes_what_the_cuda_path_allocates(
    unlaunched, dtype, height, width, channels
):
    layout = LineLayout(channels, 1, True)
    rows = meta(1, height, layout.rows, pad(width, dtype.itemsize), dtype=dtype)
    columns = meta(1, width, layout.rows, pad(height, dtype.itemsize), dtype=dtype)
    sizes = height, width, channels, 1, 0, True, 0, 0
    plan = launch.plan_for(FORWARD, launch.Sizes(1, *sizes), dtype, 0)
    assert plan.variant.ready == (channels == 32)
    real = trace(lambda: cuda_scan.scan_lines_now(rows, columns, *sizes))
    scan = torch.ops.gspn2_diffusers.torch_scan_lines
    check_allocations(real, trace(lambda: scan(rows, columns, *sizes)))


def test_a_fused_block_writes_lines_and_packs_nothing():
    config = GSPN2Config(mean_path=False)
    block = GSPN2Block(16, config).to("meta")
    fuse_block(block)
    tokens = meta(1, 40 * 30, 16)
    works = trace(lambda: block(tokens, (40, 30))).works
    assert [work.lines for work in works if work.kind == "scan"] == [40]
    assert not any(work.kind == "pack" for work in works)


def test_every_patched_layer_of_a_model_counts_as_a_scan():
    unet = patched(tiny_unet(), proxy_dim=8)
    works = trace(forward(without_data(unet), "meta")).works
    scans = sum(count for work, count in works.items() if work.kind == "scan")
    assert scans == len(gspn2_sites(unet)) == 7


def test_a_layer_with_too_few_tokens_for_its_block_counts_as_attention():
    unet = patched(tiny_unet())
    for name in (site.name for site in gspn2_sites(unet)):
        unet.get_submodule(name).gspn2_min_tokens = 10**6
    works = trace(forward(without_data(unet), "meta")).works
    assert not any(work.kind == "scan" for work in works)


# ---- time


def test_an_operator_takes_as_long_as_what_bounds_it():
    assert Work("matmul", 10**12, 10**6).seconds(RATES) == 1
    assert Work("matmul", 10**6, 10**9).seconds(RATES) == 1
    assert Work("conv", 10**12, 0).seconds(RATES) == 2
    assert Work("matmul", 10**12, 0, wide=True).seconds(RATES) == 2
    assert Work("plain", 0, 10).seconds(RATES) == RATES.launch
    assert Work("scan", 0, 10**9).seconds(RATES) == pytest.approx(1 / RATES.scan)
    assert Work("scan", 0, 0, lines=10**6).seconds(RATES) == pytest.approx(10**6 * RATES.line)
    assert Work("transfer", 0, 10**8).seconds(RATES) == 1


def test_products_are_counted_by_kind():
    x, weight = meta(1, 8, 32, 32, dtype=torch.bfloat16), meta(4, 8, 3, 3, dtype=torch.bfloat16)
    matrix = meta(32, 64, dtype=torch.bfloat16)
    cost = trace(lambda: F.conv2d(x, weight, padding=1) @ matrix)
    flops = {work.kind: work.flops for work in cost.works}
    assert flops == {"conv": 2 * 8 * 4 * 9 * 1024, "matmul": 2 * 4 * 32 * 32 * 64}
    assert not any(work.wide for work in cost.works)
    assert cost.flops == sum(flops.values())


def test_the_time_of_a_computation_is_that_of_its_operators_one_after_the_other():
    x = meta()
    cost = trace(lambda: x.exp().exp())
    assert cost.seconds(RATES) == pytest.approx(2 * 2 * MAP / RATES.bandwidth)


def test_a_copy_to_another_device_runs_at_the_rate_of_the_bus():
    x, host = meta(), torch.empty(1024, 16)
    work = next(iter(trace(lambda: x.copy_(host)).works))
    assert (work.kind, work.moved) == ("transfer", MAP)


# ---- cards


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
    ],
)
def test_a_card_is_known_by_its_drivers_name(name, card):
    teraflops, gigabytes = CARDS[card]
    assert card_rates(name) == specified_rates(teraflops * 1e12, gigabytes * 1e9)


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA T400", "AMD Instinct MI300X", ""])
def test_a_card_is_not_taken_for_one_of_a_similar_name(name):
    assert card_rates(name) is None


def test_rates_can_be_measured():
    rates = measure_rates("cpu", scale=32)
    assert all(value > 0 for value in vars(rates).values())
