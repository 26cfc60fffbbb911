"""What a run needs before it is started: memory, batch sizes and time, by arithmetic alone.

shapes.py   a model's parameters and KV cache      devices.py   GPUs and clusters
memory.py   bytes a device, by part                roofline.py  seconds, from bandwidth and FLOP/s
job.py      from a configuration to the numbers    remedies.py  what to change where it does not fit
"""
