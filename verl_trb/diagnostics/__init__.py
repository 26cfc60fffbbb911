"""What rollouts look like to the two models: the diagnostics of arXiv 2605.31159, as `python -m verl_trb.diagnose`.

statistics.py has the numbers (pure functions), rollouts.py samples and scores, plots.py draws.
"""
