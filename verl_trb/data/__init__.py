"""From the data sets as they circulate to the files a run reads; `python -m verl_trb.prepare_data` is the command."""

# The paper's.
SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
