import psutil
import pytest
import torch

from minillm.cache.paged import PagedKVCache
from minillm.errors import OutOfMemoryError
from minillm.transformer.decoder import DecoderConfig, LayerConfig

CONFIG = DecoderConfig(50, 64, 2, 2, 32, 64, 64, (LayerConfig(),) * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_takes_the_memory_of_what_has_been_used(dtype):
    process = psutil.Process()
    before = process.memory_info().rss
    kv = PagedKVCache(CONFIG, 2**29 // (16 * CONFIG.kv_bytes_per_token(dtype)), 16, dtype=dtype)
    assert kv.num_bytes == 2**29
    assert process.memory_info().rss - before < 2**26
    assert not kv.store[:, :, :100].any()
    kv.store[:, :, :100] = 1
    assert process.memory_info().rss - before < 2**27
    assert kv.store[:, :, :100].all()
    assert not kv.store[:, :, 100].any()


def test_a_pool_larger_than_the_memory_is_an_error():
    with pytest.raises(OutOfMemoryError, match="GiB of keys and values do not fit on cpu: take fewer blocks"):
        PagedKVCache(CONFIG, 2**40, 16)
