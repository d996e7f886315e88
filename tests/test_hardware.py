"""Settings of the machine that programs choose."""

import os
import platform

import pytest

from gspn2_diffusers.hardware import ALLOCATOR_SETTINGS, prefer_growing_memory

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def chosen() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    """The allocator's variables are not set, and are as they were afterwards."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_memory_grows_unless_the_user_chose_otherwise(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    prefer_growing_memory()
    assert chosen() == {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR_SETTINGS}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_chose_stays(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    prefer_growing_memory()
    assert chosen() == {name: "max_split_size_mb:64"}


def test_windows_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    prefer_growing_memory()
    assert chosen() == {}
