"""One process or many: the same calls, which do nothing where there is only one."""
