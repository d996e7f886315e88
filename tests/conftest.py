"""Set-up of all tests: offline, one thread per worker, no progress bars."""

import os

# Before the libraries are imported: they read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import tiny_sd_pipeline  # noqa: E402

from gspn2_diffusers import GSPN2Config, apply_gspn2, save_gspn2  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` need a CUDA device; without one they are skipped and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
