"""What a GSPN-2 block is made of."""

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class GSPN2Config:
    """Options of a GSPN-2 block; one config serves layers of any width.

    Args:
        proxy_ratio: the scan runs on P = C // proxy_ratio channels, at least 1 (arXiv 2512.07884
            uses 8 for text-to-image).
        proxy_dim: P itself, the same in every layer, in place of proxy_ratio.
        groups: sets of propagation weights per direction, each shared by P / groups channels;
            1 is GSPN-2, None gives every channel its own (GSPN-1). Must divide P.
        chunk_size: lines after which the scan restarts (a local scan); None scans the whole map.
        parameters_from: what logits, lam, u and skip are predicted from: the "proxy" features as
            in the paper, or the "tokens" at full width (closer to attention, P -> C inputs).
        mean_path: add a full-rank map of the mean token, which costs nothing per token and is
            what attention does where its weights are uniform.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """

    proxy_ratio: int = 8
    proxy_dim: int | None = None
    groups: int | None = 1
    chunk_size: int | None = None
    parameters_from: Literal["proxy", "tokens"] = "proxy"
    mean_path: bool = True

    def __post_init__(self) -> None:
        _check_count("proxy_ratio", self.proxy_ratio)
        for name in ("proxy_dim", "groups", "chunk_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.parameters_from not in ("proxy", "tokens"):
            raise ValueError(
                f"parameters_from: expected 'proxy' or 'tokens', got {self.parameters_from!r}"
            )
        if not isinstance(self.mean_path, bool):
            raise TypeError(f"mean_path: expected True or False, got {self.mean_path!r}")

    def proxy_dim_for(self, channels: int) -> int:
        """P for a layer of C = `channels`. Raises ValueError if that does not work out."""
        proxy_dim = self.proxy_dim or max(1, channels // self.proxy_ratio)
        if proxy_dim > channels:
            raise ValueError(
                f"proxy_dim: expected at most the {channels} channels of the layer, got {proxy_dim}"
            )
        if self.groups is not None and proxy_dim % self.groups:
            raise ValueError(
                f"groups: expected a divisor of the proxy dimension {proxy_dim} "
                f"(layer of {channels} channels), got {self.groups}"
            )
        return proxy_dim

    def groups_for(self, channels: int) -> int:
        """Number of weight groups G for a layer of C = `channels`."""
        return self.groups or self.proxy_dim_for(channels)

    def to_dict(self) -> dict:
        """Plain values for JSON; `GSPN2Config(**config.to_dict()) == config`."""
        return asdict(self)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
