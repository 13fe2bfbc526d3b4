"""`pytest --nbval notebooks` runs them in the environment in which they were built."""

import os
import runpy
from pathlib import Path

os.environ.update(runpy.run_path(str(Path(__file__).with_name("build.py")))["ENVIRONMENT"])
