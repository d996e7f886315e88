"""How good pictures of the high-resolution pipeline are, on Tiny Scenes, against other ways."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from distillation import load_teacher
from highres_runs import attempt, ignore, stages_of
from PIL import Image, ImageDraw
from torch import Tensor

from gspn2_diffusers import apply_gspn2, softmax_attention
from gspn2_diffusers.conditioning import native_resolution
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.generation import seeded
from gspn2_diffusers.pipelines.highres import HighResPipeline
from gspn2_diffusers.pipelines.planner import Plan, plan_stages
from gspn2_diffusers.tiny_scenes.data import Renderer, to_bytes
from gspn2_diffusers.tiny_scenes.score import Exam, prepare_exam, score

SHEET_CAPTIONS = 2
SHEET_CELLS = (176, 144, 120, 96, 72)
SHEET_BYTES = 400_000


@dataclass(frozen=True)
class Contestant:
    """A way to draw a picture of one size.

    Args:
        name: in tables.
        stages: of the pipeline.
        side: of the picture in pixels; one drawn smaller is enlarged by a Lanczos filter.
        softmax: whether the model's own attention draws all stages, or only the first if
            `softmax_base`.
    """

    name: str
    stages: tuple[Stage, ...]
    side: int
    softmax: bool = False
    softmax_base: bool = True


def contestants_at(args: argparse.Namespace, pipe: HighResPipeline, scale: int) -> list[Contestant]:
    """Who competes at `scale` times the model's own size; at 1 only the model itself."""
    native = native_resolution(pipe.base)
    side = scale * native
    cascade = tuple(stages_of(args, pipe, (side, side)))
    if scale == 1:
        return [Contestant("base", cascade, side)]
    direct = (replace(cascade[0], height=side, width=side),)
    chosen = [
        Contestant("base, Lanczos", cascade[:1], side),
        Contestant("cascade, GSPN-2", cascade, side),
        Contestant("cascade, softmax", cascade, side, softmax=True),
        Contestant("direct, GSPN-2", direct, side, softmax_base=False),
        Contestant("direct, softmax", direct, side, softmax=True),
    ]
    if isinstance(pipe.denoiser, UNet2DConditionModel):
        upper = (
            replace(stage, dilation=max(1, round(stage.height / native)), dilated_steps=1.0)
            for stage in cascade[1:]
        )
        chosen.insert(2, Contestant("cascade, GSPN-2, dilated", (cascade[0], *upper), side))
    return chosen


class Drawn:
    """Pictures that are there already, as `score` would have them from a pipeline.

    Args:
        images: uint8 ``[n, 3, h, w]``, in the order in which they are asked for.
        device: on which they are judged.
    """

    def __init__(self, images: Tensor, device: torch.device):
        self.images, self.device = images, device
        self.taken = 0

    def __call__(self, prompts: Sequence[str], **_: object) -> SimpleNamespace:
        part = self.images[self.taken : self.taken + len(prompts)]
        self.taken += len(prompts)
        return SimpleNamespace(images=part.to(self.device).float() / 255)


class Contest:
    """Has all contestants draw the same captions from the same seeds, and judges them."""

    def __init__(self, args: argparse.Namespace, pipe: HighResPipeline, exam: Exam):
        self.args, self.pipe, self.exam = args, pipe, exam
        self.device = pipe.device
        self.native = native_resolution(pipe.base)
        self._plans: dict[tuple[Contestant, int], Plan] = {}
        self._fine_energies: dict[int, float] = {}

    def measure(self, contestant: Contestant) -> dict:
        """Scores, details and seconds per picture."""
        if self.args.warmup:
            stages = tuple(replace(stage, steps=1) for stage in contestant.stages)
            self.draw(replace(contestant, stages=stages), self.args.batch_size)
        images, seconds = self.draw(contestant)
        found = score(
            Drawn(images, self.device), self.exam, batch_size=self.args.batch_size,
            steps=self.args.steps, guidance_scale=self.args.guidance_scale,
        )  # fmt: skip
        del found["seconds"]  # of handing pictures over
        return {
            "scores": found,
            "detail": self.detail(images),
            "seconds": seconds / len(images),
            "stages": [stage.to_dict() for stage in contestant.stages],
        }

    @torch.no_grad()
    def draw(self, contestant: Contestant, count: int | None = None) -> tuple[Tensor, float]:
        """uint8 ``[n, 3, h, w]`` of the first `count` captions, on the CPU, and seconds."""
        captions = self.exam.captions[:count]
        drawn, seconds = [], 0.0
        for begin in range(0, len(captions), self.args.batch_size):
            images, taken = self._draw_batch(
                contestant, captions[begin : begin + self.args.batch_size], begin
            )
            drawn.append(images)
            seconds += taken
        return torch.cat(drawn), seconds

    def _draw_batch(
        self, contestant: Contestant, captions: Sequence[str], first: int
    ) -> tuple[Tensor, float]:
        args = self.args
        generators = [seeded(self.exam.seed + first + index) for index in range(len(captions))]
        with softmax_attention(self.pipe.base) if contestant.softmax else nullcontext():
            plan = self._plan(contestant, len(captions))
            with torch.autocast(self.device.type, torch.bfloat16, args.dtype == "bfloat16"):
                result = self.pipe(
                    list(captions), stages=contestant.stages, plan=plan, upsample=args.upsample,
                    softmax_base=contestant.softmax_base, generator=generators, output_type="pt",
                    progress=ignore,
                )  # fmt: skip
        images, start = to_bytes(result.images), time.perf_counter()
        if images.shape[-1] != contestant.side:
            images = enlarged(images, contestant.side)
        return images, sum(result.seconds.values()) + time.perf_counter() - start

    def _plan(self, contestant: Contestant, count: int) -> Plan | None:
        """Made once, because planning takes longer than such pictures."""
        if self.device.type != "cuda":
            return None
        if (contestant, count) not in self._plans:
            self._plans[contestant, count] = plan_stages(
                self.pipe.base, contestant.stages, batch=count, upsample=self.args.upsample,
                softmax_base=contestant.softmax_base,
            )  # fmt: skip
        return self._plans[contestant, count]

    def detail(self, images: Tensor) -> float | None:
        """Energy of details that the model's own size cannot hold, as a multiple of what renders
        of the same scenes have; None at that size."""
        side, count = images.shape[-1], min(self.args.detail_renders, len(images))
        if side <= self.native or not count:
            return None
        limit = self.native / side / 2
        if side not in self._fine_energies:
            renderer, scenes = Renderer(side, self.device), self.exam.scenes
            # One by one: at four times the size 8 scenes at once take tens of gigabytes.
            renders = (renderer(scenes[index : index + 1]) for index in range(count))
            self._fine_energies[side] = sum(fine_energy(render, limit) for render in renders)
        pictures = (image[None].to(self.device).float() / 255 for image in images[:count])
        return sum(fine_energy(picture, limit) for picture in pictures) / self._fine_energies[side]

    @cached_property
    def all(self) -> dict[tuple[int, str], Contestant]:
        """All contestants by scale and name."""
        scales = (1, *dict.fromkeys(self.args.scales))
        return {
            (scale, contestant.name): contestant
            for scale in scales
            for contestant in contestants_at(self.args, self.pipe, scale)
        }


def run_quality(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, done: set[tuple]
) -> Iterator[dict]:
    """A row for every scale and contestant that is not done; the sheet at the end."""
    pipe = load_teacher(args.teacher, device)
    apply_gspn2(pipe, args.weights)
    exam = prepare_exam(device, args.scenes, args.seed, probe=args.probe)
    contest = Contest(args, HighResPipeline(pipe), exam)
    for (scale, name), contestant in contest.all.items():
        if ("quality", scale, name) in done:
            continue
        row = {"experiment": "quality", "scale": scale, "size": [contestant.side] * 2}
        row["contestant"] = name
        yield row | attempt(partial(contest.measure, contestant), device)
    if args.sheet is not None:
        write_sheet(contest, args.sheet)


def enlarged(images: Tensor, side: int) -> Tensor:
    """Square pictures uint8 ``[n, 3, h, w]`` by a Lanczos filter."""
    pictures = (
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (side, side), Image.Resampling.LANCZOS
        )
        for image in images
    )
    return torch.stack([torch.tensor(np.asarray(one)).permute(2, 0, 1) for one in pictures])


def fine_energy(images: Tensor, limit: float) -> float:
    """Mean square of what pictures ``[n, 3, h, w]`` have of frequencies above `limit`, in cycles
    per pixel along either axis."""
    # Mirrored, so that opposite edges of a picture do not count as an edge in it.
    mirrored = torch.cat([images, images.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
    waves = torch.fft.fft2(mirrored, norm="ortho").abs().square()
    axes = [torch.fft.fftfreq(side, device=images.device).abs() for side in mirrored.shape[-2:]]
    fine = torch.maximum(axes[0][:, None], axes[1]) > limit
    return (waves[..., fine].sum() / mirrored.numel()).item()


def write_sheet(contest: Contest, path: Path) -> None:
    """A PNG of the first captions: for every scale a column per contestant, and of every picture
    the whole and its middle."""
    base = contest.all[1, "base"]
    bands = []
    for scale in dict.fromkeys(contest.args.scales):
        others = [one for (its, _), one in contest.all.items() if its == scale]
        pictures = {one.name: contest.draw(one, SHEET_CAPTIONS)[0] for one in [base, *others]}
        bands.append((f"{scale}x", pictures))
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell in SHEET_CELLS:
        sheet = _join([_sheet_band(title, pictures, cell) for title, pictures in bands])
        file = io.BytesIO()
        sheet.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= SHEET_BYTES:
            break
    path.write_bytes(file.getvalue())


def _sheet_band(title: str, pictures: dict[str, Tensor], cell: int) -> Image.Image:
    count = min(map(len, pictures.values()))
    band = Image.new("RGB", (cell * len(pictures), 14 + 2 * cell * count), "white")
    text = ImageDraw.Draw(band)
    for column, (name, images) in enumerate(pictures.items()):
        text.text((cell * column + 2, 1), f"{title} {name}"[: cell // 6], fill="black")
        for row, image in enumerate(images[:count]):
            whole = Image.fromarray(image.permute(1, 2, 0).numpy())
            side = whole.width
            middle = whole.crop([side * 3 // 8] * 2 + [side * 5 // 8] * 2)
            for index, part in enumerate((whole, middle)):
                filter = "NEAREST" if part.width < cell else "BOX"
                part = part.resize((cell, cell), Image.Resampling[filter])
                band.paste(part, (cell * column, 14 + cell * (2 * row + index)))
    return band


def _join(bands: Sequence[Image.Image]) -> Image.Image:
    size = (max(band.width for band in bands), sum(band.height for band in bands))
    sheet, top = Image.new("RGB", size, "white"), 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    return sheet
