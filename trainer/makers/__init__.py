"""From a job's blocks to the objective of a training stage, and what must be read for it."""
