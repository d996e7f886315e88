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
TEACHER_NAMES = {"unet": "UNet", "pixart": "PixArt"}
LINE_COLORS = ("#1f6fb2", "#c0392b", "#d68910", "#7f8c8d")
MORE_COLORS = ("#1f6fb2", "#d68910", "#1e8449", "#7d3c98", "#7f8c8d", "#0b3c66", "#b7950b")
RATIOS = (2, 4, 8, 16, 32)
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
    rows = [row for row in results["rows"] if row["channels"] == channels]
    on_device = all(row.get("graph_ms") for row in rows)
    series = {}
    for row in rows:
        ms = row["graph_ms"] if on_device else row["ms"]
        series.setdefault(row["layer"], []).append((row["tokens"], ms))
    _lines(axes, series)
    how = "from a CUDA graph" if on_device else "eager"
    _label(axes, f"One self-attention layer, {channels} channels, batch 1, {how}", results)
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
        frameon=False, fontsize=8, ncols=len(passes), loc="upper left", bbox_to_anchor=(0, 0.92)
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
    "layer-cuda": layer_figure,
    "scan-cuda": scan_figure,
    "ladder-cuda": ladder_figure,
}


def ratio_figure(figure, found: list[dict]) -> None:
    """Error, accuracy and time of a layer against the channels for each proxy channel."""
    panels = {
        "output error": lambda row: row["output_error"],
        "attributes right, %": _right,
        "ms of one layer": lambda row: row["layer_ms"],
    }
    measured = {
        name: value
        for name, value in panels.items()
        if any(value(row) is not None for results in found for row in results["rows"])
    }
    axes = figure.subplots(1, len(measured))
    for place, (name, value) in zip(axes, measured.items(), strict=True):
        shown = found[:1] if name.startswith("ms") else found  # the same layer for all teachers
        for color, results in zip(LINE_COLORS, shown, strict=False):
            rows = [row for row in results["rows"] if row["run"].startswith("C/P")]
            points = [(row["settings"]["block"]["proxy_ratio"], value(row)) for row in rows]
            points = sorted(point for point in points if point[1] is not None)
            if points:
                label = TEACHER_NAMES.get(results["teacher"], results["teacher"])
                _curve(place, points, color, label)
        place.set_xscale("log", base=2)
        place.set_xticks(RATIOS, map(str, RATIOS))
        place.minorticks_off()
        place.set_xlabel("C / P")
        place.set_title(name, loc="left", fontsize=9)
    axes[-1].set_ylim(bottom=0)
    if len(found) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    arguments = found[0]["arguments"]
    layer = f"{arguments['layer_channels']} channels, {arguments['layer_grid']}² tokens"
    _entitle(figure, f"Proxy width: quality, and time of a layer of {layer}", found[0])


def stages_figure(figure, found: list[dict]) -> None:
    """Output error on held-out rows over the seconds of training, a panel for each teacher."""
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for place, results in zip(axes, found, strict=True):
        _courses(place, results, "seconds", "output_error")
        place.set_xlabel("seconds of training")
        place.set_title(TEACHER_NAMES.get(results["teacher"], results["teacher"]),
                        loc="left", fontsize=9)  # fmt: skip
    axes[0].set_ylabel("output error")
    axes[0].legend(frameon=False, fontsize=8)
    _entitle(figure, "Stages of distillation in equal time: error on held-out rows", found[0])


def start_figure(figure, found: list[dict]) -> None:
    """Errors on held-out rows over the steps, a row of panels for each teacher."""
    panels = {"layer_error": "layer error", "output_error": "output error"}
    axes = figure.subplots(len(found), len(panels), squeeze=False)
    for line, results in zip(axes, found, strict=True):
        teacher = TEACHER_NAMES.get(results["teacher"], results["teacher"])
        for place, (name, title) in zip(line, panels.items(), strict=True):
            _courses(place, results, "step", name)
            place.set_title(f"{teacher}: {title}", loc="left", fontsize=9)
            place.set_xlabel("steps")
    axes[0][0].legend(frameon=False, fontsize=8)
    _entitle(figure, "What a block starts from: errors on held-out rows", found[0])


EXPERIMENTS: dict[str, Callable] = {
    "ratio": ratio_figure,
    "stages": stages_figure,
    "start": start_figure,
}


def find_experiments(folder: Path) -> dict[str, list[dict]]:
    """For each of `EXPERIMENTS` the results of ``distillation-*.json``, one for each teacher:
    the newest, with ``teacher`` and only the rows of this experiment that did not fail."""
    found: dict[str, dict[str, dict]] = {name: {} for name in EXPERIMENTS}
    files = [json.loads(path.read_text()) | {"teacher": path.stem.split("-")[1]}
             for path in sorted(folder.glob("distillation-*.json"))]  # fmt: skip
    for results in sorted(files, key=lambda results: results["environment"]["date"]):
        for name, by_teacher in found.items():
            rows = [row for row in results["rows"]
                    if row["experiment"] == name and "error" not in row]  # fmt: skip
            if rows:
                by_teacher[results["teacher"]] = results | {"rows": rows}
    order = list(TEACHER_NAMES)
    return {
        name: sorted(
            by_teacher.values(),
            key=lambda results: (order + [results["teacher"]]).index(results["teacher"]),
        )
        for name, by_teacher in found.items()
        if by_teacher
    }


def highres_time_figure(axes, found: list[dict]) -> None:
    """Seconds from prompt to file against the side of a square picture, with goals, and what the
    model's own attention would take without a cascade."""
    for color, results in zip(MORE_COLORS, found, strict=False):
        rows = [row for row in results["rows"] if row["size"][0] == row["size"][1]]
        points = sorted((row["size"][0], row["seconds"]) for row in rows)
        _curve(axes, points, color, f"cascade, {results['label']}")
        goals = [(row["size"][0], row["goal_seconds"]) for row in rows if row["goal_seconds"]]
        for place in goals:
            axes.plot(*place, color=color, marker="v", markersize=6, fillstyle="none")
    native = {
        row["size"][0]: row["native"]
        for results in found
        for row in results["rows"]
        if row["size"][0] == row["size"][1] and "seconds" in (row["native"] or {})
    }
    if native:
        steps = next(iter(native.values()))["steps"]
        points = sorted((side, times["seconds"]) for side, times in native.items())
        axes.plot(*zip(*points, strict=True), color=COLORS["softmax"], linestyle="--", marker="o",
                  markersize=3, label=f"softmax, one step x {steps}, denoiser alone")  # fmt: skip
    axes.plot([], [], color="#777777", marker="v", fillstyle="none", linestyle="", label="goal")
    places = sorted({row["size"][0] for results in found for row in results["rows"]
                     if row["size"][0] == row["size"][1]})  # fmt: skip
    _logarithmic(axes, places)
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("picture height and width, pixels")
    axes.set_ylabel("seconds")
    _label(axes, "SDXL's layout, random weights: from prompt to file", found[0])


def highres_memory_figure(axes, found: list[dict]) -> None:
    """Predicted against measured peak of every stage and of the VAE, with a band of 15 %."""
    highest = 0.0
    for color, results in zip(MORE_COLORS, found, strict=False):
        points = [
            (phase["peak_gib"], phase["predicted_gib"])
            for row in results["rows"]
            for phase in row["phases"]
            if phase["peak_gib"] and phase["predicted_gib"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4,
                      linestyle="", label=results["label"])  # fmt: skip
            highest = max(highest, *map(max, points))
    ends = [0, 1.05 * highest]
    axes.plot(ends, ends, color="#444444", linewidth=0.8)
    axes.fill_between(ends, [0.85 * end for end in ends], [1.15 * end for end in ends],
                      color="#eeeeee", linewidth=0, label="within 15 %")  # fmt: skip
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("measured peak, GiB")
    axes.set_ylabel("predicted peak, GiB")
    _label(axes, "Memory of every phase: predicted and measured", found[0])


CHANGES = ("channels_last", "fp8", "compile")
HIGHRES: dict[str, Callable] = {
    "highres-time": highres_time_figure,
    "highres-memory": highres_memory_figure,
}


def find_highres(folder: Path) -> list[dict]:
    """The results of ``highres-*.json`` on SDXL's layout, with a ``label`` that says how and on
    which GPU they were taken, and only the rows on speed that did not fail. Those of ways that
    change the picture or the model are left out."""
    found = []
    for path in sorted(folder.glob("highres-*.json")):
        results = json.loads(path.read_text())
        rows = [row for row in results["rows"]
                if row.get("experiment") == "speed" and "error" not in row]  # fmt: skip
        arguments = results["arguments"]
        changed = arguments.get("reuse") != 1 or any(arguments.get(way) for way in CHANGES)
        if rows and arguments["model"] == "sdxl" and not changed:
            found.append(results | {"rows": rows, "label": _how(results)})
    return sorted(found, key=lambda results: not results["label"].startswith("all memory"))


def _how(results: dict) -> str:
    """What sets a run of the high-resolution pipeline apart."""
    arguments, device = results["arguments"], results["environment"]["device"]
    words = ["all memory" if arguments["vram"] is None else f"{arguments['vram']:g} GiB"]
    words += [] if arguments["upsample"] == "pixel" else ["latents enlarged"]
    return ", ".join([*words, device.removeprefix("NVIDIA ").partition(" ")[0]])


def _right(row: dict) -> float | None:
    """Mean accuracy in % at the training resolution."""
    scores = list(row["scores"].values())
    return 100 * scores[0]["mean_accuracy"] if scores else None


def _courses(axes, results: dict, over: str, value: str) -> None:
    """A line per run: `value` of its curve over `over`, on a logarithmic scale."""
    from matplotlib.ticker import LogLocator

    for color, row in zip(LINE_COLORS, results["rows"], strict=False):
        _curve(axes, [(entry[over], entry[value]) for entry in row["curve"]], color, row["run"])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _curve(axes, points: Sequence[tuple[float, float]], color: str, label: str) -> None:
    axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _entitle(figure, title: str, results: dict) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.supxlabel(_note(results), x=0.01, ha="left", fontsize=7.5, color="#777777")


def _shape(row: dict) -> str:
    return f"{row['shape']} / {row['groups']}"


def _lines(axes, series: dict[str, list[tuple[float, float]]]) -> None:
    """A logarithmic line per variant, named at its last point."""
    ends = {name: max(points) for name, points in series.items()}
    places = sorted({x for points in series.values() for x, _ in points})
    shifts = _apart({name: y for name, (x, y) in ends.items() if x == places[-1]})
    for name, points in series.items():
        color, end = COLORS[name], ends[name]
        axes.plot(*zip(*sorted(points), strict=True), color=color, marker="o", markersize=3.5)
        if name in shifts:
            place = {"xytext": (6, shifts[name]), "ha": "left", "va": "center"}
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
    axes.margins(y=0.1)  # room for a name above the highest point
    _logarithmic(axes, places)


def _logarithmic(axes, places: Sequence[int]) -> None:
    """Both axes, with `places` as the marks of the horizontal one."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)


def _apart(heights: dict[str, float]) -> dict[str, float]:
    """Points by which each line's name moves up, so that those of close ends do not meet."""
    clusters: list[list[str]] = []
    for name in sorted(heights, key=heights.get):
        if clusters and heights[name] < 1.25 * heights[clusters[-1][-1]]:
            clusters[-1].append(name)
        else:
            clusters.append([name])
    return {
        name: 10 * (k - (len(cluster) - 1) / 2)
        for cluster in clusters
        for k, name in enumerate(cluster)
    }


def _label(axes, title: str, results: dict) -> None:
    axes.set_title(title, loc="left", fontsize=10, pad=18)
    axes.text(0, 1.02, _note(results), transform=axes.transAxes, fontsize=7.5, color="#777777")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _note(results: dict) -> str:
    environment, arguments = results["environment"], results["arguments"]
    date = environment["date"].split("T")[0]
    return f"{environment['device']}, {arguments['dtype']}, torch {environment['torch']}, {date}"


def draw(name: str, results: dict, folder: Path) -> Path:
    """Draw the figure of one results file into `folder`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    FIGURES[name](figure.add_subplot(), results)
    return _save(figure, folder / f"{name.removesuffix('-cuda')}.png")


def draw_experiment(name: str, found: list[dict], folder: Path) -> Path:
    """Draw the figure of one experiment of distillation into `folder`."""
    from matplotlib.figure import Figure

    height = 2.6 * len(found) + 0.4 if name == "start" else 3.0
    figure = Figure(figsize=(7.2, height), layout="constrained")
    EXPERIMENTS[name](figure, found)
    return _save(figure, folder / f"{name}.png")


def draw_highres(name: str, found: list[dict], folder: Path) -> Path:
    """Draw a figure of the high-resolution pipeline into `folder`."""
    from matplotlib.figure import Figure

    size = (4.8, 4.8) if name == "highres-memory" else (7.2, 4.0)
    figure = Figure(figsize=size, layout="constrained")
    HIGHRES[name](figure.add_subplot(), found)
    return _save(figure, folder / f"{name}.png")


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
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
    experiments = find_experiments(args.results)
    highres = find_highres(args.results)
    if not found and not experiments and not highres:
        others = ["distillation-*.json", "highres-*.json"]
        wanted = ", ".join([f"{name}.json" for name in FIGURES] + others)
        raise ValueError(f"expected one of {wanted} in {args.results}, found none")
    for name in found:
        results = json.loads((args.results / f"{name}.json").read_text())
        print(draw(name, results, args.images))
    for name, of_teachers in experiments.items():
        print(draw_experiment(name, of_teachers, args.images))
    for name in HIGHRES if highres else ():
        print(draw_highres(name, highres, args.images))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
