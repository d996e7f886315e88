"""The documentation is true: its Python runs, its links lead somewhere.

Blocks fenced as ``python`` run in the order of the page, in one namespace that starts with `pipe`,
a tiny Stable Diffusion pipeline, and in an empty folder. Blocks fenced as ``py`` need a model from
the hub or a GPU and are only parsed.
"""

import ast
import re
from pathlib import Path

import pytest
from tiny_models import tiny_sd_pipeline

ROOT = Path(__file__).parents[1]
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()
]
BLOCK = re.compile(r"^```(python|py)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def code_blocks(page: Path, fence: str) -> list[str]:
    """The page's blocks of one kind, each on the line numbers it has in the page."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, match.start(2)) + match[2]
        for match in BLOCK.finditer(text)
        if match[1] == fence
    ]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p, "python")], ids=page_name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"pipe": tiny_sd_pipeline()}
    for block in code_blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p, "py")], ids=page_name)
def test_the_python_that_cannot_run_here_is_python(page):
    for block in code_blocks(page, "py"):
        ast.parse(block, page)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=page_name)
def test_relative_links_of_a_page_lead_to_files(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
