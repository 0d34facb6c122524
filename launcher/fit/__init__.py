"""Will it fit: the memory of one device at its peak, part by part, and what would make it fit.

The arithmetic follows the trainer's own step (docs/forecast.md); benchmarks/memory.py compares it
with what torch counts. Pure: no file, no network, no torch.
"""

from launcher.fit.changes import Change as Change
from launcher.fit.changes import changes as changes
from launcher.fit.changes import same_rows as same_rows
from launcher.fit.memory import checkpoint_bytes as checkpoint_bytes
from launcher.fit.memory import memory as memory
from launcher.fit.memory import staying as staying
from launcher.fit.memory import unknown as unknown
from launcher.fit.parts import Memory as Memory
from launcher.fit.parts import Part as Part
