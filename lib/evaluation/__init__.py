"""lm_eval adapter, tasks, likelihoods, paired statistics, model cards. Floor 7: stands on pruning and texts."""
