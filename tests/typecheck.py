"""The checker that jaxtyping puts on every function of lib under pytest."""

from beartype import BeartypeConf, beartype

# As type checkers do, an int passes where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
