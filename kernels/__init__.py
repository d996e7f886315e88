"""The GSPN-2 scan operator: :func:`gspn2_scan` and the names of its four directions."""

from .ops import gspn2_scan
from .reference import DIRECTIONS

__all__ = ["DIRECTIONS", "gspn2_scan"]
