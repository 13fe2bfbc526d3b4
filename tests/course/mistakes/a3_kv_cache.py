"""Typical mistakes in assignment 3, the points that each loses, and what the student is told."""

from typing import Any

MISTAKES: list[dict[str, Any]] = [
    {
        "name": "values forgotten in the bytes of a token",
        "solution": "a3_bytes",
        "old": "2 * config.num_kv_heads",
        "new": "config.num_kv_heads",
        "loses": {"a3_bytes_tests": 10},
        "message": "bytes_per_token(config, torch.float16) is 32, and should be 64",
    },
    {
        "name": "bytes counted for query heads",
        "solution": "a3_bytes",
        "old": "config.num_kv_heads",
        "new": "config.num_heads",
        "loses": {"a3_bytes_tests": 10},
        "message": "key/value heads rather than query heads",
    },
    {
        # Harmless at last in a causal decoder, where the row's next token overwrites what was written behind it.
        "name": "padding is written",
        "solution": "a3_write",
        "old": "slots[row, start : start + length] = new[row, :length]",
        "new": "slots[row, start : start + batch.seq_len] = new[row, : slots[row, start:].shape[0]]",
        "loses": {"a3_write_tests": 15},
        "message": "slots[0, 4] is -1, and should be 0",
    },
    {
        "name": "written at the step instead of the position",
        "solution": "a3_write",
        "old": "slots[row, start : start + length]",
        "new": "slots[row, :length]",
        "loses": {"a3_write_tests": 15, "a3_story_tests": 10},
        "message": "slots[0, 0] is 7, and should be 1",
    },
    {
        "name": "a token does not see itself",
        "solution": "a3_visible",
        "old": "<=",
        "new": "<",
        "loses": {"a3_visible_tests": 15, "a3_story_tests": 10},
        "message": "the mask lets some token, or padding, see nothing. Does a token see itself",
    },
    {
        "name": "a full store is not noticed",
        "solution": "a3_store",
        "old": "if batch.end > self.max_len:",
        "new": "if batch.seq_len > self.max_len:",
        "loses": {"a3_room_tests": 10},
        "message": "should raise CacheFullError, and raised nothing",
    },
    {
        "name": "the mask is not used",
        "solution": "a3_store",
        "old": "self.mask, scale",
        "new": "None, scale",
        "loses": {"a3_attend_tests": 20, "a3_story_tests": 10},
        "message": "is the mask used?",
    },
    {
        "name": "the package's answer is handed in",
        "solution": "a3_store",
        "old": "        self.specs = config.attention_specs  # one a layer",
        "new": "        ContiguousCache(config, batch_size, max_len)\n        self.specs = config.attention_specs",
        "loses": {"a3_room_tests": 10, "a3_attend_tests": 20, "a3_story_tests": 10},
        "message": "this task is about writing it yourself",
    },
    {
        "name": "the head counted for every token",
        "solution": "a3_pass_flops",
        "old": "    return 2 * (config.num_layers * new * (projections + feed_forward + attention) + head)",
        "new": "    return 2 * new * (config.num_layers * (projections + feed_forward + attention) + head)",
        "loses": {"a3_pass_flops_tests": 10},
        "message": "pass_flops(config, new=3, keys=5) is 1344, and should be 1184",
    },
    {
        "name": "one pass too many",
        "solution": "a3_generation_flops",
        "old": "range(prompt, prompt + written)",
        "new": "range(prompt, prompt + written + 1)",
        "loses": {"a3_generation_flops_tests": 10},
        "message": "How many passes are there",
    },
]
