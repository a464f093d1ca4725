"""Metrics as sums, paired bootstrap intervals and gates. Nothing in here imports torch.

A metric is a sum of per-sample statistics followed by a formula. That one decision makes everything else a weighted
sum: a slice is a mask, a bootstrap draw is an integer weight per simulation, and an evaluation is a small file.
"""
