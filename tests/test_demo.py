"""The demo on a tiny pipeline, and the picture it draws."""

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from gspn2_diffusers import cli, demo
from gspn2_diffusers.comparison import draw_comparison, wrap
from gspn2_diffusers.demo import CASCADE, DIRECT, GSPN2, SOFTMAX, run_demo
from gspn2_diffusers.tiny_scenes.probe import Probe


@pytest.fixture(scope="module")
def probe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained probe."""
    folder = tmp_path_factory.mktemp("probe")
    Probe().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def tiny_shipped_weights(monkeypatch, sd_folder, gspn2_folder, probe_folder):
    """The demo of these tests ships the tiny pipeline."""
    folders = {"pipeline": Path(sd_folder), "gspn2": Path(gspn2_folder), "probe": probe_folder}
    monkeypatch.setattr(demo, "shipped_folder", folders.__getitem__)


def test_demo_writes_the_comparison_and_every_image(tmp_path):
    result = run_demo(tmp_path / "new" / "folder", ["a cube", "a ball"], steps=2)
    assert result.comparison == tmp_path / "new" / "folder" / "comparison.png"
    assert Image.open(result.comparison).width > 4 * 32
    assert list(result.images) == [SOFTMAX, GSPN2]
    for paths in result.images.values():
        assert [Image.open(path).size for path in paths] == [(32, 32), (32, 32)]


def test_demo_repeats_itself_and_the_two_runs_differ(tmp_path):
    first, again = (run_demo(tmp_path / name, ["a cube"], steps=1).images for name in "ab")
    for name in (SOFTMAX, GSPN2):
        assert first[name][0].read_bytes() == again[name][0].read_bytes()
    assert first[SOFTMAX][0].read_bytes() != first[GSPN2][0].read_bytes()


def test_demo_counts_every_step_of_both_runs(tmp_path):
    calls = []
    run_demo(tmp_path, ["a cube"], steps=2, large=False, progress=lambda *call: calls.append(call))
    assert calls == [(SOFTMAX, 1, 2), (SOFTMAX, 2, 2), (GSPN2, 1, 2), (GSPN2, 2, 2)]


def test_demo_draws_a_picture_four_times_as_large_in_both_ways(tmp_path):
    calls = []
    result = run_demo(tmp_path, ["a cube"], steps=2, progress=lambda *call: calls.append(call))
    assert list(result.large_seconds) == [DIRECT, CASCADE]
    assert all(seconds > 0 for seconds in result.large_seconds.values())
    assert Image.open(result.large_comparison).width > 2 * 4 * 32
    told = [name for name, _, _ in calls if "stage" in name]
    assert f"{DIRECT}: stage 0, 128x128" in told and f"{CASCADE}: stage 2, 128x128" in told


def test_demo_leaves_the_large_picture_out_if_asked_to(tmp_path):
    result = run_demo(tmp_path, ["a cube"], steps=1, large=False)
    assert result.large_comparison is None and not (tmp_path / "large.png").exists()


def test_demo_scores_both_runs_on_the_same_exam_and_counts_its_scenes(tmp_path):
    calls = []
    result = run_demo(
        tmp_path, ["a cube"], steps=1, score_scenes=2, progress=lambda *call: calls.append(call)
    )
    assert list(result.scores) == [SOFTMAX, GSPN2]
    assert all(scores["scenes"] == 2 for scores in result.scores.values())
    scored = [call for call in calls if call[0].startswith("scoring")]
    assert scored == [(f"scoring {name}", 2, 2) for name in (SOFTMAX, GSPN2)]


def test_demo_times_add_up(tmp_path):
    for times in run_demo(tmp_path, ["a cube"], steps=2).times.values():
        assert min(times.load, times.text, times.denoise, times.decode) > 0
        assert times.total == times.load + times.text + times.denoise + times.decode
        assert times.step_ms == pytest.approx(500 * times.denoise)


def test_demo_refuses_no_steps(tmp_path):
    with pytest.raises(ValueError, match="at least 1 step; got 0"):
        run_demo(tmp_path, ["a cube"], steps=0)


def test_demo_command_prints_the_times_and_the_picture(tmp_path, capsys):
    assert cli.main(["demo", "-p", "a cube", "--steps", "1", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ms/step" in out and SOFTMAX in out and GSPN2 in out
    pictures = [str(tmp_path / name) for name in ("large.png", "comparison.png")]
    assert out.splitlines()[-2:] == pictures
    assert max(map(len, out.splitlines()[:-2])) <= 80


def test_demo_command_scores_both_runs(tmp_path, capsys):
    options = ["--score", "--scenes", "4", "--steps", "1", "-p", "a cube", "-o", str(tmp_path)]
    assert cli.main(["demo", *options]) == 0
    out = capsys.readouterr().out
    assert "4 scenes" in out and "all of a scene right" in out and "Fréchet distance" in out
    assert max(map(len, out.splitlines()[:-2])) <= 80


def test_comparison_puts_runs_side_by_side_and_wraps_cards():
    images = {name: [Image.new("RGB", (64, 64), name)] * 3 for name in ("red", "blue")}
    sheet = draw_comparison(images, ["one", "two", "three"], cards_per_row=2)
    colours = [colour for _, colour in sheet.getcolors(sheet.width * sheet.height)]
    assert (255, 0, 0) in colours and (0, 0, 255) in colours
    single = draw_comparison({name: run[:1] for name, run in images.items()}, ["one"])
    assert single.width < sheet.width and single.height < sheet.height


def test_comparison_refuses_a_run_that_lacks_images():
    with pytest.raises(ValueError, match="expected 2 images of b; got 1"):
        image = Image.new("RGB", (8, 8))
        draw_comparison({"a": [image, image], "b": [image]}, ["one", "two"])


def test_captions_wrap_within_the_width_and_keep_every_word():
    font = ImageFont.load_default(16)
    text = "five small green cones in a row on a beach with light from the left"
    lines = wrap(text, font, 120)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 for line in lines)
