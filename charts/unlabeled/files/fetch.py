"""Fetch the models that a new pod starts with: what STAGE holds, else RUN. Each file is hashed against its record."""

import os
import sys
from pathlib import Path

from unlabeled.errors import CheckFailed, InputError
from unlabeled.lineage.promotion import at_stage
from unlabeled.lineage.registry import Registry

try:
    registry = Registry(os.environ["REGISTRY_GIT"], os.environ["REGISTRY_REMOTE"])
    stage = os.environ.get("STAGE")
    promotion = at_stage(registry, stage) if stage else None
    run = promotion.run if promotion else os.environ["RUN"]
    if not run:
        raise InputError(f"stage '{stage}' holds nothing yet: promote a run, or name one in serving.run")
    registry.fetch(run, Path("/models"), ["repository"])
    print(f"serving starts with run {run}" + (f", {promotion}" if promotion else ""))
except (CheckFailed, InputError) as error:
    sys.exit(str(error))
