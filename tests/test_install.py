"""The wheel, installed beside a torch that is already there, works outside the checkout and leaves that torch alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]

USE = """
import sys, torch, minillm, minillm.kernels.cpu.rms_norm
from minillm.transformer.generation import generate
model = minillm.load_model(sys.argv[1], dtype="float32")
print(len(list(generate(model, [[1, 2, 3]], max_tokens=5))), minillm.kernels.cpu.rms_norm.__file__)
try:
    import minillm.viz
except minillm.errors.MissingExtraError as error:
    print(error)
"""


def pip(python: Path, *arguments: str | Path) -> None:
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *index]
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("minillm", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("minillm_engine-")
    assert "minillm/kernels/cpu/rms_norm.py" in names
    assert "minillm/assets/tiny/model.safetensors" in names
    assert "minillm/assets/number_translator/tokenizer.json" in names
    assets = [info for info in zipfile.ZipFile(wheel).infolist() if info.filename.startswith("minillm/assets/")]
    assert sum(info.file_size for info in assets) <= 16 * 2**20
    # No top-level package called kernels: that name is Hugging Face's.
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"minillm"}


def test_installing_keeps_torch_and_works_elsewhere(wheel, tmp_path):
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip(python, "-c", ROOT / "constraints.txt", "torch")
    (installed,) = (tmp_path / "venv").rglob("torch-*.dist-info/RECORD")
    before = installed.stat().st_mtime_ns

    # No word about torch here, though newer ones exist.
    others = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("torch==")]
    (tmp_path / "others.txt").write_text("\n".join(others))
    pip(python, "-c", tmp_path / "others.txt", wheel)
    (after,) = (tmp_path / "venv").rglob("torch-*.dist-info/RECORD")
    assert after == installed
    assert after.stat().st_mtime_ns == before

    model = tmp_path / "model"
    FAMILIES["llama"](model)
    away = tmp_path / "away"
    away.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", USE, model], cwd=away, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    generated, missing = done.stdout.splitlines()
    assert generated.startswith("5 ")
    assert str(tmp_path / "venv") in generated
    assert missing == "minillm.viz needs an optional dependency: pip install 'minillm-engine[notebooks]'"
    script = python.parent / "minillm"
    done = subprocess.run([script, "--version"], cwd=away, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("minillm ")


def test_no_text_sends_anybody_to_somebody_elses_package():
    wrong = re.compile(r"(pip|uv|poetry) (install|add)( -\S+)* ['\"]?minillm(?!-engine)\b")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    texts = [ROOT / name for name in tracked if (ROOT / name).is_file() and (ROOT / name) != Path(__file__)]
    assert [str(path) for path in texts if wrong.search(path.read_text(encoding="utf-8", errors="ignore"))] == []
