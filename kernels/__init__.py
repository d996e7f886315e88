"""The GSPN-2 scan operators, on maps, tokens and lines, and the names of their four directions."""

from .ops import gspn2_scan, gspn2_scan_lines, gspn2_scan_tokens, params_width
from .reference import DIRECTIONS

__all__ = ["DIRECTIONS", "gspn2_scan", "gspn2_scan_lines", "gspn2_scan_tokens", "params_width"]
