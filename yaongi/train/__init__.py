"""The trainer: `python -m yaongi.train`.

The rooms, in the order of a run: `command_line`, `config`; `plan`; `session`, which holds the run together; `step`,
`optimizer`, `schedule`; `metrics`, `evaluation`, `checkpoint`, `report`; and `distributed`, which is all of it on many
devices.
"""

import os

# Before torch is loaded. Threads that wait for each other in a loop make a busy machine five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
