"""The command ``gspn2``. Commands import torch when they run, so that ``--help`` does not wait."""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gspn2_diffusers import terminal

# Width of generated file names, in characters of the prompt.
STEM_LENGTH = 40
# Pictures with a longer side are written as TIFF unless a file is named.
LARGEST_PNG = 8192

app = typer.Typer(
    name="gspn2",
    help="GSPN-2 line scans in place of self-attention in diffusers pipelines.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


class BackendName(str, Enum):
    """`gspn2_diffusers.kernels.backends.BACKENDS`, without importing torch."""

    auto = "auto"
    cuda = "cuda"
    torch = "torch"


class UpsampleName(str, Enum):
    """`gspn2_diffusers.pipelines.highres.UPSAMPLING`, without importing torch."""

    pixel = "pixel"
    latent = "latent"


class MetricName(str, Enum):
    """`gspn2_diffusers.evaluation.METRICS`, without importing torch."""

    kd = "kd"
    attributes = "attributes"
    fid = "fid"
    clip = "clip"


Model = Annotated[str, typer.Argument(help="Pipeline: a folder, or a hub id.", show_default=False)]
Weights = Annotated[
    str | None, typer.Option(help="GSPN-2 weights: a folder or a hub id.", show_default=False)
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="May be repeated.", show_default="four of the gallery"),
]
Seed = Annotated[int, typer.Option(help="Prompt number i starts from the noise of seed + i.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu.", show_default="the first there")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16.", show_default="by device"),
]
Backend = Annotated[
    BackendName, typer.Option(help="Of the scan; auto takes cuda where it can run.")
]
Height = Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the model's")]
Width = Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the model's")]


# Of large pictures:
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, or the side of a square.")]
FirstSteps = Annotated[int, typer.Option(min=1, help="Of the first stage.")]
FirstGuidance = Annotated[float, typer.Option(help="Of the first stage.")]
UpperGuidance = Annotated[float, typer.Option(help="Of the others; 1: none, half the time.")]
Upsample = Annotated[UpsampleName, typer.Option(help="Where stages are enlarged.")]
Reuse = Annotated[int, typer.Option(min=1, help="Last stage: steps that share deep features.")]
Vram = Annotated[
    float | None,
    typer.Option(min=0.1, help="GiB of the GPU to use.", show_default="what is free"),
]


def _examples(*commands: str) -> str:
    # An empty line is what the help prints as a line's end.
    return "\n\n".join(["[bold]Examples[/]", *(f"  [cyan]{command}[/]" for command in commands)])


@app.callback(
    epilog=_examples("gspn2 doctor", "gspn2 demo", "gspn2 info owner/model"),
)
def gspn2(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # `main` reads --debug itself, at any place on the line; it is declared here for the help text.
    pass


@app.command(
    epilog=_examples(
        "gspn2 demo",
        "gspn2 demo --steps 50 --seed 7",
        "gspn2 demo --score --scenes 64",
    )
)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("outputs/demo"),
    prompt: Prompts = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    seed: Seed = 0,
    score: Annotated[
        bool, typer.Option("--score", help="Also score both by the attribute probe.")
    ] = False,
    scenes: Annotated[int, typer.Option(min=2, help="Scenes that --score generates.")] = 64,
    large: Annotated[
        bool, typer.Option(help="Also draw one picture at 4 times the training size.")
    ] = True,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: Backend = BackendName.auto,
) -> None:
    """Compare softmax self-attention and GSPN-2 on Tiny Scenes, the pipeline that comes along.

    Writes comparison.png and the single images, and large.png: one picture at
    four times the training size, by the high-resolution pipeline and drawn at
    once. Prints what each stage took. Works offline.
    """
    terminal.quiet_libraries()
    from gspn2_diffusers.demo import run_demo

    with terminal.progress_bar() as bar:
        result = run_demo(
            output,
            prompt or (),
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            device=device,
            dtype=dtype,
            backend=backend.value,
            score_scenes=scenes if score else 0,
            large=large,
            progress=_TaskPerName(bar),
        )
    terminal.stdout.print(terminal.times_table(result.times))
    if score:
        terminal.stdout.print(terminal.scores_table(result.scores))
    if result.large_comparison is not None:
        terminal.stdout.print(terminal.seconds_table("Seconds for large.png", result.large_seconds))
        terminal.print_line(str(result.large_comparison))
    terminal.print_line(str(result.comparison))


@app.command(
    epilog=_examples(
        "gspn2 generate ./my-pipeline -p 'a red cube'",
        "gspn2 generate owner/model --weights ./my-gspn2 -p 'a lake' -p 'a hill'",
        "gspn2 generate owner/model -p 'a lake' --height 832 --width 1216",
    )
)
def generate(
    model: Model,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="May be repeated.", show_default=False)
    ],
    weights: Weights = None,
    height: Height = None,
    width: Width = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps.", show_default="the pipeline's"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance.", show_default="the pipeline's"),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = BackendName.auto,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("outputs"),
) -> None:
    """Generate images with any pipeline, by GSPN-2 if weights are given.

    Prints the paths of the images.
    """
    terminal.quiet_libraries()
    from gspn2_diffusers.pipelines import generate_images, load_pipeline

    pipe = load_pipeline(
        model, weights=weights, dtype=dtype, device=device, backend=backend.value, fuse=True
    )
    pipe.set_progress_bar_config(disable=True)
    with terminal.progress_bar() as bar:
        task = bar.add_task("generating", total=None)
        images = generate_images(
            pipe,
            prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    output.mkdir(parents=True, exist_ok=True)
    for index, (image, text) in enumerate(zip(images, prompt, strict=True)):
        path = output / _file_name(index, text)
        image.save(path)
        terminal.print_line(str(path))


@app.command(
    epilog=_examples(
        "gspn2 evaluate ./my-pipeline --weights ./a --weights ./b -p 'a lake'",
        "gspn2 evaluate owner/model --prompts captions.txt --resolution 1024",
        "gspn2 evaluate ./my-pipeline -p 'a hill' --metric kd --metric clip",
    )
)
def evaluate(
    model: Model,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="GSPN-2 weights: a folder or a hub id. May be repeated.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="May be repeated.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of further prompts, one per line.", show_default=False),
    ] = None,
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Side of square images in pixels. May be repeated.",
            show_default="the model's",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    metric: Annotated[
        list[MetricName] | None,
        typer.Option(help="May be repeated.", show_default="kd; for Tiny Scenes attributes, too"),
    ] = None,
    scenes: Annotated[int, typer.Option(min=2, help="Tiny Scenes that attributes draws.")] = 64,
    real_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images that FID compares with.", show_default="the teacher's images"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = BackendName.auto,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path(
        "outputs/evaluation"
    ),
) -> None:
    """Measure a pipeline with softmax attention, the teacher, and with GSPN-2 weights.

    Prints a table; writes results.json and one sheet of images per size.
    """
    texts = _read_prompts(prompt, prompts)
    terminal.quiet_libraries()
    sidecars = _name_sidecars(weights or [])
    from gspn2_diffusers import evaluation
    from gspn2_diffusers.pipelines import load_pipeline

    pipe = load_pipeline(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    metrics = [name.value for name in metric or ()] or evaluation.default_metrics(pipe)
    settings = {
        "prompts": texts,
        "resolutions": resolution or [None],
        "steps": steps,
        "guidance_scale": guidance_scale,
        "metrics": list(dict.fromkeys(metrics)),
        "scenes": scenes,
        "real_images": real_images,
        "batch_size": batch_size,
        "seed": seed,
        "backend": backend.value,
    }
    with terminal.progress_bar() as bar:
        rows = evaluation.evaluate(
            pipe, sidecars, **settings, output=output, progress=_TaskPerName(bar)
        )
    terminal.stdout.print(terminal.evaluation_table(rows, settings["metrics"]))
    for note in terminal.evaluation_notes(rows):
        terminal.stdout.print(note, markup=False)
    settings |= {"model": model, "weights": sidecars, "dtype": str(pipe.dtype)}
    path = evaluation.write_results(output / "results.json", rows, pipe.device, settings)
    for size in settings["resolutions"]:
        terminal.print_line(str(evaluation.sheet_path(output, size)))
    terminal.print_line(str(path))


@app.command(
    epilog=_examples(
        "gspn2 info ./my-pipeline",
        "gspn2 info owner/model --height 832 --width 1216",
    )
)
def info(model: Model, height: Height = None, width: Width = None) -> None:
    """List the self-attention layers that GSPN-2 can replace, with their grids.

    Reads the model's configuration only: no weights are loaded.
    """
    terminal.quiet_libraries()
    from gspn2_diffusers.pipelines.outline import outline_sites

    terminal.stdout.print(terminal.sites_table(outline_sites(model, height=height, width=width)))


@app.command(epilog=_examples("gspn2 doctor"))
def doctor() -> None:
    """Say what was found on this machine, what will be used, and why.

    Ends with exit code 1 if something is missing.
    """
    terminal.quiet_libraries()
    from gspn2_diffusers.doctor import examine

    findings = examine()
    terminal.stdout.print(terminal.findings_table(findings))
    if any(finding.good is False for finding in findings):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "gspn2 highres 'a large red spotted ball by a lake' --size 1024x1024",
        "gspn2 highres 'a lake' --model ./my-pipeline --weights ./my-gspn2 --size 4096",
        "gspn2 highres 'a ridge' --model owner/model --weights owner/gspn2 "
        "--size 16384x4096 -o ridge.tif",
    )
)
def highres(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    size: Size = "1024x1024",
    model: Annotated[
        str | None,
        typer.Option(help="Pipeline: a folder, or a hub id.", show_default="Tiny Scenes"),
    ] = None,
    weights: Weights = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=".png, .jpg, .webp or .tif.", show_default="in outputs/"
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture to start from, of its shape.", show_default=False),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to lead away from.", show_default=False)
    ] = None,
    steps: FirstSteps = 30,
    guidance_scale: FirstGuidance = 5.0,
    upper_guidance_scale: UpperGuidance = 1.0,
    dilated_steps: Annotated[
        float, typer.Option(min=0, max=1, help="Part of the others with dilated convolutions.")
    ] = 0.0,
    upsample: Upsample = UpsampleName.pixel,
    reuse: Reuse = 1,
    vram: Vram = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = BackendName.auto,
) -> None:
    """Generate a picture of any size, stage by stage.

    Latents of finished stages are kept beside the output until it is written;
    the same command goes on from them. Prints the path of the picture.
    """
    width, height = _read_size(size)
    terminal.quiet_libraries()
    import shutil

    import torch
    from PIL import Image

    from gspn2_diffusers.hardware import prefer_growing_memory
    from gspn2_diffusers.pipelines import HighResPipeline, load_pipeline
    from gspn2_diffusers.shipped import shipped_folder

    prefer_growing_memory()
    if model is None:
        model, weights = str(shipped_folder("pipeline")), weights or str(shipped_folder("gspn2"))
    path = output or Path("outputs") / _large_file_name(prompt, height, width)
    start = None if image is None else Image.open(image)
    pipe = load_pipeline(
        model, weights=weights, dtype=dtype, device=device, backend=backend.value, fuse=True
    )
    kept = path.with_name(path.name + ".stages")
    with terminal.progress_bar(remaining=True) as bar:
        result = HighResPipeline(pipe)(
            prompt,
            height,
            width,
            negative_prompt=negative_prompt,
            image=start,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            upper_guidance_scale=upper_guidance_scale,
            dilated_steps=dilated_steps,
            upsample=upsample.value,
            generator=torch.Generator().manual_seed(seed),
            vram=None if vram is None else int(vram * 2**30),
            reuse=reuse,
            keep=kept,
            resume=True,
            output=path,
            metadata={"seed": str(seed), "model": model, "weights": weights or "none"},
            progress=_TaskPerName(bar),
        )
    shutil.rmtree(kept)
    terminal.stdout.print(
        terminal.seconds_table("Time", {**result.seconds, "total": sum(result.seconds.values())})
    )
    terminal.print_line(str(result.path))


@app.command(
    epilog=_examples(
        "gspn2 plan ./my-pipeline --size 16384x16384 --vram 24",
        "gspn2 plan owner/model --weights ./my-gspn2 --size 8192 --card 'RTX 4090'",
    )
)
def plan(
    model: Model,
    size: Size,
    weights: Weights = None,
    vram: Vram = None,
    card: Annotated[
        str | None,
        typer.Option(help="GPU whose speed is taken.", show_default="the one here"),
    ] = None,
    steps: FirstSteps = 30,
    guidance_scale: FirstGuidance = 5.0,
    upper_guidance_scale: UpperGuidance = 1.0,
    upsample: Upsample = UpsampleName.pixel,
    reuse: Reuse = 1,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
) -> None:
    """Say how `gspn2 highres` would fit a picture into a GPU, and its time there.

    Reads configurations only: neither weights nor a GPU are needed.
    """
    width, height = _read_size(size)
    terminal.quiet_libraries()
    from gspn2_diffusers.pipelines.outlook import look_ahead

    found = look_ahead(
        model,
        height,
        width,
        weights=weights,
        vram=None if vram is None else int(vram * 2**30),
        card=card,
        steps=steps,
        guidance_scale=guidance_scale,
        upper_guidance_scale=upper_guidance_scale,
        upsample=upsample.value,
        reuse=reuse,
        dtype=dtype,
    )
    terminal.stdout.print(terminal.plan_table(found))
    for line in terminal.plan_notes(found):
        terminal.stdout.print(line, markup=False)


class _TaskPerName:
    """Turns calls (name, done, total) into one bar per name."""

    def __init__(self, bar) -> None:
        self.bar = bar
        self.tasks: dict[str, int] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total)
        self.bar.update(self.tasks[name], completed=done)


def _read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    prompts = list(given or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts: expected a text file, got {file}: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("expected at least one prompt by --prompt or --prompts, got none")
    return prompts


def _name_sidecars(weights: list[str]) -> dict[str, str]:
    """Weights by the last part of their path, or by all of it where these are alike."""
    if len(set(weights)) != len(weights):
        raise ValueError("--weights: expected different weights, got the same ones twice")
    from gspn2_diffusers.evaluation import name_weights

    return name_weights(weights)


def _file_name(index: int, prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{index:02d}-{words[:STEM_LENGTH].rstrip('-')}.png"


def _large_file_name(prompt: str, height: int, width: int) -> str:
    stem = _file_name(0, prompt).removeprefix("00-").removesuffix(".png") or "picture"
    return f"{stem}-{width}x{height}{'.png' if max(height, width) <= LARGEST_PNG else '.tif'}"


def _read_size(text: str) -> tuple[int, int]:
    """(width, height) of ``4096`` or ``16384x4096``."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--size: expected WIDTHxHEIGHT or one side, in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; an error is one line on stderr, or with ``--debug`` a traceback.

    Returns:
        Exit code: 0, 1 for a failure, 2 for a mistake in what was asked, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        return app(arguments, prog_name="gspn2", standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        terminal.print_error("interrupted")
        return 130
    except Exception as error:
        if debug:
            raise
        # Errors in the arguments themselves; their class is typer's or click's, by version.
        if hasattr(error, "format_message"):
            terminal.print_error(error.format_message())
            return 2
        terminal.print_error(str(error) or type(error).__name__)
        return 2 if isinstance(error, ValueError) else 1
