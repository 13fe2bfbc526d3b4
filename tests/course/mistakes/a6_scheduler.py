"""Typical mistakes in assignment 6, and what each costs.

What breaks the rules of a step (more tokens than the budget, a decode that is left out) costs its own task, and task 5,
where all pieces run together.
"""

TOGETHER = {"engine": 15, "goodput_50": 8, "goodput_80": 6, "goodput_95": 6}

MISTAKES = [
    {
        "name": "max_tokens counts a token that is never stored",
        "solution": "my_refusing",
        "old": "request.max_tokens - 1",
        "new": "request.max_tokens",
        "loses": {"refusing": 10},
        "message": "so it must not be refused",
    },
    {
        "name": "a prompt is computed whole, whatever the budget",
        "solution": "my_continuing",
        "old": "count = min(request.num_uncomputed_tokens, step.budget)",
        "new": "count = request.num_uncomputed_tokens",
        "loses": {"chunks": 10, **TOGETHER},
        "message": "and never more than step.budget",
    },
    {
        "name": "prompts come before decodes",
        "solution": "my_continuing",
        "old": "decodes + prompts",
        "new": "prompts + decodes",
        "loses": {"decodes_first": 10, **TOGETHER},
        "message": "is left out: decodes come first",
    },
    {
        "name": "a preempted request's tokens are not given back to the budget",
        "solution": "my_preempting",
        "old": "step.budget += part.count",
        "new": "pass",
        "loses": {"preempting": 10},
        "message": "step.budget is",
    },
    {
        "name": "static batching: nobody joins while somebody runs",
        "solution": "my_whole",
        "old": "if not step.preempted:",
        "new": "if not self.running:",
        "loses": {"goodput_50": 8, "goodput_80": 6, "goodput_95": 6},
        "message": "requests a second keep the promises",
    },
]
