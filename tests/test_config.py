import pytest

from gspn2_diffusers import GSPN2Config


def test_survives_a_round_trip_through_plain_values():
    config = GSPN2Config(proxy_dim=12, groups=None, chunk_size=4, parameters_from="tokens")
    assert GSPN2Config(**config.to_dict()) == config


@pytest.mark.parametrize(
    "options, channels, proxy_dim, groups",
    [
        ({}, 640, 80, 1),
        ({}, 4, 1, 1),
        ({"proxy_ratio": 4, "groups": 5}, 320, 80, 5),
        ({"proxy_dim": 24, "groups": None}, 320, 24, 24),
    ],
)
def test_proxy_width_and_groups_follow_the_layer(options, channels, proxy_dim, groups):
    config = GSPN2Config(**options)
    assert (config.proxy_dim_for(channels), config.groups_for(channels)) == (proxy_dim, groups)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"proxy_ratio": 0}, ValueError, "proxy_ratio: expected at least 1, got 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size: expected an integer, got 2.5"),
        ({"groups": True}, TypeError, "groups: expected an integer"),
        ({"parameters_from": "x"}, ValueError, "expected 'proxy' or 'tokens', got 'x'"),
        ({"mean_path": 1}, TypeError, "mean_path: expected True or False, got 1"),
    ],
)
def test_bad_options_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        GSPN2Config(**options)


def test_groups_that_do_not_divide_a_layer_are_refused():
    with pytest.raises(ValueError, match="divisor of the proxy dimension 5 .*got 2"):
        GSPN2Config(groups=2).proxy_dim_for(40)


def test_a_proxy_wider_than_the_layer_is_refused():
    with pytest.raises(ValueError, match="at most the 8 channels of the layer, got 9"):
        GSPN2Config(proxy_dim=9).proxy_dim_for(8)
