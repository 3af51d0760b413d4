"""What `pip install .` gives, and that ranges and pins agree."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = {r.name: r for extra in PROJECT["optional-dependencies"].values() for r in map(Requirement, extra)}
PINS = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_every_pin_lies_in_its_range(pin):
    (only,) = pin.specifier
    assert only.operator == "=="
    declared = CORE.get(pin.name) or EXTRAS[pin.name]
    assert Version(only.version) in declared.specifier


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_everything_the_tests_need_is_pinned_once(python):
    pinned = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    dev = [Requirement(line).name for line in PROJECT["optional-dependencies"]["dev"]]
    assert sorted(pinned) == sorted({*CORE, *dev})


def test_versions_known_to_be_harmful_stay_out():
    harmful = [("pytorch-lightning", "2.6.2"), ("pytorch-lightning", "2.6.5"), ("hydra-core", "1.3.5"), ("torch", "2.9.1")]
    for name, version in harmful:
        assert Version(version) not in CORE[name].specifier


def test_what_solo_imports_is_what_it_asks_for():
    distribution = {
        "hydra": "hydra-core",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "positional_encodings": "positional-encodings",
        "sklearn": "scikit-learn",
        "pytorch_lightning": "pytorch-lightning",
        "umap": "umap-learn",
        "lightning_fabric": "pytorch-lightning",
        "nvidia": "nvidia-dali-cuda130",
        "open_clip": "open_clip_torch",
    }
    imported = set()
    for path in [*(ROOT / "solo").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | {"solo", "setuptools"}
    used = {distribution.get(name, name) for name in imported}
    others = {"triton", "llvmlite", "cv2", "kornia"}  # with torch, with numba, and two that are timed where they are installed
    assert used <= {*CORE, *EXTRAS, *others}, "pyproject.toml does not name it"
    assert set(CORE) <= used | {"tensorboard"}, "nothing imports it"  # Lightning imports tensorboard for us


TOP = {".ci", ".gitignore", "bench", "docs", "launcher.py", "main_knn.py", "main_linear.py", "main_pretrain.py", "main_umap.py",
       "pyproject.toml", "requirements.txt", "scripts", "setup.py", "solo", "tests", "CHANGELOG.md", "CITATION.cff",
       "CONTRIBUTING.md", "LAB.md", "LICENSE", "Makefile", "README.md"}


def test_nothing_slipped_into_the_repository():
    """As a run's folder would, where a command was tried in it."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git here")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} == TOP


@pytest.mark.slow
def test_pip_install_gives_an_importable_typed_package(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools to build with")
    clone, site = tmp_path / "clone", tmp_path / "site"
    clone.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", PROJECT["readme"]):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "solo", clone / "solo", ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-t", str(site)]
    subprocess.run([*install, "."], cwd=clone, check=True)
    assert (site / "solo" / "py.typed").is_file()
    written = {path.relative_to(clone) for path in (clone / "solo").rglob("*.py")}
    assert {path.relative_to(site) for path in (site / "solo").rglob("*.py")} == written
    assert not (site / "tests").exists()
    # -S keeps this environment's own site-packages, and so the clone's editable install, out
    source = "import solo.errors, solo.registry, sys; print(solo.__file__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", source],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(found) == site / "solo" / "__init__.py"
