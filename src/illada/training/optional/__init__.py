"""What a run can do without: kernels of other libraries, a command on every checkpoint, trackers, plots, baselines,
estimates, utilisation, warnings, the line of progress, dropout, an average of the weights, what to do at a spike.

Nothing in `illada.training` except `setup` and `trainer` imports from here.
"""
