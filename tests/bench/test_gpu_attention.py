"""What peers on a GPU are given; they are not here, so a stand-in with their signature looks at it."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from minillm.bench.gpu_attention import QUERIES, Decode, flash_attn, sdpa_on_gathered
from minillm.cache import reference


def decode(batch=2, context=512, heads=4, kv_heads=2, head_dim=16):
    torch.manual_seed(0)
    blocks = batch * context // 16
    k_cache, v_cache = torch.randn(2, blocks, kv_heads, 16, head_dim)
    tables = torch.randperm(blocks).view(batch, -1)
    q = torch.randn(batch, heads, head_dim)
    return Decode(q, k_cache, v_cache, tables, torch.arange(batch + 1), torch.full((batch,), context))


def test_flash_attn_gets_pages_as_its_documentation_wants_them(monkeypatch):
    given = []
    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = lambda q, k_cache, v_cache, **options: given.append((q, k_cache, v_cache, options))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    one = decode()
    for run in flash_attn([one, one]):
        run()
    assert len(given) == 2
    q, k, v, options = given[0]
    assert q.shape == (2, 1, 4, 16)  # batch, queries, heads, head_dim
    assert k.shape == v.shape == (4, 256, 2, 16)  # pages, page size (a multiple of 256), key/value heads, head_dim
    assert set(options) == {"cache_seqlens", "block_table"}
    assert options["cache_seqlens"].tolist() == [512, 512]
    assert options["block_table"].shape == (2, 2)
    assert sorted(options["block_table"].flatten().tolist()) == [0, 1, 2, 3]
    assert options["cache_seqlens"].dtype == options["block_table"].dtype == torch.int32


def test_sdpa_gets_the_same_keys_as_the_kernel():
    one = decode()
    (run,) = sdpa_on_gathered([one])
    expected = reference.paged_attention(*one, max_query_len=1, scale=16**-0.5)
    torch.testing.assert_close(run()[:, :, 0], expected, atol=1e-5, rtol=1e-5)


def test_steps_with_prompts_are_possible():
    for new, keys in QUERIES.values():
        assert len(new) == len(keys)
        assert all(0 < n <= k for n, k in zip(new, keys, strict=True))
