"""The command says what it is before it has loaded torch, and loads what it needs then."""

import os
import subprocess
import sys

import pytest

CODE = (
    "import runpy, sys; sys.argv = {argv}; sys.orig_argv = {orig}\n"
    "try:\n    {run}\nexcept SystemExit as end:\n    code = end.code\n"
    "print('HEAVY', sorted({{'torch', 'transformers', 'numpy', 'matplotlib'}} & set(sys.modules)), 'CODE', code)"
)
SCRIPT = "from hf_cuttlefish.cli.main import main; code = main()"
MODULE = "runpy.run_module('hf_cuttlefish', run_name='__main__', alter_sys=True)"


def python(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *(["-c", code] if code is not None else arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300
    )


@pytest.mark.parametrize(
    "options", [["--help"], ["--version"], ["factorize", "--help"], ["factorize"], ["no-such-command"]]
)
@pytest.mark.parametrize("way", ["script", "module"])
def test_help_version_and_wrong_usage_load_nothing_heavy(way, options):
    if way == "script":
        code = CODE.format(argv=["/usr/bin/hf-cuttlefish", *options], orig=[], run=SCRIPT)
    else:
        code = CODE.format(argv=["-m", *options], orig=["python", "-m", "hf_cuttlefish", *options], run=MODULE)
    done = python(code=code)
    assert "HEAVY [] CODE " + ("0" if options[-1].startswith("--") else "2") in done.stdout, done.stdout + done.stderr


def test_python_m_works_and_the_package_is_whole_then(tmp_path):
    shown = python("-m", "hf_cuttlefish", "--version")
    assert shown.returncode == 0 and shown.stdout.startswith("hf-cuttlefish ")
    failed = python("-m", "hf_cuttlefish", "merge", str(tmp_path / "none"), str(tmp_path / "out"))
    assert failed.returncode == 1 and "no such folder" in failed.stderr


def test_the_import_alone_registers_the_loader():
    code = (
        "import hf_cuttlefish; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known;"
        "print('cuttlefish' in known, all(hasattr(hf_cuttlefish, n) for n in hf_cuttlefish.__all__))"
    )
    assert python(code=code).stdout.split() == ["True", "True"]


def test_names_are_there_also_where_the_command_has_loaded_nothing():
    code = (
        "import sys; sys.argv = ['hf-cuttlefish']; import hf_cuttlefish as h; before = 'torch' in sys.modules;"
        "h.factorize; print(before, 'torch' in sys.modules, 'factorize' in dir(h), hasattr(h, 'nothing'))"
    )
    assert python(code=code).stdout.split() == ["False", "True", "True", "False"]
