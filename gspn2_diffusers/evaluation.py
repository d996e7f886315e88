"""A pipeline with softmax attention and with any number of GSPN-2 weights, measured alike.

Four metrics, each of which can be left out: how far a student's answers are from the teacher's
along the teacher's own trajectory (``kd``), what the attribute probe of Tiny Scenes finds in the
pictures (``attributes``), and FID and CLIP score by torchmetrics (``fid``, ``clip``).
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from gspn2_diffusers.pipelines.generation import literal_options, seeded

from .adapter import GSPN2Adapter
from .comparison import draw_comparison
from .doctor import CUPY_DISTRIBUTIONS, LIBRARIES
from .families import find_denoiser
from .hardware import device_name, execution_device, synchronize
from .image_metrics import ClipJudge, FidJudge, Judge, to_bytes
from .kernels.backends import check_backend, resolve_backend
from .patch import apply_gspn2, remove_gspn2
from .shipped import is_shipped, shipped_folder
from .sites import is_patched, walk_sites
from .trajectory import KDError, KDMeter, record_calls

if TYPE_CHECKING:
    from gspn2_diffusers.tiny_scenes.score import Exam

METRICS = ("kd", "attributes", "fid", "clip")
TEACHER = "softmax attention"
SHEET_PROMPTS = 8
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

Progress = Callable[[str, int, int], None]
Sidecar = str | os.PathLike | GSPN2Adapter | None


@dataclass(frozen=True)
class EvaluationRow:
    """What was measured of one contestant at one resolution; None: not asked for, or not to be had.

    Args:
        name: `TEACHER`, or the sidecar's.
        resolution: as it was asked for, None for the pipeline's own.
        size: height and width of the pictures, in pixels.
        seconds_per_image: of generation in batches, after an untimed start.
        attributes: what `tiny_scenes.score.score` returns.
        clip: mean CLIP score of picture and prompt, at most 100.
        notes: metric -> one line on why it is missing or what it compares.
    """

    name: str
    resolution: int | None
    size: tuple[int, int]
    seconds_per_image: float
    kd: KDError | None = None
    attributes: dict | None = None
    fid: float | None = None
    clip: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Settings:
    """How every picture of an evaluation is drawn."""

    prompts: list[str]
    steps: int
    guidance_scale: float
    batch_size: int
    seed: int
    backend: str
    progress: Progress

    def batches(self) -> Iterator[tuple[int, list[str]]]:
        """Number of the first prompt, and the prompts, of each batch."""
        for begin in range(0, len(self.prompts), self.batch_size):
            yield begin, self.prompts[begin : begin + self.batch_size]


def evaluate(
    pipe: DiffusionPipeline,
    sidecars: Mapping[str, Sidecar],
    *,
    prompts: Sequence[str],
    resolutions: Sequence[int | None] = (None,),
    steps: int = 25,
    guidance_scale: float = 4.0,
    batch_size: int = 4,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    scenes: int = 64,
    real_images: str | os.PathLike | None = None,
    backend: str = "auto",
    output: str | os.PathLike | None = None,
    fid: object | None = None,
    clip: object | None = None,
    progress: Progress | None = None,
) -> list[EvaluationRow]:
    """Measure the pipeline with softmax attention, the teacher, and with each sidecar.

    The pipeline is left as it was found, patched or not, also after an error.

    Args:
        sidecars: name -> GSPN-2 weights: a folder, a hub id, an adapter (which is copied), or None
            for the pipeline as it was found.
        prompts: prompt i starts from noise of seed + i, for every contestant.
        resolutions: sides of square pictures in pixels; None is the pipeline's own size.
        metrics: some of `METRICS`; None takes `default_metrics`.
        scenes: held-out Tiny Scenes that ``attributes`` draws, at least 2.
        real_images: folder of pictures to which FID is measured; None takes the teacher's.
        backend: of the GSPN-2 scan, see `apply_gspn2`.
        output: folder for a sheet per resolution of the first prompts by all contestants.
        fid, clip: metrics of torchmetrics, or with their interface, in place of those that
            `load_fid` and `load_clip` return.
        progress: called with (what is running, done, expected), in pictures.

    Returns:
        A row per resolution and contestant, the teacher first. FID and CLIP score are None, with
        the reason in `notes`, where they cannot be measured.

    Raises:
        ValueError: an argument out of range, a pipeline that takes no text prompt, sidecars that
            do not load or fit; raised before anything is drawn.
        RuntimeError: the backend that was asked for cannot run here.
    """
    check_takes_prompts(pipe)
    metrics = default_metrics(pipe) if metrics is None else tuple(metrics)
    _check_request(sidecars, prompts, resolutions, steps, batch_size, scenes, metrics)
    check_backend(backend)
    if sidecars:  # a backend that cannot run fails now, not after the teacher has drawn
        sample = torch.empty(0, device=execution_device(pipe))
        resolve_backend(backend, sample, find_denoiser(pipe).dtype)
    real_paths = None if real_images is None else find_images(real_images)
    settings = _Settings(
        list(prompts), steps, guidance_scale, batch_size, seed, backend, progress or _ignore
    )
    with _own_attention(pipe) as found:
        contestants = {TEACHER: None} | _load_sidecars(pipe, sidecars, found)
        device = _metric_device(pipe)
        judges = {
            "fid": FidJudge(fid, device, real_paths) if "fid" in metrics else None,
            "clip": ClipJudge(clip, device) if "clip" in metrics else None,
        }
        exam = _prepare_exam(pipe, scenes, settings) if "attributes" in metrics else None
        rows = []
        for resolution in resolutions:
            with_kd = "kd" in metrics
            errors = _kd_errors(pipe, contestants, resolution, settings) if with_kd else {}
            sheet = {}
            for name, adapter in contestants.items():
                with _patched(pipe, adapter, backend):
                    measured, sheet[name] = _measure(pipe, name, resolution, settings, judges)
                    attributes = _examine(pipe, name, resolution, exam, settings)
                row = EvaluationRow(
                    name, resolution, **measured, kd=errors.get(name), attributes=attributes
                )
                rows.append(row)
            if output is not None:
                _save_sheet(Path(output), resolution, sheet, settings.prompts)
        return rows


def default_metrics(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """``kd``, and ``attributes`` for the Tiny Scenes pipelines that ship with the package."""
    return ("kd", "attributes") if ships_with_package(pipe) else ("kd",)


def ships_with_package(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline was loaded from a folder of Tiny Scenes that the package brings."""
    folder = Path(pipe.config.get("_name_or_path") or "/").resolve()
    shipped = [shipped_folder(name) for name in ("pipeline", "pixart") if is_shipped(name)]
    return folder in [path.resolve() for path in shipped]


def check_takes_prompts(pipe: DiffusionPipeline) -> None:
    """Raises ValueError for a pipeline that takes class labels, as DiT's does, or no text."""
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" not in accepted:
        taken = "class labels" if "class_labels" in accepted else "no text"
        raise ValueError(
            f"expected a pipeline that takes text prompts, got a {type(pipe).__name__}, "
            f"which takes {taken}"
        )


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The pictures in a folder, by name.

    Raises:
        ValueError: no such folder, or fewer than the two pictures that FID needs.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 2:
        got = f"{len(paths)} in {folder}" if folder.is_dir() else f"{folder}, which is no folder"
        raise ValueError(f"expected a folder of at least 2 images, got {got}")
    return paths


def _kd_errors(
    pipe: DiffusionPipeline,
    contestants: Mapping[str, GSPN2Adapter | None],
    resolution: int | None,
    settings: _Settings,
) -> dict[str, KDError]:
    """Every contestant's error; recordings are held for one batch of prompts at a time."""
    meters = {name: KDMeter() for name in contestants}
    for begin, batch in settings.batches():
        with record_calls(pipe) as calls:
            _draw(pipe, batch, begin, resolution, settings, output_type="latent")
        for name, adapter in contestants.items():
            with _patched(pipe, adapter, settings.backend):
                meters[name].add(calls, pipe)
        settings.progress(_label("KD error", resolution), begin + len(batch), len(settings.prompts))
    return {name: meter.result() for name, meter in meters.items()}


def _measure(
    pipe: DiffusionPipeline,
    name: str,
    resolution: int | None,
    settings: _Settings,
    judges: Mapping[str, Judge | None],
) -> tuple[dict, list[Image.Image]]:
    """Draw all prompts; returns fields of the row, and the pictures of the first prompts."""
    judges = {metric: judge for metric, judge in judges.items() if judge is not None}
    for judge in judges.values():
        judge.start(is_teacher=name == TEACHER)
    # Untimed, or the first contestant would pay for what all need: kernels, threads, caches.
    _draw(pipe, settings.prompts[: settings.batch_size], 0, resolution, settings, "latent", steps=2)
    seconds, kept, size = 0.0, [], None
    for begin, batch in settings.batches():
        with _stopwatch() as elapsed:
            images = _draw(pipe, batch, begin, resolution, settings, output_type="pil")
        seconds += elapsed()
        size = images[0].height, images[0].width
        for judge in judges.values():
            judge.add(to_bytes(images), batch)
        kept += images[: max(0, SHEET_PROMPTS - len(kept))]
        settings.progress(_label(name, resolution), begin + len(batch), len(settings.prompts))
    row = {"size": size, "seconds_per_image": seconds / len(settings.prompts), "notes": {}}
    for metric, judge in judges.items():
        row[metric], note = judge.result()
        if note:
            row["notes"][metric] = note
    return row, kept


def _draw(
    pipe: DiffusionPipeline,
    prompts: list[str],
    begin: int,
    resolution: int | None,
    settings: _Settings,
    output_type: str,
    steps: int | None = None,
) -> list[Image.Image] | Tensor:
    """Pictures of a batch whose first prompt is number `begin`."""
    return pipe(
        prompts,
        height=resolution,
        width=resolution,
        num_inference_steps=steps or settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[seeded(settings.seed + begin + index) for index in range(len(prompts))],
        output_type=output_type,
        **literal_options(pipe),
    ).images


@contextmanager
def _stopwatch() -> Iterator[Callable[[], float]]:
    """Yields a function that tells the seconds inside, with the GPU's queue emptied at both
    ends."""
    synchronize()
    start = time.perf_counter()
    seconds = []
    yield lambda: seconds[0]
    synchronize()
    seconds.append(time.perf_counter() - start)


def _metric_device(pipe: DiffusionPipeline) -> torch.device:
    # FID adds up in float64, which mps does not have.
    device = execution_device(pipe)
    return device if device.type == "cuda" else torch.device("cpu")


def _prepare_exam(pipe: DiffusionPipeline, scenes: int, settings: _Settings) -> Exam:
    from gspn2_diffusers.tiny_scenes.score import prepare_exam

    device = execution_device(pipe)
    probe = shipped_folder("probe")
    return prepare_exam(device, scenes, settings.seed, batch_size=settings.batch_size, probe=probe)


def _examine(
    pipe: DiffusionPipeline,
    name: str,
    resolution: int | None,
    exam: Exam | None,
    settings: _Settings,
) -> dict | None:
    """What the attribute probe finds in pictures of the exam's captions."""
    if exam is None:
        return None
    from gspn2_diffusers.tiny_scenes.score import count_images, score

    return score(
        pipe,
        exam,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.batch_size,
        height=resolution,
        width=resolution,
        progress=count_images(_label(f"attributes of {name}", resolution), exam, settings.progress),
    )


def _save_sheet(
    folder: Path,
    resolution: int | None,
    images: Mapping[str, list[Image.Image]],
    prompts: list[str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sheet = draw_comparison(images, prompts[:SHEET_PROMPTS], cards_per_row=1)
    sheet.save(sheet_path(folder, resolution))


def sheet_path(folder: str | os.PathLike, resolution: int | None) -> Path:
    """Where `evaluate` writes the sheet of a resolution."""
    return Path(folder) / ("images.png" if resolution is None else f"images-{resolution}.png")


def _label(what: str, resolution: int | None) -> str:
    return what if resolution is None else f"{what}, {resolution} px"


def _ignore(name: str, done: int, expected: int) -> None:
    pass


@contextmanager
def _own_attention(pipe: DiffusionPipeline) -> Iterator[GSPN2Adapter | None]:
    """While inside, the pipeline has its own attention; yields the blocks that it came with."""
    model = find_denoiser(pipe)
    patched = any(is_patched(attn) for _, _, attn in walk_sites(model))
    found = GSPN2Adapter.of_patched(model) if patched else None
    blocks = [] if found is None else list(found.blocks)
    backends = [block.backend for block in blocks]
    # Patching casts blocks to the model's dtype: the tensors themselves are kept, to be put back.
    tensors = [(tensor, tensor.data) for block in blocks for tensor in _tensors(block)]
    remove_gspn2(model)
    try:
        yield found
    finally:
        remove_gspn2(model)
        if found is not None:
            apply_gspn2(model, found)
            for block, backend in zip(blocks, backends, strict=True):
                block.backend = backend
            for tensor, data in tensors:
                tensor.data = data


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def _patched(pipe: DiffusionPipeline, adapter: GSPN2Adapter | None, backend: str) -> Iterator[None]:
    """While inside, the pipeline has these blocks; with None it stays as it is."""
    if adapter is None:
        yield
        return
    apply_gspn2(pipe, adapter, backend=backend)
    try:
        yield
    finally:
        remove_gspn2(pipe)


def _load_sidecars(
    pipe: DiffusionPipeline, sidecars: Mapping[str, Sidecar], found: GSPN2Adapter | None
) -> dict[str, GSPN2Adapter | None]:
    """Blocks by name, all of which fit the pipeline.

    Raises:
        ValueError: weights that do not load or belong to another model.
    """
    model = find_denoiser(pipe)
    adapters = {}
    for name, sidecar in sidecars.items():
        if isinstance(sidecar, GSPN2Adapter):
            # Patching casts and moves blocks: these may be in training elsewhere.
            adapters[name] = copy.deepcopy(sidecar)
        else:
            adapters[name] = found if sidecar is None else GSPN2Adapter.from_pretrained(sidecar)
        if adapters[name] is not None:
            adapters[name].select(model)
    return adapters


def _check_request(
    sidecars: Mapping[str, Sidecar],
    prompts: Sequence[str],
    resolutions: Sequence[int | None],
    steps: int,
    batch_size: int,
    scenes: int,
    metrics: Sequence[str],
) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of at least 1 prompt, got {prompts!r}")
    if not resolutions or len(set(resolutions)) != len(resolutions):
        raise ValueError(f"expected different resolutions, got {list(resolutions)}")
    least = {"steps": (steps, 1), "batch_size": (batch_size, 1), "scenes": (scenes, 2)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"expected {name} of at least {minimum}, got {value}")
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"expected metrics of {', '.join(METRICS)}, got {unknown[0]!r}")
    if TEACHER in sidecars:
        raise ValueError(f"expected a sidecar's name other than the teacher's, got {TEACHER!r}")


def name_weights(sources: Sequence[str]) -> dict[str, str]:
    """Folders or hub ids of weights by the last part of their paths, or whole where parts equal."""
    parts = [Path(source).name for source in sources]
    unique = len(set(parts)) == len(parts)
    return dict(zip(parts if unique else sources, sources, strict=True))


def write_results(
    path: str | os.PathLike,
    rows: Sequence[EvaluationRow],
    device: torch.device,
    settings: Mapping[str, object],
) -> Path:
    """Write rows as JSON, with what somebody needs to judge or repeat them.

    Args:
        settings: how `evaluate` was called.
    """
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": describe_hardware(device),
        "versions": installed_versions(),
        "settings": dict(settings),
        "rows": [asdict(row) for row in rows],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str, ensure_ascii=False) + "\n")
    return path


def describe_hardware(device: torch.device) -> dict[str, object]:
    """The device's type and name, and on a CPU the threads that torch uses."""
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": device_name(device),
        "threads": None if on_cuda else torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else None,
    }


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that results depend on, None where missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in (*LIBRARIES, *CUPY_DISTRIBUTIONS, "torchmetrics", "torch-fidelity"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return versions
