"""How gradclip meets other libraries: one module each, which imports its library in functions."""
