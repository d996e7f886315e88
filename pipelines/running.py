"""One run of the high-resolution pipeline: stage by stage to latents, and from them to pictures."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn

import gspn2_diffusers
from gspn2_diffusers.conditioning import Rows, encode_prompts, encode_unconditional
from gspn2_diffusers.fingerprint import fingerprint
from gspn2_diffusers.hardware import execution_device, synchronize
from gspn2_diffusers.patch import softmax_attention
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.decoding import Tiling, decode_bands, encode_tiled
from gspn2_diffusers.pipelines.generation import seeded
from gspn2_diffusers.pipelines.keeping import StageStore
from gspn2_diffusers.pipelines.parts import Parts
from gspn2_diffusers.pipelines.planner import Plan
from gspn2_diffusers.pipelines.sampling import (
    GuidedDenoiser,
    StageSampler,
    Thrift,
    chunked_feed_forward,
)
from gspn2_diffusers.pipelines.writing import TIFF_SUFFIXES, open_image
from gspn2_diffusers.sites import is_patched, pixels_per_latent, walk_sites

if TYPE_CHECKING:
    from gspn2_diffusers.pipelines.highres import HighResPipeline

logger = logging.get_logger(__name__)

# Without a plan, latents of more pixels than this are decoded in tiles.
DECODED_AT_ONCE = 160**2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What is to be drawn.

    Args:
        prompts, negative_prompts: one for each picture; no negative ones: the pipeline's own way.
        stages: of the cascade.
        seeds: for each picture, one for each stage.
        upsample: "pixel" or "latent".
        softmax_base: the first stage runs the model's own attention.
        image: the picture to start from instead of a first stage.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    stages: tuple[Stage, ...]
    seeds: tuple[tuple[int, ...], ...]
    upsample: str
    softmax_base: bool
    image: Image.Image | None

    def describe_stages(self) -> list[dict]:
        """Plain values of each stage, its seeds among them."""
        seeds = zip(*self.seeds, strict=True)
        return [
            {**stage.to_dict(), "seeds": list(own)}
            for stage, own in zip(self.stages, seeds, strict=True)
        ]

    def describe(self) -> dict:
        """Plain values of all but the stages."""
        return {
            "prompts": list(self.prompts),
            "negative_prompts": self.negative_prompts and list(self.negative_prompts),
            "upsample": self.upsample,
            "softmax_base": self.softmax_base,
            "image": self.image and _digest(self.image),
        }


class Run:
    """Draws what a request asks for with the parts of a pipeline.

    Args:
        pipe: whose parts and progress bars are used.
        request: checked.
        plan: how memory is saved; None saves none but tiles large pictures for the VAE.
        reuse: steps for which deep features serve at the last stage.
        progress: called with (what is running, done, expected), instead of bars.
        on_step_end: a diffusers callback.

    Attributes:
        plan: the present one, leaner than at first if the device ran out of memory.
        seconds: of each part of the run, by name.
    """

    def __init__(
        self,
        pipe: HighResPipeline,
        request: Request,
        plan: Plan | None,
        reuse: int = 1,
        progress: Progress | None = None,
        on_step_end: Callable[..., dict] | None = None,
    ):
        self.pipe = pipe
        self.request = request
        self.plan = plan
        self.reuse = reuse
        self.progress = progress
        self.on_step_end = on_step_end
        self.device = execution_device(pipe)
        self.seconds: dict[str, float] = {}
        self._may_retry = plan is not None
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()  # parts that were moved come back

    # Latents

    def latents(self, keep: str | os.PathLike | None, resume: bool) -> Tensor:
        """Run the stages, or what is left of them; latents ``[n, c, h, w]`` of the last one.

        Text encoders that the plan has no room for are in CPU memory from here on.

        Args:
            keep: folder for the latents of every stage.
            resume: start after the last stage that is there already.

        Raises:
            RuntimeError: a stage gave latents that are not finite.
            OSError: the folder cannot be written to.
        """
        store, done = self._open_store(keep) if keep is not None else (None, None)
        latents, first = None, 0
        if resume and done is not None:
            latents, first = store.load(done).to(self.device), done + 1
        prompts = None
        for index in range(first, len(self.request.stages)):
            if prompts is None:
                prompts = self._encode_prompts()
            with self._timed(stage_name(index, self.request.stages[index])):
                run = partial(self._stage, index, latents, *prompts)
                latents = self._leaner_if_needed(index, run)
            if not torch.isfinite(latents).all():
                raise RuntimeError(
                    f"stage {index}: expected finite latents, got infinite ones or NaN: the "
                    f"model may overflow in {self.pipe.denoiser.dtype}"
                )
            if self.pipe.interrupt:
                break
            if store is not None:
                store.save(index, latents)
        return latents

    def _open_store(self, folder: str | os.PathLike) -> tuple[StageStore, int | None]:
        models = {"denoiser": fingerprint(self.pipe.denoiser), "vae": fingerprint(self.pipe.vae)}
        scheduler = {"scheduler": dict(self.pipe.scheduler.config)}
        stages = self.request.describe_stages()
        store = StageStore(folder, self.request.describe() | models | scheduler, stages)
        return store, store.latest()

    def _encode_prompts(self) -> tuple[Rows, Rows]:
        """Rows of the prompts, and of what guidance leads away from."""
        base, request = self.pipe.base, self.request
        with self._timed("text"):
            told = encode_prompts(base, request.prompts)
            if request.negative_prompts is None:
                nothing = encode_unconditional(base)
                not_told = {
                    name: column.expand(len(request.prompts), *column.shape[1:])
                    for name, column in nothing.items()
                }
            else:
                not_told = encode_prompts(base, request.negative_prompts)
        self._text_away_if_planned()
        first = request.stages[0]  # the size that the model knows, for those that are told one
        size = [first.height, first.width]
        sizes = torch.tensor([[*size, 0, 0, *size]] * len(request.prompts))
        return tuple(
            {name: column.to(self.device) for name, column in {**rows, "sizes": sizes}.items()}
            for rows in (told, not_told)
        )

    def _stage(self, index: int, before: Tensor | None, told: Rows, not_told: Rows) -> Tensor:
        """Latents of a stage from those of the one before."""
        self.pipe._stage = index
        stage = self.request.stages[index]
        if index == 0 and self.request.image is not None:
            return self._encode_image(stage)
        thrift = self._thrift(index)
        if self.on_step_end is not None:  # which may change the model
            thrift = replace(thrift, graph=False)
        model = self.pipe.denoiser
        called = self.pipe.called_denoiser
        denoiser = GuidedDenoiser(called, told, not_told, stage.guidance_scale, thrift)
        sampler = StageSampler(self.pipe.scheduler, stage, denoiser, self.device)
        generators = [seeded(seeds[index]) for seeds in self.request.seeds]
        image = None if before is None else self._enlarge(before, stage)
        coarse = None if before is None else tuple(before.shape[-2:])
        shape = (len(generators), model.config.in_channels, *self._latent_size(stage))
        own = index == 0 and self.request.softmax_base
        with (
            softmax_attention(model) if own and _has_softmax(model) else nullcontext(),
            chunked_feed_forward(model, thrift.chunk_feed_forward),
            self._bar(stage_name(index, stage), len(sampler.timesteps)) as advance,
        ):
            on_step = partial(self._after_step, index, advance)
            return sampler(
                shape, generators, image, coarse, on_step, stopped=lambda: self.pipe.interrupt
            )

    def _after_step(
        self, index: int, advance: Callable[[], None], step: int, timestep: Tensor, latents: Tensor
    ) -> Tensor:
        if self.on_step_end is not None:
            before = sum(stage.steps for stage in self.request.stages[:index])
            changed = self.on_step_end(self.pipe, before + step, timestep, {"latents": latents})
            latents = (changed or {}).get("latents", latents)
        advance()
        return latents

    def _enlarge(self, latents: Tensor, stage: Stage) -> Tensor:
        """Latents of the size of a stage."""
        if self.request.upsample == "latent":
            return F.interpolate(latents, self._latent_size(stage), mode="bicubic")
        with self._vae_alone():
            return torch.cat([self._enlarge_picture(one[None], stage) for one in latents])

    def _enlarge_picture(self, latents: Tensor, stage: Stage) -> Tensor:
        name = f"enlarging to {stage.width}x{stage.height}"
        picture = torch.from_numpy(np.concatenate(list(self._bands(latents, name))))
        # On uint8 in CPU memory, where the larger picture needs no room on the GPU.
        larger = F.interpolate(
            picture.permute(2, 0, 1)[None], (stage.height, stage.width), mode="bicubic",
            antialias=True,
        )  # fmt: skip
        return self._encode_picture(larger[0].permute(1, 2, 0))

    def _encode_image(self, stage: Stage) -> Tensor:
        picture = self.request.image.convert("RGB")
        if picture.size != (stage.width, stage.height):
            picture = picture.resize((stage.width, stage.height), Image.Resampling.LANCZOS)
        with self._vae_alone():
            return self._encode_picture(np.array(picture))

    def _encode_picture(self, picture: np.ndarray | Tensor) -> Tensor:
        """Latents of a picture, uint8 ``[h, w, 3]``."""
        tiling = self._tiling(picture.shape[:2])
        return encode_tiled(self.pipe.vae, picture, tiling).to(self.device, torch.float32)

    # Pictures

    def decode(self, latents: Tensor) -> list[np.ndarray]:
        """uint8 pictures ``[h, w, 3]`` of latents ``[n, c, h, w]``."""

        def run() -> list[np.ndarray]:
            with self._vae_alone():
                return [np.concatenate(list(self._bands(one[None], "decoding"))) for one in latents]

        with self._timed("decode"):
            return self._leaner_if_needed(len(self.request.stages), run)

    def write(self, latents: Tensor, path: Path, metadata: Mapping[str, str]) -> Path:
        """Decode latents ``[1, c, h, w]`` band by band into a file, with what made it.

        A TIFF, which few programs show at once, gets a small preview beside it.
        """
        scale = pixels_per_latent(self.pipe.vae.config)
        height, width = (scale * side for side in latents.shape[-2:])

        def run() -> None:
            with (
                self._vae_alone(),
                open_image(path, height, width, self._metadata() | dict(metadata)) as picture,
            ):
                for band in self._bands(latents, "decoding"):
                    picture.write(band)
                preview = picture.preview() if path.suffix.lower() in TIFF_SUFFIXES else None
            if preview is not None:
                preview.save(path.with_suffix(".preview.png"))

        with self._timed("decode"):
            self._leaner_if_needed(len(self.request.stages), run)
        return path

    def _bands(self, latents: Tensor, name: str) -> Iterator[np.ndarray]:
        scale = pixels_per_latent(self.pipe.vae.config)
        tiling = self._tiling([scale * side for side in latents.shape[-2:]])
        with self._bar(name) as advance:
            yield from decode_bands(self.pipe.vae, latents, tiling, progress=advance)

    def _metadata(self) -> dict[str, str]:
        settings = self.request.describe()
        settings["stages"] = self.request.describe_stages()
        versions = {"gspn2-diffusers": gspn2_diffusers, "diffusers": diffusers, "torch": torch}
        return {
            "prompt": self.request.prompts[0],
            "settings": json.dumps(settings),
            "plan": json.dumps(None if self.plan is None else self.plan.to_dict()),
            "versions": json.dumps({name: lib.__version__ for name, lib in versions.items()}),
        }

    # Memory

    def _thrift(self, index: int) -> Thrift:
        if self.plan is None:
            last = index == len(self.request.stages) - 1
            return Thrift(reuse=self.reuse if last else 1)
        return self.plan.stages[index].thrift

    def _tiling(self, size: Sequence[int]) -> Tiling | None:
        """Tiles for the VAE at a picture's (height, width)."""
        if self.plan is not None:
            return self.plan.decode.tiling
        latent = np.prod(size) / pixels_per_latent(self.pipe.vae.config) ** 2
        return Tiling() if latent > DECODED_AT_ONCE else None

    def _leaner_if_needed(self, phase: int, run: Callable[[], object]) -> object:
        """What `run` returns; out of memory starts it again on a leaner plan, once in a run.

        Args:
            phase: the stage's number, or the count of stages for decoding.
        """
        try:
            return run()
        except torch.OutOfMemoryError as error:
            leaner = self.plan.leaner(phase) if self._may_retry else None
            if leaner is None:
                raise
            reason = str(error).partition("\n")[0]
        logger.warning(f"out of memory ({reason}): trying once more with a leaner plan")
        self.plan, self._may_retry = leaner, False
        self._text_away_if_planned()
        self._give_back_cached()
        return run()

    def _give_back_cached(self) -> None:
        """Memory that torch holds but no tensor does."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _text_away_if_planned(self) -> None:
        """Prompts are encoded: text encoders leave the device until the end of the run."""
        if self.plan is not None and self.plan.offload_text:
            self._stack.enter_context(self._away(Parts.of(self.pipe.base).others))

    @contextmanager
    def _vae_alone(self) -> Iterator[None]:
        """While inside, the denoiser is off the device if the plan says so.

        The VAE's tensors and the denoiser's are of other sizes: what is cached of one is of little
        use to the other, and on a card that is nearly full leaves gaps that nothing fits into.
        """
        offload = self.plan is not None and self.plan.offload_denoiser
        with self._away([self.pipe.denoiser] if offload else []):
            self._give_back_cached()
            yield
        self._give_back_cached()

    @contextmanager
    def _away(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """While inside, these modules are in CPU memory; hooked ones stay where they are."""
        moved = [
            module
            for module in modules
            if module.device == self.device and not hasattr(module, "_hf_hook")
        ]
        for module in moved:
            module.to("cpu")
        if moved:
            self._give_back_cached()
        try:
            yield
        finally:
            for module in moved:
                module.to(self.device)

    # Telling what is going on

    @contextmanager
    def _bar(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A function that tells of progress: one more is done, or so many of so many."""
        done = 0

        def advance(now: int | None = None, of: int | None = None) -> None:
            nonlocal done
            done = done + 1 if now is None else now
            if self.progress is not None:
                self.progress(name, done, of or total)
                return
            bar.total = of or total
            bar.n = done
            bar.refresh()

        if self.progress is not None:
            yield advance
            return
        with self.pipe.progress_bar(total=total or 1) as bar:
            bar.set_description(name)
            yield advance

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add to one part's seconds, with the GPU's queue emptied at both ends."""
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _latent_size(self, stage: Stage) -> tuple[int, int]:
        scale = pixels_per_latent(self.pipe.vae.config)
        return stage.height // scale, stage.width // scale


def stage_name(index: int, stage: Stage) -> str:
    """What a stage is called in bars and tables."""
    return f"stage {index}, {stage.width}x{stage.height}"


def _has_softmax(model: nn.Module) -> bool:
    """Whether every patched layer still has its own attention."""
    return all(hasattr(attn, "to_q") for _, _, attn in walk_sites(model) if is_patched(attn))


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]
