"""`launch up RECIPE --dry-run`: the trainer itself, shrunk, on this machine, offline, two batches.

Nothing is provisioned and no journal is written; what the trainer leaves goes away with its folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Union

from launcher.errors import Denied, JobFailed, UsageError
from trainer.config import Job, to_dict

#: Packages without which no stage runs; the rest is the trainer's business.
_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_CONFIGURATION = (64, 65)
#: A dry run shows the path, not the speed: it leaves the GPU to whoever uses it.
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def dry_run(path: Union[str, Path], overrides: Iterable[str] = (), on: Optional[str] = None) -> int:
    """Run every stage of a recipe with tiny random models; its lines go to stdout, and one
    that says how it ended. Returns 0.
    Errors: those of the recipe; `Denied` without the trainer's packages; `JobFailed`."""
    from launcher import console, recipe
    from launcher.code import archive
    from launcher.plan import stage_configs
    from trainer.boot import unpack

    loaded = recipe.load(path, overrides, on)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise Denied(
            f"a dry run needs {', '.join(missing)}", "install them: pip install 'launch-llm[train]'"
        )
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="launch-dry-run-") as folder:
        stages = stage_configs(loaded.recipe, loaded.recipe.stages, folder)
        job = Job(run="dry-run", stages=stages, dry_run=True)
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(to_dict(job)))
        given = {**os.environ, **loaded.recipe.env, **_QUIET}
        if loaded.recipe.code is not None:
            own = Path(folder) / "code"
            unpack(archive(loaded.recipe.code), own, "code")
            given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own), given.get("PYTHONPATH")]))
        code = subprocess.run(
            [sys.executable, "-m", "trainer", "run", str(file)],
            env=given,
            check=False,
        ).returncode
    if code in _CONFIGURATION:
        raise UsageError("the dry run refused the recipe: the lines above say why")
    if code != 0:
        raise JobFailed(f"the dry run failed with exit code {code}: the lines above say why")
    count = len(stages)
    console.say(
        f"dry run of {loaded.recipe.name} passed: {count} stage{'' if count == 1 else 's'} in "
        f"{time.monotonic() - begun:.0f} s; nothing was provisioned"
    )
    return 0
