"""One step on the device: packed batches, the forward pass on one or several ranks, sampling.

May import `engine.api`, `engine.scheduling` and `models.network`. Read batch.py, runner.py,
sampler.py; ranks.py runs the same step on several ranks.
"""
