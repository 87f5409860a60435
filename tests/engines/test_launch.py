"""Launches of several processes: what a library has aborted runs once more, and is said; what Python raises fails at once."""

from pathlib import Path

import pytest

from launch import launch


def test_an_aborted_launch_is_said_and_runs_once_more(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="aborts_once.py was aborted, and is run again"):
        assert "well" in launch(1, "aborts_once.py", tmp_path / "mark")


def test_an_error_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        launch(1, "aborts_once.py", tmp_path / "no" / "mark")
