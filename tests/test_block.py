import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_models import awaken
from tolerances import assert_close

from gspn2_diffusers import GSPN2Block, GSPN2Config
from gspn2_diffusers.kernels.dense import dense_scan
from gspn2_diffusers.kernels.layout import TokenLayout

CONFIGS = [
    GSPN2Config(),
    GSPN2Config(mean_path=False),
    GSPN2Config(groups=None, parameters_from="tokens", chunk_size=2),
    GSPN2Config(proxy_dim=6, groups=2),
]


def uniform_attention(channels: int, **options) -> Attention:
    """An attention layer whose queries are zero, so that every token gets the mean value."""
    attention = Attention(channels, heads=2, dim_head=channels // 2, **options).double().eval()
    torch.nn.init.zeros_(attention.to_q.weight)
    if attention.to_q.bias is not None:
        torch.nn.init.zeros_(attention.to_q.bias)
    return attention


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.to_dict()}")
def test_forward_is_project_scan_lift_with_a_dense_affinity_for_the_scan(config):
    block = awaken(GSPN2Block(16, config).double())
    height, width, proxy_dim = 3, 5, config.proxy_dim_for(16)
    tokens = torch.randn(2, height * width, 16, dtype=torch.float64)

    x = tokens @ block.down.weight.T
    source = tokens if config.parameters_from == "tokens" else x
    params = source @ block.to_params.weight.T + block.to_params.bias
    groups = config.groups_for(16)
    logits, lam, u, skip = (
        part.flatten(2).mT for part in TokenLayout(proxy_dim, groups).split(params)
    )
    y = dense_scan(
        x.mT.reshape(2, proxy_dim, height, width),
        logits.reshape(2, 4, groups, 3, height, width),
        *(gate.reshape(2, 4, proxy_dim, height, width) for gate in (lam, u, skip)),
        chunk_size=config.chunk_size,
    )
    expected = y.flatten(2).mT @ block.up.weight.T + block.up.bias
    if config.mean_path:
        expected = expected + tokens.mean(1, keepdim=True) @ block.mean.weight.T
    assert_close(block(tokens, (height, width)), expected)


def test_lam_is_scaled_by_native_lines_over_lines_of_its_direction():
    block = awaken(GSPN2Block(16, GSPN2Config(), native_grid=(6, 5)).double())
    plain = awaken(GSPN2Block(16, GSPN2Config()).double())
    plain.load_state_dict(block.state_dict())
    tokens = torch.randn(2, 30, 16, dtype=torch.float64)
    assert_close(block(tokens, (6, 5)), plain(tokens, (6, 5)))
    for weight in (plain.to_params.weight.T, plain.to_params.bias):
        _, lam, _, _ = plain.layout.split(weight.data)
        lam[..., :2, :] *= 2  # 3 rows where 6 are native
        lam[..., 2:, :] /= 2  # 10 columns where 5 are native
    assert_close(block(tokens, (3, 10)), plain(tokens, (3, 10)))


def test_a_picture_at_twice_its_size_keeps_its_features_only_with_a_native_grid():
    config = GSPN2Config(mean_path=False)
    scaled = awaken(GSPN2Block(16, config, native_grid=(8, 8)))
    plain = awaken(GSPN2Block(16, config))
    plain.load_state_dict(scaled.state_dict())
    angle = torch.linspace(0, 3, 8)
    small = torch.sin(angle[:, None] + angle + torch.arange(16.0)[:, None, None])[None]
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")

    def features(block, picture):
        size = picture.shape[-2:]
        tokens = block(picture.flatten(2).mT, tuple(size))
        return torch.nn.functional.avg_pool2d(tokens.mT.unflatten(2, size), size[0] // 8)

    with torch.no_grad():
        expected = features(plain, small)
        errors = [
            ((features(block, large) - expected).square().mean() / expected.var()).item()
            for block in (scaled, plain)
        ]
    assert errors[0] < 0.05 < 0.3 < errors[1]


def test_local_scans_add_up_the_same_lines_at_every_size():
    config = GSPN2Config(chunk_size=2)
    block = awaken(GSPN2Block(16, config, native_grid=(4, 4)))
    plain = awaken(GSPN2Block(16, config))
    plain.load_state_dict(block.state_dict())
    tokens = torch.randn(1, 64, 16)
    assert torch.equal(block(tokens, (8, 8)), plain(tokens, (8, 8)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_fresh_block_equals_the_layer_it_inherits_from_under_uniform_attention(bias):
    attention = uniform_attention(16, bias=bias)
    block = GSPN2Block(16, GSPN2Config()).double()
    block.inherit(attention)
    tokens = torch.randn(2, 12, 16, dtype=torch.float64)
    assert_close(block(tokens, (3, 4)), attention(tokens), torch.float32)


def test_inherits_the_best_low_rank_value_path():
    attention = uniform_attention(16)
    block = GSPN2Block(16, GSPN2Config(proxy_dim=4)).double()
    block.inherit(attention)
    value_path = attention.to_out[0].weight @ attention.to_v.weight
    missing = torch.linalg.svdvals(value_path)[4:].square().sum().sqrt()
    distance = torch.linalg.norm(value_path - block.up.weight @ block.down.weight)
    torch.testing.assert_close(distance, missing, rtol=1e-4, atol=0)


def test_a_fresh_block_without_mean_path_adds_only_the_inherited_bias():
    attention = uniform_attention(16)
    block = GSPN2Block(16, GSPN2Config(mean_path=False)).double()
    block.inherit(attention)
    tokens = torch.randn(2, 12, 16, dtype=torch.float64)
    assert_close(block(tokens, (3, 4)), attention.to_out[0].bias.expand(2, 12, 16), torch.float32)


def test_every_parameter_gets_a_gradient_after_the_first_step():
    block = awaken(GSPN2Block(16, GSPN2Config()))
    block(torch.randn(2, 12, 16), (3, 4)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.to_dict()}")
def test_rows_of_the_projection_that_nobody_reads_stay_zero_in_training(config):
    block = GSPN2Block(16, config)
    columns = block.layout.split(torch.arange(block.layout.width))
    read = torch.zeros(block.layout.width, dtype=torch.bool)
    read[torch.cat([part.flatten() for part in columns])] = True
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
    for _ in range(2):
        block(torch.randn(2, 12, 16), (3, 4)).square().sum().backward()
        optimizer.step()
    for parameter in block.to_params.parameters():
        assert not parameter[~read].any() and parameter[read].any()


def test_a_fresh_block_has_open_input_gates_and_no_output():
    block = GSPN2Block(16, GSPN2Config(groups=2))
    logits, lam, u, skip = block.layout.split(block.to_params.bias)
    assert (lam == 1).all() and not torch.cat([logits.flatten(), u.flatten(), skip.flatten()]).any()
    logits, lam, u, skip = block.layout.split(block.to_params.weight.T)
    assert logits.std() > 0 and lam.std() > 0 and not u.any() and not skip.any()


def test_a_fresh_block_can_leave_its_starting_point():
    block = GSPN2Block(16, GSPN2Config(mean_path=False))
    block(torch.randn(2, 12, 16), (3, 4)).sum().backward()
    assert block.to_params.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("grid", [(1, 12), (12, 1), (3, 4), (4, 3)])
def test_the_grid_matters_and_any_shape_runs(grid):
    block = awaken(GSPN2Block(8, GSPN2Config(proxy_dim=4)))
    tokens = torch.randn(3, 12, 8)
    assert block(tokens, grid).shape == tokens.shape
    other = (2, 6)
    assert not torch.allclose(block(tokens, grid), block(tokens, other))


def test_a_backend_that_cannot_run_is_refused_not_replaced():
    block = GSPN2Block(8, GSPN2Config())
    block.backend = "cuda"
    with pytest.raises(RuntimeError, match="backend='cuda': expected tensors on a CUDA device"):
        block(torch.randn(1, 12, 8), (3, 4))


def test_a_grid_that_does_not_match_the_tokens_is_refused():
    block = GSPN2Block(8, GSPN2Config())
    with pytest.raises(ValueError, match="expected 12 tokens for a grid of 3 x 4, got 13"):
        block(torch.randn(1, 13, 8), (3, 4))


def test_a_missing_grid_is_refused_and_says_where_it_comes_from():
    with pytest.raises(ValueError, match="got none: run the layer inside its model"):
        GSPN2Block(8, GSPN2Config())(torch.randn(1, 16, 8))
