"""Typical mistakes in assignment 2, the points that each loses, and what the student is told."""

from typing import Any

MISTAKES: list[dict[str, Any]] = [
    {
        # It trains all the same, so it costs its own task only.
        "name": "post-norm instead of pre-norm",
        "solution": "a2_encoder",
        "old": (
            "        x = x + self.attention(self.attention_norm(x), rotation, kv)\n"
            "        return x + self.feed_forward(self.feed_forward_norm(x))\n"
        ),
        "new": (
            "        x = self.attention_norm(x + self.attention(x, rotation, kv))\n"
            "        return self.feed_forward_norm(x + self.feed_forward(x))\n"
        ),
        "loses": {"a2_encoder_tests": 15},
        "message": "That is post-norm: the norm belongs before the sublayer",
    },
    {
        "name": "heads are not put side by side again",
        "solution": "a2_cross",
        "old": "out.transpose(1, 2).flatten(-2)",
        "new": "out.reshape(x.shape)",
        "loses": {"a2_cross_tests": 15, "a2_translator_tests": 15},
        "message": "Tokens and heads are mixed",
    },
    {
        "name": "padding of the source is seen",
        "solution": "a2_cross",
        "old": "dot_product_attention(q, k, v, mask)",
        "new": "dot_product_attention(q, k, v)",
        "loses": {"a2_cross_tests": 15},
        "message": "Is the mask used?",
    },
    {
        "name": "cross-attention before self-attention",
        "solution": "a2_decoder",
        "old": (
            "        x = x + self.attention(self.attention_norm(x), None, kv)\n"
            "        x = x + self.cross_attention(self.cross_attention_norm(x), k, v, mask)\n"
        ),
        "new": (
            "        x = x + self.cross_attention(self.cross_attention_norm(x), k, v, mask)\n"
            "        x = x + self.attention(self.attention_norm(x), None, kv)\n"
        ),
        "loses": {"a2_decoder_tests": 15},
        "message": "Cross-attention stands second",
    },
    {
        "name": "the target is not shifted",
        "solution": "a2_shift",
        "old": "[[start_id, *row] for row in rows]",
        "new": "[[*row, stop_id] for row in rows]",
        "loses": {"a2_shift_tests": 10, "a2_translator_tests": 15},
        "message": "Inputs begin with the start token",
    },
    {
        "name": "padding is to be learned",
        "solution": "a2_shift",
        "old": "for row in rows], IGNORED)",
        "new": "for row in rows])",
        "loses": {"a2_shift_tests": 10},
        "message": "labels[1, 2] is 0, and should be -100",
    },
    {
        "name": "smoothing spread over the other tokens only",
        "solution": "a2_loss",
        "old": "costs.mean(dim=-1)",
        "new": "(costs.sum(dim=-1) - of_labels) / (costs.shape[-1] - 1)",
        "loses": {"a2_loss_tests": 15},
        "message": "ε is spread over all tokens, the label included.",
    },
    {
        "name": "PyTorch's loss is handed in",
        "solution": "a2_loss",
        "old": "    real = labels != IGNORED\n",
        "new": "    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())\n",
        "loses": {"a2_loss_tests": 15, "a2_translator_tests": 15},
        "message": "this task is about writing it yourself: do not use torch.nn.functional:cross_entropy",
    },
    {
        "name": "gradients are not clipped",
        "solution": "a2_step",
        "old": "    nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n",
        "new": "",
        "loses": {"a2_step_tests": 10},
        "message": "Is the gradient clipped to length 1",
    },
    {
        "name": "the target must be exceeded",
        "solution": "a2_until",
        "old": ">= target",
        "new": "> target",
        "loses": {"a2_until_tests": 5},
        "message": "calls has 9 items, and should have 6",
    },
]
