"""What is built: a wheel and an sdist with all that they should have, and nothing else."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import cebra_jax_metrics

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = ROOT / "cebra_jax_metrics"
DATA = {"py.typed", "demo/place_cells.npz", "demo/place_cells.pt"}
FILES, FOLDERS = (  # at the top of the sdist
    {".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md"}
    | {"pyproject.toml"},
    {".ci", "benchmarks", "cebra_jax_metrics", "docs", "examples", "notebooks", "tests"},
)
RUN_TIME = {"jax", "jaxlib", "numpy", "scipy", "scikit-learn", "safetensors", "tqdm"}
EXTRAS = {"fit", "plot", "cuda12", "cuda13", "tpu", "notebooks", "test", "parity", "bench", "dev"}


def build(kind, source, folder):
    """The wheel or sdist of a folder, built without network."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = Path(folder).iterdir()
    return path


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    name = f"cebra_jax_metrics-{cebra_jax_metrics.__version__}.dist-info/METADATA"
    return HeaderParser().parsestr(contents(wheel)[name].decode())


@pytest.mark.heavy
def test_wheel_has_the_package_and_nothing_else(wheel):
    name = f"cebra_jax_metrics-{cebra_jax_metrics.__version__}"
    assert wheel.name == f"{name}-py3-none-any.whl"
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    data = {f"cebra_jax_metrics/{file}" for file in DATA}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    found = contents(wheel)
    assert found.keys() == modules | data | {f"{name}.dist-info/{file}" for file in about}
    assert found[f"{name}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


@pytest.mark.heavy
def test_sdist_has_the_sources_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        top, names = sdist.name.removesuffix(".tar.gz"), archive.getnames()
    assert all(name.startswith(f"{top}/") for name in names)
    names = [name.removeprefix(f"{top}/") for name in names]
    assert {name for name in names if "/" not in name} == FILES
    assert {name.split("/")[0] for name in names if "/" in name} == FOLDERS
    kinds = {Path(name).suffix for name in names if "/" in name}
    assert kinds == {"", ".ipynb", ".json", ".md", ".npz", ".png", ".pt", ".py", ".txt", ".typed"}
    assert not [name for name in names if re.search(r"(^|/)(__pycache__|\.venv|\.\w+_cache)", name)]
    assert {"tests/conftest.py", "tests/golden/make_golden.py"} <= set(names)


@pytest.mark.heavy
def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert contents(build("wheel", source, tmp_path / "wheel")) == contents(wheel)


@pytest.mark.heavy
def test_metadata(metadata):
    assert (metadata["Name"], metadata["License-Expression"]) == ("cebra-jax-metrics", "Apache-2.0")
    assert metadata["Version"] == cebra_jax_metrics.__version__
    supported = SpecifierSet(metadata["Requires-Python"])
    assert [f"3.{minor}" in supported for minor in (10, 11, 12, 13)] == [False, True, True, True]
    named = {x.rpartition(" ")[2] for x in metadata.get_all("Classifier") if ":: Python :: 3." in x}
    assert named == {"3.11", "3.12", "3.13"}
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    assert {x.name for x in requirements if x.marker is None} == RUN_TIME


def test_lowest_versions_of_ci_are_the_lower_bounds():
    """And no dependency has another bound: CI tries the lowest and the newest versions."""
    optional = PROJECT["optional-dependencies"]
    bounds = [*PROJECT["dependencies"], *optional["fit"], *optional["plot"]]
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    constraints = [line for line in lines if not line.startswith("#")]
    assert constraints == [bound.replace(">=", "==") for bound in bounds]
    for text in (*bounds, *constraints):
        assert [x.operator in (">=", "==") for x in Requirement(text).specifier] == [True], text


def test_links_of_the_readme_are_absolute_or_to_files():
    """A page of a package index would not have the files: they are for the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_citation():
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (.+)$", text, re.MULTILINE))
    assert fields["cff-version"] == "1.2.0"
    assert fields["title"] == PROJECT["name"]
    assert fields["version"] == cebra_jax_metrics.__version__
    assert fields["license"] == PROJECT["license"]
    assert "doi: 10.1038/s41586-023-06031-6" in text
