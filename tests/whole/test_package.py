"""What is published: the contents of wheel and sdist, extras, the installed command, and a missing extra."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_cuttlefish

ROOT = Path(__file__).parents[2]
NAME = f"hf_cuttlefish-{hf_cuttlefish.__version__}"
BUILD = """
import os, sys, setuptools.build_meta as backend
source, folder = sys.argv[1:]
os.chdir(source)
backend.build_sdist(folder)
backend.build_wheel(folder)
"""


def run(*command: str | Path, path: Path | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In another folder than the checkout, with `path` before all else that Python imports from."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    result = subprocess.run([*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with wheel and sdist, built by setuptools from a copy of what the repository holds."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("package")
    (folder / "dist").mkdir()
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("this is no git checkout, and what belongs to the repository is not known")
    for name in filter(None, found.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", BUILD, folder / "source", folder / "dist", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    with zipfile.ZipFile(built / "dist" / f"{NAME}-py3-none-any.whl") as wheel:
        return email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """The wheel alone in a folder; torch and the others come from the environment."""
    wheel, target = built / "dist" / f"{NAME}-py3-none-any.whl", built / "installed"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", target]
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=built)
    return target


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built / "dist" / f"{NAME}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        assert f"{NAME}.dist-info/licenses/LICENSE" in wheel.namelist()
    package = built / "source" / "hf_cuttlefish"
    assert names == {f"hf_cuttlefish/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()}
    assert "hf_cuttlefish/py.typed" in names


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built / "dist" / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / NAME
    files = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert files | {"hf_cuttlefish", "docs", "examples"} <= {p.name for p in source.iterdir()}
    assert not any((source / name).exists() for name in ("tests", "benchmarks", "notebooks", "runs", ".ci"))
    run(sys.executable, "-c", BUILD, source, tmp_path, cwd=tmp_path)
    contents = []
    for folder in (built / "dist", tmp_path):
        with zipfile.ZipFile(folder / f"{NAME}-py3-none-any.whl") as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/RECORD")})
    assert contents[0] == contents[1]


def test_the_text_on_an_index_leads_nowhere_wrong(metadata, built):
    """An index has none of the repository's files: no pictures, and no links but to other sites."""
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown" and "CuttlefishCallback()" in text
    targets = re.findall(r"\]\(([^)\s]*)", text)
    assert targets and all(target.startswith("https://") for target in targets), targets
    assert "![" not in text and "<img" not in text
    # What it says is in the source distribution instead is there.
    readme = (built / "source" / "README.md").read_text("utf-8")
    named = {target.partition("#")[0] for target in re.findall(r"\]\(((?:docs|examples)/[^)]*)\)", readme)}
    with tarfile.open(built / "dist" / f"{NAME}.tar.gz") as archive:
        assert named and {f"{NAME}/{target}" for target in named} <= set(archive.getnames())


def test_every_extra_is_in_all(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"plots", "all"} <= extras
    asked: dict[str, set[str]] = {extra: set() for extra in extras}
    inside: dict[str, set[str]] = {extra: set() for extra in extras}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        for extra in extras:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                own = canonicalize_name(requirement.name) == "hf-cuttlefish"
                (inside if own else asked)[extra] |= set(requirement.extras) if own else {requirement.name}

    def everything(extra: str) -> set[str]:
        return asked[extra].union(*(everything(other) for other in inside[extra]))

    for extra in extras:
        assert everything(extra) <= everything("all") and everything(extra), extra


def test_the_tested_versions_lie_in_the_declared_ranges(metadata):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    needed = {canonicalize_name(r.name): r.specifier for r in requirements if r.marker is None}
    assert {"torch", "transformers", "accelerate", "safetensors"} <= set(needed)
    for requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement} and {version}"
    assert set(needed) <= set(pinned)


def test_the_installed_command_runs(installed, tmp_path):
    result = run(
        sys.executable, "-c", "import hf_cuttlefish; print(hf_cuttlefish.__file__)", path=installed, cwd=tmp_path
    )
    assert Path(result.stdout.strip()).parent == installed / "hf_cuttlefish"
    shown = run(installed / "bin" / "hf-cuttlefish", "--help", path=installed, cwd=tmp_path).stdout
    assert all(word in shown for word in ("inspect", "factorize", "merge", "plot", "env"))


def test_a_missing_extra_is_named(installed, tmp_path):
    """Importing the package needs no matplotlib; drawing does, and says what to install before it starts to work."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import hf_cuttlefish
from hf_cuttlefish.report import plotting
history = [{"step": 0, "layer": "a.0.b", "stable_rank": 2.0}]
for draw in (lambda: plotting.plot_stable_ranks(history), lambda: plotting.plot_ranks(hf_cuttlefish.RankPlan.from_dict(PLAN))):
    try:
        draw()
    except ImportError as error:
        print(error)
"""
    plan = {"layers": {"a.0.b": {"in_features": 8, "out_features": 8, "rank": 2, "reason": "by hand"}}}
    result = run(sys.executable, "-c", f"PLAN = {plan!r}\n{code}", path=installed, cwd=tmp_path)
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 2 and all(re.search(r"pip install ['\"]?hf-cuttlefish\[plots\]", line) for line in lines)
