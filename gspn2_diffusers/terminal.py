"""What the command line prints: progress, tables, warnings and one-line errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from gspn2_diffusers.demo import StageTimes
    from gspn2_diffusers.doctor import Finding
    from gspn2_diffusers.evaluation import EvaluationRow
    from gspn2_diffusers.pipelines.planner import Plan
    from gspn2_diffusers.sites import Site

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_line(text: str) -> None:
    """Print a line as it is: paths stay in one piece, to be copied or piped."""
    print(text, file=sys.stdout)


def print_error(message: str) -> None:
    """Print the first line of a message on stderr, unwrapped."""
    first = next(iter(message.strip().splitlines()), "unknown error")
    stderr.print(f"[bold red]error:[/] {escape(first)}", soft_wrap=True)


def quiet_libraries() -> None:
    """Silence the libraries' own bars and notes; this package's warnings become one line each."""
    import diffusers
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()  # it would print every retry
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", message="(?s).*GSPN-2")
    warnings.showwarning = _print_warning


def _print_warning(message: Warning | str, *_: object) -> None:
    stderr.print(f"[bold yellow]warning:[/] {escape(str(message))}")


@contextmanager
def progress_bar(*, remaining: bool = False) -> Iterator[Progress]:
    """A bar on stderr which is gone when done, and absent where stderr is no terminal.

    It tells the time that has passed and, with `remaining`, what is left.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn(compact=True)) if remaining else ()),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        yield bar


def times_table(times: Mapping[str, StageTimes]) -> Table:
    """Seconds by stage and milliseconds per step, one row per run."""
    table = Table(title="Time of all prompts together, in seconds", title_justify="left")
    table.add_column("")
    for stage in ("load", "text", "steps", "decode", "total", "ms/step"):
        table.add_column(stage, justify="right")
    for name, run in times.items():
        seconds = (run.load, run.text, run.denoise, run.decode, run.total)
        table.add_row(name, *(f"{value:.2f}" for value in seconds), f"{run.step_ms:.0f}")
    return table


def scores_table(scores: Mapping[str, Mapping]) -> Table:
    """Results of the attribute probe, one column per run; shares in percent."""
    first = next(iter(scores.values()))
    title = f"Probe against caption, {first['scenes']} scenes, in percent"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    for attribute in first["accuracy"]:
        row = (f"{100 * run['accuracy'][attribute]:.1f}" for run in scores.values())
        table.add_row(attribute.replace("_", " "), *row)
    table.add_section()
    for key, label in {"mean_accuracy": "mean", "all_right": "all of a scene right"}.items():
        table.add_row(label, *(f"{100 * run[key]:.1f}" for run in scores.values()))
    table.add_row("Fréchet distance", *(f"{run['frechet']:.3g}" for run in scores.values()))
    return table


def evaluation_table(rows: Sequence[EvaluationRow], metrics: Sequence[str]) -> Table:
    """One row per contestant and size, a section per size; "-" is what could not be measured."""
    table = Table(
        title="Teacher and students", title_justify="left", padding=(0, 1, 0, 0), box=None
    )
    table.add_column("size", no_wrap=True)
    table.add_column("attention", overflow="fold")
    columns = [column for metric in metrics for column in _EVALUATION_COLUMNS[metric]]
    for heading in ("s/image", *(heading for heading, _ in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        if index and row.resolution != rows[index - 1].resolution:
            table.add_row()
        height, width = row.size
        cells = (read(row) for _, read in columns)
        table.add_row(f"{width}x{height}", escape(row.name), f"{row.seconds_per_image:.3g}", *cells)
    return table


def evaluation_notes(rows: Sequence[EvaluationRow]) -> list[str]:
    """What the rows note about their metrics, each note once."""
    notes = (f"{metric}: {note}" for row in rows for metric, note in row.notes.items())
    return list(dict.fromkeys(notes))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(name: str) -> Callable[[EvaluationRow], str]:
    return lambda row: f"{100 * row.attributes[name]:.1f}" if row.attributes else "-"


# Metric -> headings of its columns and how to read their cells; together they fit 80 columns.
_EVALUATION_COLUMNS: dict[str, tuple[tuple[str, Callable[[EvaluationRow], str]], ...]] = {
    "kd": (("KD error", lambda row: _number(row.kd and row.kd.total)),),
    "attributes": (
        ("right %", _share("mean_accuracy")),
        ("all %", _share("all_right")),
        ("Fréchet", lambda row: _number(row.attributes and row.attributes["frechet"])),
    ),
    "fid": (("FID", lambda row: _number(row.fid)),),
    "clip": (("CLIP", lambda row: _number(row.clip)),),
}


def seconds_table(title: str, seconds: Mapping[str, float]) -> Table:
    """What each of several things took."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("s", justify="right")
    for part, taken in seconds.items():
        table.add_row(part, f"{taken:.1f}")
    return table


def plan_table(plan: Plan) -> Table:
    """One row per stage, and one for decoding."""
    height, width = plan.height, plan.width
    table = Table(
        title=f"{width}x{height} in {_gib(plan.vram_bytes)} GiB of GPU memory",
        title_justify="left", box=None, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for heading in ("", "size", "steps", "GiB", "s"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    table.add_column("how", overflow="fold")
    for row in plan.rows():
        high, wide = row["size"]
        table.add_row(
            row["what"],
            f"{wide}x{high}",
            "" if row["steps"] is None else str(row["steps"]),
            _gib(row["peak_bytes"]),
            "-" if row["seconds"] is None else f"{row['seconds']:.3g}",
            escape(row["how"]),
        )
    return table


def plan_notes(plan: Plan) -> list[str]:
    """What a plan says of the whole run."""
    time = "" if plan.seconds is None else f", {plan.seconds:.3g} s of computing"
    notes = [f"Peak {_gib(plan.peak_bytes)} GiB, {_gib(plan.weights_bytes)} of them weights{time}."]
    if plan.offload_text:
        notes.append("Text encoders leave the GPU when they have encoded.")
    if plan.offload_denoiser:
        notes.append("The denoiser leaves the GPU while the VAE works.")
    if plan.host_bytes:
        notes.append(f"{_gib(plan.host_bytes)} GiB of pinned CPU memory for skip connections.")
    return notes


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g}"


def sites_table(sites: Sequence[Site]) -> Table:
    """One row per self-attention layer; the names in SDXL fit 80 columns."""
    title = f"{len(sites)} self-attention layers that GSPN-2 can replace"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("name", justify="left", overflow="fold")
    for heading in ("channels", "heads", "grid"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in sites:
        grid = "x".join(map(str, site.grid)) if site.grid else "?"
        table.add_row(site.name, str(site.channels), str(site.heads), grid)
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per finding; a mark tells what is in order and what is not."""
    marks = {True: "[green]ok[/]", False: "[bold red]no[/]", None: ""}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(marks[finding.good], finding.topic, escape(finding.found))
    return table
