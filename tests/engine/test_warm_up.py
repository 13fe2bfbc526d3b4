"""Nothing is compiled inside a request."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("numba")

PROGRAM = """
import importlib, pkgutil
from numba.core.dispatcher import Dispatcher
import minillm.kernels.cpu as package
from minillm import LLM, SamplingParams

def compiled():
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {
        f"{name}.{key}": len(value.signatures)
        for name, module in modules.items() for key, value in vars(module).items() if isinstance(value, Dispatcher)
    }

sizes = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
with LLM("tiny", dtype="DTYPE", quantization=QUANTIZATION, device="cpu", **sizes) as llm:
    before = compiled()
    prompts = [[5] * length for length in (1, 7, 16, 33, 150)]
    llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.9, seed=0, max_tokens=6), use_tqdm=False)
    assert sum(before.values()) > 4
    assert compiled() == before, {key: count for key, count in compiled().items() if before[key] != count}
"""


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")]
)
def test_nothing_is_compiled_inside_a_request(dtype, quantization):
    program = PROGRAM.replace("DTYPE", dtype).replace("QUANTIZATION", repr(quantization))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
