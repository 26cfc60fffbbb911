"""Tasks whose models and data this repository makes by itself at first use.

`prepare.py` is the entrance: `prepare(name, cache_dir)` returns the four paths a run needs. Each task is one
file with its prompts, its ground truth and its `compute_score` (verl's custom reward function, loaded with
`reward.custom_reward_function.path=pkg://verl_trb.tasks.table_walk`).
"""
