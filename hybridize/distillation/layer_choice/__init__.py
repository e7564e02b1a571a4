"""Which layers shall keep full attention: those whose loss a model notices most, found one after the other."""
