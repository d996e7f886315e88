"""The wheel: built, installed into a clean environment, and everything imported from there."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "examples" / "tiny_scenes" / "weights"
PACKAGES = {
    "gspn2_diffusers": ROOT / "gspn2_diffusers",
    "gspn2_diffusers.distillation": ROOT / "gspn2_diffusers" / "distillation",
    "gspn2_diffusers.kernels": ROOT / "kernels",
    "gspn2_diffusers.pipelines": ROOT / "pipelines",
    "gspn2_diffusers.tiny_scenes": ROOT / "examples" / "tiny_scenes",
}
# One worker builds; the others would build again.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. It is built from a copy, since setuptools leaves build folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES.values():
        shutil.copytree(folder, source / folder.relative_to(ROOT), dirs_exist_ok=True)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with the wheel; libraries are borrowed from the running one."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel)
    # A path line lends the libraries; unlike site.addsitedir it does not run the .pth files in
    # there, so that the editable installation of this checkout stays out.
    site_packages = next((folder / "lib").glob("python*/site-packages"))
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages / "borrowed.pth").write_text("\n".join(libraries))
    return python


def run(*command: object, cwd: Path | None = None) -> str:
    """Output of a command; its errors are shown when it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "80", "PYTHONWARNINGS": "ignore"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def modules() -> list[str]:
    """Every module of the package, by the files of the checkout."""
    return [
        package if path.stem == "__init__" else f"{package}.{path.stem}"
        for package, folder in PACKAGES.items()
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__main__"
    ]


def test_every_module_is_imported_from_the_wheel_and_not_from_the_checkout(clean_python, tmp_path):
    program = (
        "import importlib, sys\n"
        f"for name in {modules()!r}:\n"
        "    print(importlib.import_module(name).__file__)\n"
    )
    files = run(clean_python, "-I", "-c", program, cwd=tmp_path).splitlines()
    assert len(files) == len(modules())
    environment = str(clean_python.parents[1])
    assert [file for file in files if not file.startswith(environment)] == []


def test_the_demo_runs_from_the_wheel_offline(clean_python, tmp_path):
    script = clean_python.with_name("gspn2")
    assert "doctor" in run(script, "--help", cwd=tmp_path)
    run(script, "demo", "--steps", "1", "--prompt", "a red ball in the snow", cwd=tmp_path)
    assert (tmp_path / "outputs" / "demo" / "comparison.png").is_file()


@pytest.mark.parametrize("name", ["pipeline", "gspn2", "probe"])
def test_shipped_weights_are_in_the_wheel(wheel, name):
    with ZipFile(wheel) as archive:
        packed = {Path(member) for member in archive.namelist()}
    expected = [path for path in (WEIGHTS / name).rglob("*") if path.is_file()]
    assert expected
    home = Path("gspn2_diffusers/tiny_scenes/weights")
    assert [path for path in expected if home / path.relative_to(WEIGHTS) not in packed] == []


def test_nothing_else_is_in_the_wheel(wheel):
    with ZipFile(wheel) as archive:
        tops = {Path(member).parts[0] for member in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gspn2_diffusers"}
