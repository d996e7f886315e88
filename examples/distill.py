"""Turn the self-attention of a diffusers pipeline into GSPN-2 blocks, by distillation.

    accelerate launch distill.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir FOLDER --output_dir my-gspn2

The pipeline is its own teacher. Blocks are trained in stages: teacher forcing, end to end and, if
asked for, a curriculum at twice the resolution. Without images, --self_generate PROMPTS.txt has
the teacher draw them. The result is a folder for apply_gspn2.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder
from safetensors.torch import load_file, save_file

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2, checkpoint_with_grid
from gspn2_diffusers.conditioning import native_resolution, size_step
from gspn2_diffusers.distillation.batches import Batches, Share, split_rows
from gspn2_diffusers.distillation.buckets import make_buckets
from gspn2_diffusers.distillation.cache import LatentCache, build_cache
from gspn2_diffusers.distillation.card import write_card
from gspn2_diffusers.distillation.log import progress_reporter
from gspn2_diffusers.distillation.lora import add_lora, save_lora
from gspn2_diffusers.distillation.losses import STAGES, Distillation, LossWeights
from gspn2_diffusers.distillation.sources import (
    HubDataset,
    ImageFolder,
    Limited,
    SelfGenerated,
    Source,
    TinyScenes,
    WebDatasetShards,
)
from gspn2_diffusers.distillation.teacher import TeacherEncoder
from gspn2_diffusers.distillation.trainer import Trainer, TrainingOptions
from gspn2_diffusers.distillation.validation import Validation
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising
from gspn2_diffusers.pipelines.loading import DTYPES, load_pipeline

LOSS_TERMS = ("output", "layer", "block", "base", "guided")
PUBLISHED = ["config.json", "*.safetensors", "README.md", "validation/*.png"]
# Arguments that say where things are rather than how they were made.
PRIVATE = ("pretrained_model_name_or_path", "gspn2_weights", "dataset_name", "webdataset")
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    """All arguments; names as in the training scripts of diffusers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def group(title: str):
        return parser.add_argument_group(title).add_argument

    add = group("teacher and student")
    add("--pretrained_model_name_or_path", required=True, help="pipeline: folder or hub id")
    add("--revision", help="of the pipeline on the hub")
    add("--variant", help="of the pipeline's files, such as fp16")
    add("--gspn2_weights", help="start from these blocks instead of fresh ones")
    add("--proxy_ratio", type=int, default=8, help="the scan runs on C / proxy_ratio channels")
    add("--proxy_dim", type=int, help="the number of channels itself, in every layer")
    add("--groups", type=int, default=1, help="sets of propagation weights per direction")
    add("--chunk_size", type=int, help="lines after which a scan restarts; default: never")
    add("--parameters_from", choices=("proxy", "tokens"), default="tokens")
    add("--no_mean_path", action="store_true", help="leave out the map of the mean token")
    add("--random_start", action="store_true", help="inherit nothing from the attention layers")
    add("--keep_attention", nargs="*", help="patterns of layers that stay softmax attention")
    add("--lora_rank", type=int, default=0, help="LoRA on cross-attention and feed-forward, too")

    add = group("data: one of")
    add("--train_data_dir", type=Path, help="folder of images with a metadata.jsonl")
    add("--dataset_name", help="Hugging Face dataset: name or local path")
    add("--webdataset", help="tar shards: folder, pattern such as data-{000..019}.tar, or url")
    add("--tiny_scenes", type=int, metavar="COUNT", help="so many procedural pictures")
    add("--self_generate", type=Path, metavar="PROMPTS", help="text file; the teacher draws")

    add = group("data")
    add("--dataset_config_name")
    add("--dataset_split", default="train")
    add("--streaming", action="store_true", help="read --dataset_name without downloading it first")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--images_per_prompt", type=int, default=1, help="of --self_generate")
    add("--max_train_samples", type=int)
    add("--resolution", type=int, help="side of a square image; default: the model's own")
    add("--max_aspect_ratio", type=float, default=2.0, help="of the buckets; 1: squares only")
    add("--proportion_empty_prompts", type=float, default=0.1)
    add("--cache_dir", type=Path, help="of latents and embeddings; default: output_dir/cache")
    add("--cache_batch_size", type=int, default=16, help="images encoded at once")

    add = group("stages and losses")
    add("--teacher_forcing_steps", type=int, default=1000)
    add("--end_to_end_steps", type=int, default=2000)
    add("--curriculum_steps", type=int, default=0, help="at twice the resolution, after the others")
    for name in LOSS_TERMS:
        default = getattr(LossWeights, name)
        add(f"--{name}_weight", type=float, default=default, help=f"of the {name} loss")
    add("--guided_scale", type=float, default=4.0, help="guidance of the guided loss")
    add("--snr_gamma", type=float, help="min-SNR weights on the base loss")

    add = group("training")
    add("--output_dir", type=Path, required=True, help="blocks, checkpoints and log go here")
    add("--train_batch_size", type=int, default=4, help="per device")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--learning_rate", type=float, default=1e-3)
    add("--lr_scheduler", default="cosine", help="as in diffusers.optimization")
    add("--lr_warmup_steps", type=int, default=100)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.99)
    add("--adam_weight_decay", type=float, default=0.0)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--use_8bit_adam", action="store_true", help="by bitsandbytes")
    add("--max_grad_norm", type=float, default=1.0)
    add("--use_ema", action="store_true", help="average the weights; the average is saved")
    add("--ema_decay", type=float, default=0.995)
    add("--mixed_precision", choices=tuple(PRECISIONS), help="default: accelerate's configuration")
    add("--frozen_dtype", choices=tuple(DTYPES), help="of the teacher; default: mixed_precision's")
    add("--allow_tf32", action="store_true")
    add("--torch_compile", action="store_true")
    add("--backend", choices=("auto", "cuda", "torch"), default="auto", help="of the scan")
    add("--seed", type=int, default=0)

    add = group("checkpoints, validation, results")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help="a checkpoint's folder, or 'latest'")
    add("--held_out", type=int, default=64, help="examples to validate on instead of training")
    add("--validation_steps", type=int, default=500)
    add("--validation_prompt", nargs="*", default=[], help="pictures of teacher and student")
    add("--num_inference_steps", type=int, help="of all pictures; default: the pipeline's")
    add("--guidance_scale", type=float, help="of all pictures; default: the pipeline's")
    add("--logging_steps", type=int, default=10)
    add("--report_to", help="tensorboard, wandb, ...; default: the log file only")
    add("--save_dtype", choices=tuple(DTYPES), default="float32")
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", help="default: the name of output_dir")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, checked as far as they can be without a model."""
    parser = build_parser()
    args = parser.parse_args(argv)
    names = ("train_data_dir", "dataset_name", "webdataset", "tiny_scenes", "self_generate")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if len(given) != 1:
        listed = ", ".join(f"--{name}" for name in names)
        parser.error(f"expected one of {listed}; got {', '.join(given) or 'none'}")
    for name in ("train_batch_size", "gradient_accumulation_steps", "held_out"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    args.cache_dir = args.cache_dir or args.output_dir / "cache"
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """Distil, save blocks and card, and return the results of the last validation."""
    args = parse_args(argv)
    accelerator = build_accelerator(args)
    pipe = load_teacher(args, accelerator)
    caches = {"native": prepare_cache(args, accelerator, pipe)}
    if args.curriculum_steps:
        caches["double"] = prepare_cache(args, accelerator, pipe, enlarge=2)
    denoiser = find_denoiser(pipe)
    if not args.validation_prompt:  # nothing is encoded or decoded from here on
        pipe.to("cpu")
        denoiser.to(accelerator.device)
    patch(args, pipe)
    distillation = Distillation(denoiser, Noising(pipe.scheduler), loss_weights(args))
    distillation.to(accelerator.device)
    if args.torch_compile:
        denoiser.compile()
    batches, held_out = draw_batches(args, accelerator, caches)
    validation = Validation(
        accelerator, distillation, held_out, max(1, args.held_out // held_out.order.batch_size),
        pipe=pipe, folder=args.output_dir / "validation", prompts=args.validation_prompt,
        height=args.resolution, width=args.resolution, steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale, seed=args.seed,
    )  # fmt: skip
    results: dict = {}

    def validate(step: int, stage: str) -> dict:
        results.update(validation(step, stage))
        return results

    def before_stage(stage: str, anew: bool) -> None:
        if stage == "curriculum":
            follow_present_student(args, accelerator, distillation, anew)

    def after_stage(stage: str) -> None:
        if accelerator.is_main_process:
            save(args, pipe, args.output_dir / stage)

    trainer = Trainer(
        training_options(args), accelerator, distillation, batches,
        validate=validate, before_stage=before_stage, after_stage=after_stage,
    )  # fmt: skip
    if args.report_to:
        settings = {name: str(value) for name, value in changed_settings(args).items()}
        accelerator.init_trackers("gspn2-distillation", config=settings)
    started = time.perf_counter()
    if trainer.run(args.resume_from_checkpoint) and accelerator.is_main_process:
        seconds = time.perf_counter() - started
        publish(args, accelerator, pipe, caches["native"], results, seconds)
    accelerator.end_training()
    return results


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=args.lora_rank > 0,  # teacher forcing does not use them
    )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, args.output_dir / "logs"),
        kwargs_handlers=[ddp],
    )
    set_seed(args.seed)
    return accelerator


def load_teacher(args: argparse.Namespace, accelerator: Accelerator) -> DiffusionPipeline:
    """The pipeline, frozen; without a configuration of accelerate, in float32."""
    dtype = DTYPES.get(args.frozen_dtype, PRECISIONS.get(accelerator.mixed_precision))
    chosen = {"revision": args.revision, "variant": args.variant}
    pipe = load_pipeline(
        args.pretrained_model_name_or_path, dtype=dtype, device=accelerator.device,
        **{name: value for name, value in chosen.items() if value is not None},
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def build_source(args: argparse.Namespace, resolution: int) -> Source:
    if args.train_data_dir is not None:
        source = ImageFolder(args.train_data_dir, args.caption_column)
    elif args.dataset_name is not None:
        source = HubDataset(
            args.dataset_name, args.dataset_config_name, args.dataset_split,
            args.image_column, args.caption_column, args.streaming,
        )  # fmt: skip
    elif args.webdataset is not None:
        source = WebDatasetShards(args.webdataset, args.caption_column)
    elif args.tiny_scenes is not None:
        source = TinyScenes(args.tiny_scenes, resolution, args.seed)
    else:
        source = SelfGenerated(args.self_generate, args.images_per_prompt, seed=args.seed)
    return Limited(source, args.max_train_samples) if args.max_train_samples else source


def prepare_cache(
    args: argparse.Namespace, accelerator: Accelerator, pipe: DiffusionPipeline, enlarge: int = 1
) -> LatentCache:
    """Latents and embeddings at the resolution, or at `enlarge` times it."""
    step = size_step(pipe)
    resolution = enlarge * (args.resolution or native_resolution(pipe))
    buckets = make_buckets(resolution, enlarge * step, args.max_aspect_ratio)
    if args.tiny_scenes is not None:
        buckets = [(resolution, resolution)]
    encoder = TeacherEncoder(
        pipe, steps=args.num_inference_steps, guidance_scale=args.guidance_scale
    )
    cache = build_cache(
        args.cache_dir, build_source(args, resolution), encoder, buckets,
        batch_size=args.cache_batch_size, process_index=accelerator.process_index,
        process_count=accelerator.num_processes, wait=accelerator.wait_for_everyone,
        progress=progress_reporter(f"encoding at {resolution}", accelerator),
    )  # fmt: skip
    skipped = sum(entry["count"] for entry in cache.totals["skipped"].values())
    accelerator.print(f"{len(cache)} examples at {resolution}, {skipped} skipped")
    return cache


def patch(args: argparse.Namespace, pipe: DiffusionPipeline) -> None:
    """Put blocks into the pipeline's denoiser; they and any LoRA are what trains, in float32."""
    denoiser = find_denoiser(pipe)
    if args.gspn2_weights is not None:
        adapter = GSPN2Adapter.from_pretrained(args.gspn2_weights)
    else:
        config = GSPN2Config(
            proxy_ratio=args.proxy_ratio, proxy_dim=args.proxy_dim, groups=args.groups,
            chunk_size=args.chunk_size, parameters_from=args.parameters_from,
            mean_path=not args.no_mean_path,
        )  # fmt: skip
        adapter = GSPN2Adapter.for_model(
            denoiser, config, keep_attention=args.keep_attention, inherit=not args.random_start
        )
    apply_gspn2(pipe, adapter, backend=args.backend)
    adapter.float().requires_grad_(True)
    if args.lora_rank:
        add_lora(denoiser, args.lora_rank)
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_with_grid)


def draw_batches(
    args: argparse.Namespace, accelerator: Accelerator, caches: dict[str, LatentCache]
) -> tuple[dict[str, Batches], Batches]:
    """Batches of every stage, and those of the held-out examples."""
    micro_steps = args.gradient_accumulation_steps
    place = (accelerator.process_index, accelerator.num_processes)
    images = args.train_batch_size * accelerator.num_processes

    def build(cache: LatentCache, rows: dict, size: int, share: Share, dropout: float) -> Batches:
        return Batches(
            cache, rows, size, share=share, seed=args.seed, caption_dropout=dropout,
            device=accelerator.device,
        )  # fmt: skip

    share = Share(*place, micro_steps)
    drop = args.proportion_empty_prompts
    batches = {}
    for name, cache in caches.items():
        train, held = split_rows(cache, min(args.held_out, len(cache) // 2))
        stages = ("curriculum",) if name == "double" else ("teacher_forcing", "end_to_end")
        batches |= dict.fromkeys(stages, build(cache, train, images * micro_steps, share, drop))
        if name == "native":
            held_out = build(cache, held, images, Share(*place), 0.0)
    return batches, held_out


def follow_present_student(
    args: argparse.Namespace, accelerator: Accelerator, distillation: Distillation, anew: bool
) -> None:
    """Let the curriculum follow the student as it is when the curriculum begins."""
    path = args.output_dir / "curriculum_start.safetensors"
    if anew and accelerator.is_main_process:
        state = {name: value.contiguous() for name, value in distillation.trained().items()}
        save_file(state, path)
    accelerator.wait_for_everyone()
    distillation.follow(load_file(path))


def loss_weights(args: argparse.Namespace) -> LossWeights:
    terms = {name: getattr(args, f"{name}_weight") for name in LOSS_TERMS}
    return LossWeights(**terms, guidance_scale=args.guided_scale, snr_gamma=args.snr_gamma)


def training_options(args: argparse.Namespace) -> TrainingOptions:
    stages = {stage: getattr(args, f"{stage}_steps") for stage in STAGES}
    own = {field.name for field in fields(TrainingOptions)} & vars(args).keys() - {"ema_decay"}
    return TrainingOptions(
        stage_steps=stages,
        ema_decay=args.ema_decay if args.use_ema else None,
        **{name: getattr(args, name) for name in own},
    )


def changed_settings(args: argparse.Namespace) -> dict[str, object]:
    """Arguments that differ from their defaults, without paths."""
    parser = build_parser()
    return {
        name: value
        for name, value in vars(args).items()
        if value != parser.get_default(name) and not isinstance(value, Path) and name not in PRIVATE
    }


def save(args: argparse.Namespace, pipe: DiffusionPipeline, folder: Path) -> None:
    """Write the blocks, and the LoRA if there is one, in ``--save_dtype``."""
    dtype = DTYPES[args.save_dtype]
    adapter = copy.deepcopy(GSPN2Adapter.of_patched(pipe)).cpu()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    adapter.save_pretrained(folder)
    if args.lora_rank:
        denoiser = find_denoiser(pipe)
        prefix = next(name for name, part in pipe.components.items() if part is denoiser)
        save_lora(denoiser, folder, prefix, dtype)


def publish(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    cache: LatentCache,
    results: dict,
    seconds: float,
) -> None:
    """Write the blocks and their card into ``--output_dir``, and push them if asked."""
    save(args, pipe, args.output_dir)
    source = cache.description["source"]
    source = source.get("of", source)  # behind --max_train_samples
    teacher = args.pretrained_model_name_or_path
    skipped = sum(entry["count"] for entry in cache.totals["skipped"].values())
    write_card(
        args.output_dir,
        teacher=teacher,
        teacher_is_public=not Path(teacher).exists(),
        data={
            "source": source["source"],
            "examples": len(cache),
            "skipped": skipped,
            "latent sizes": ", ".join(f"{h} x {w}" for h, w in cache.buckets),
        },
        settings=changed_settings(args),
        results={name: value for name, value in results.items() if isinstance(value, float)},
        device=accelerator.device,
        processes=accelerator.num_processes,
        seconds=seconds,
        repo_id=args.hub_model_id,
    )
    accelerator.print(f"blocks for apply_gspn2: {args.output_dir}")
    if args.push_to_hub:
        repo = create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True).repo_id
        upload_folder(repo_id=repo, folder_path=args.output_dir, allow_patterns=PUBLISHED)


if __name__ == "__main__":
    main()
