"""On a GPU: nothing is compiled inside a request."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def compiled() -> dict[str, int]:
    """Kernel → how often it was compiled, or read from the disk, in this process."""
    from triton.runtime.jit import JITFunction

    import minillm.kernels.gpu as package

    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return {
        f"{name}.{key}": sum(len(entry[0]) for entry in value.device_caches.values())
        for name in names
        for key, value in vars(importlib.import_module(f"{package.__name__}.{name}")).items()
        if isinstance(value, JITFunction)
    }


def main(model: str, dtype: str, *, enforce_eager: bool) -> None:
    """Prompts of many lengths, alone, together, in pieces, and in small and large decode batches."""
    from minillm.engine.params import SamplingParams
    from minillm.llm import LLM

    sizes = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 400, "max_model_len": 300}
    with LLM(model, dtype=dtype, device="cuda", skip_tokenizer_init=True, enforce_eager=enforce_eager, **sizes) as llm:
        before = compiled()
        assert sum(before.values()) > 4, before
        lengths = (1, 2, 3, 5, 7, 16, 17, 33, 64, 150, 280)
        params = SamplingParams(temperature=0.8, top_p=0.9, seed=0, max_tokens=6, ignore_eos=True)
        for length in lengths:
            llm.generate([[5] * length], params, use_tqdm=False)
        llm.generate([[5] * length for length in lengths * 3], params, use_tqdm=False)
        assert compiled() == before, {key: count for key, count in compiled().items() if before[key] != count}


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("qwen3", "bfloat16"), ("llama", "float32"), ("gemma3", "bfloat16")])
def test_nothing_is_compiled_inside_a_request(name, dtype, enforce_eager, tmp_path):
    from tests.models.families import FAMILIES

    FAMILIES[name](tmp_path)
    call = f"from tests.gpu.test_warm_up import main; main({str(tmp_path)!r}, {dtype!r}, enforce_eager={enforce_eager})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
