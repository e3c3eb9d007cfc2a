"""lm_eval adapter, tasks, likelihoods, paired statistics, model cards. Floor 6: stands on pruning and texts."""
