"""Reward functions: the final answer of a response, checked by math-verify or reasoning-gym inside a sandbox."""
