"""Benchmarks of the operators: outside the package, which never imports them."""
