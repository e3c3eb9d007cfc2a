"""Tables, figures, claims and the page that a notebook's run becomes. Floor 1: stands on core."""
