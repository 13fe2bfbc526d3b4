"""What the OpenAPI page says is what the server does: schemathesis asks by it, and reads the answers by it."""

from __future__ import annotations

import subprocess
import sys

from minillm import LLM
from tests.server.conftest import SMALL, running

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def test_every_answer_is_as_the_page_says():
    with LLM("tiny", **SMALL | {"max_model_len": 48}) as llm, running(llm) as server:  # short, so that answers are
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color",
            "--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS), "--max-examples", "15",
            "--seed", "0", "--generation-deterministic", "--continue-on-failure",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.http.get("/health").status_code == 200
        assert server.until(lambda: server.num_held == 0)
