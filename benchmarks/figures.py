"""Draw the figures of docs and README from the JSON files in results/.

python benchmarks/figures.py                    every figure whose results are there
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from report import RESULTS

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLORS = {
    "softmax": "#c0392b",
    "gspn2": "#1f6fb2",
    "gspn2, fused": "#0b3c66",
    "removed": "#7f8c8d",
    "linear attention": "#d68910",
    "one linear map": "#7f8c8d",
}
NAMES = {
    "softmax": "softmax attention",
    "gspn2": "GSPN-2",
    "gspn2, fused": "GSPN-2, fused",
    "removed": "no self-attention",
}
PASS_COLORS = {"forward": "#1f6fb2", "backward": "#7fb3d5", "backward-stored": "#c5dcec"}
PASS_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "backward-stored": "backward, h kept",
}


def unet_figure(axes, results: dict) -> None:
    """Time of a forward pass against the side of the image."""
    series = {}
    for row in results["rows"]:
        seconds = row["ms"] / 1000
        series.setdefault(row["variant"], []).append((max(row["image"]), seconds))
    _lines(axes, series)
    model, mode = results["arguments"]["model"], results["arguments"].get("compile")
    name = {"sdxl": "SDXL UNet", "tiny": "Tiny Scenes UNet"}[model]
    batch = "/".join(map(str, results["arguments"]["batch_sizes"]))
    title = f"{name}, one forward pass, batch {batch}, {'compiled' if mode else 'eager'}"
    _label(axes, title, results)
    axes.set_xlabel("image height and width, pixels")
    axes.set_ylabel("seconds")


def layer_figure(axes, results: dict) -> None:
    """Time of one layer against its tokens, for the narrowest width that was measured."""
    channels = min(row["channels"] for row in results["rows"])
    series = {}
    for row in results["rows"]:
        if row["channels"] == channels:
            series.setdefault(row["layer"], []).append((row["tokens"], row["ms"]))
    _lines(axes, series)
    _label(axes, f"One self-attention layer, {channels} channels, batch 1, eager", results)
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")


def scan_figure(axes, results: dict) -> None:
    """Share of the copy bandwidth that each shape reaches over its byte floor."""
    rows = [row for row in results["rows"] if row["skip"]] or results["rows"]
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    passes = [name for name in PASS_NAMES if any(row["pass"] == name for row in rows)]
    for k, name in enumerate(passes):
        chosen = [row for row in rows if row["pass"] == name]
        places = [shapes.index(_shape(row)) + (k - (len(passes) - 1) / 2) * 0.27 for row in chosen]
        heights = [100 * row["floor_of_copy"] for row in chosen]
        color = PASS_COLORS[name]
        bars = axes.bar(places, heights, width=0.25, color=color, label=PASS_NAMES[name])
        axes.bar_label(bars, [f"{height:.0f}" for height in heights], padding=1, fontsize=7)
    axes.axhline(100, color="#444444", linewidth=0.8, linestyle="--")
    axes.text(len(shapes) - 0.5, 98, "a copy", ha="right", va="top", fontsize=8, color="#444444")
    axes.set_xticks(range(len(shapes)), shapes, rotation=25, ha="right", fontsize=8)
    axes.legend(
        frameon=False, fontsize=8, ncols=len(passes), loc="lower right", bbox_to_anchor=(1, 1)
    )
    axes.set_ylim(0, 108)
    copy = results["copy_gb_per_s"]
    axes.set_ylabel(f"% of copy bandwidth ({copy:.0f} GB/s)")
    axes.set_xlabel("images x channels x area / weight groups")
    _label(axes, "Four-direction scan: bytes that must move, per second", results)


def ladder_figure(axes, results: dict) -> None:
    """Time of each step of the ladder, at the first shape."""
    shape = results["rows"][0]["shape"]
    rows = [row for row in results["rows"] if row["shape"] == shape][::-1]
    times = [row["ms"] for row in rows]
    colors = ["#1f6fb2" if "package" in row["step"] else "#b3b9be" for row in rows]
    bars = axes.barh([row["step"] for row in rows], times, color=colors)
    axes.bar_label(bars, [f"{ms:.2f}" for ms in times], padding=3, fontsize=8)
    axes.margins(x=0.08)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("milliseconds per direction")
    _label(axes, f"From a launch per line to one fused launch, {shape}", results)


FIGURES: dict[str, Callable] = {
    "unet-sdxl-cuda": unet_figure,
    "unet-sdxl-compiled-cuda": unet_figure,
    "layer-cuda": layer_figure,
    "scan-cuda": scan_figure,
    "ladder-cuda": ladder_figure,
}


def _shape(row: dict) -> str:
    return f"{row['shape']} / {row['groups']}"


def _lines(axes, series: dict[str, list[tuple[float, float]]]) -> None:
    """A logarithmic line per variant, named at its last point."""
    from matplotlib.ticker import LogLocator

    ends = {name: max(points) for name, points in series.items()}
    places = sorted({x for points in series.values() for x, _ in points})
    for name, points in series.items():
        color, end = COLORS[name], ends[name]
        axes.plot(*zip(*sorted(points), strict=True), color=color, marker="o", markersize=3.5)
        if end[0] == places[-1]:
            others = [other for other in ends.values() if other != end]
            place = {"xytext": (6, 0), "ha": "left", "va": _beside(end, others)}
        else:  # right of the point there are other lines
            place = {"xytext": (0, 6), "ha": "center", "va": "bottom"}
        axes.annotate(
            NAMES.get(name, name),
            end,
            textcoords="offset points",
            color=color,
            fontsize=8,
            annotation_clip=False,
            **place,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(y=0.1)  # room for a name above the highest point
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)


def _beside(end: tuple[float, float], others: Sequence[tuple[float, float]]) -> str:
    """Vertical alignment of a line's name: off the middle where another line ends close by."""
    close = [y for x, y in others if x == end[0] and 0.8 < y / end[1] < 1.25]
    if not close:
        return "center"
    return "bottom" if end[1] > min(close) else "top"


def _label(axes, title: str, results: dict) -> None:
    environment, arguments = results["environment"], results["arguments"]
    date = environment["date"].split("T")[0]
    axes.set_title(title, loc="left", fontsize=10, pad=18)
    note = f"{environment['device']}, {arguments['dtype']}, torch {environment['torch']}, {date}"
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=7.5, color="#777777")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def draw(name: str, results: dict, folder: Path) -> Path:
    """Draw the figure of one results file into `folder`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    FIGURES[name](figure.add_subplot(), results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.removesuffix('-cuda')}.png"
    figure.savefig(path, dpi=150)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what there are results for, and name the files.

    Raises:
        ValueError: there are no results to draw, or no matplotlib.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401  here, so that its absence is one clear line
    except ImportError as error:
        raise ValueError("expected matplotlib: pip install matplotlib") from error
    found = [name for name in FIGURES if (args.results / f"{name}.json").is_file()]
    if not found:
        wanted = ", ".join(f"{name}.json" for name in FIGURES)
        raise ValueError(f"expected one of {wanted} in {args.results}, found none")
    for name in found:
        results = json.loads((args.results / f"{name}.json").read_text())
        print(draw(name, results, args.images))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
