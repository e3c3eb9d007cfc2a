"""How the embedded family of reference models is made: texts, tasks, tokenizer, objectives, training."""
