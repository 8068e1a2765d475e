"""The trainer: `python -m yaongi.train`.

Its modules, in the order in which a run uses them: `program`, the whole run in one readable page; `command_line` and
`config`; `job`, what a run is for, in whose place tuning puts its own; `plan`; `session`, which ties the run together;
`step`, `optimizer` and `schedule`; `metrics`, `evaluation`, `checkpoint` and `report`. `distributed` holds what several
processes need.
"""
