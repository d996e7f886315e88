"""Set-up of all tests: offline, one thread per worker, no progress bars."""

import importlib.util
import os
import sys
from pathlib import Path

# `python -m pytest` puts the checkout on sys.path; transformers would then take kernels/ for the
# Hugging Face package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parents[1]]
# Before the libraries are imported: they read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import tiny_sd_pipeline  # noqa: E402

from gspn2_diffusers import GSPN2Config, apply_gspn2, save_gspn2  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run the CUDA kernels; where these cannot run they are skipped and say
    so."""
    missing = why_no_gpu_tests()
    if missing is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))


def why_no_gpu_tests() -> str | None:
    """What the tests marked ``gpu`` need and do not find."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return "needs CuPy: pip install gspn2-diffusers[cuda13] (or cuda12)"
    return None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers share the cores; more threads than cores slow all of them down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a saved `tiny_sd_pipeline`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_sd_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gspn2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of GSPN-2 weights for the pipeline in `sd_folder`: not trained, yet not a no-op."""
    pipe = tiny_sd_pipeline()
    with pytest.warns(UserWarning, match="untrained"):
        apply_gspn2(pipe, GSPN2Config())
    folder = tmp_path_factory.mktemp("weights") / "tiny-gspn2"
    save_gspn2(pipe, folder)
    return str(folder)
