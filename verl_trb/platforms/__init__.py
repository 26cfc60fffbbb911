"""Entry point of the group `verl.plugins`: verl loads it at `import verl`, in every process of a run."""


def register() -> None:
    """Make verl know the CPU platform; switch it on only where verl finds no accelerator."""
    from verl_trb.platforms import cpu

    cpu.register()


# verl calls `entry_point.load()`, which imports this module and returns the attribute without calling it.
register()
