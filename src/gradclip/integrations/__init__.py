"""How gradclip meets other libraries: one module each, which imports its library in functions.

Only a module whose class derives from one of its library's imports that where it begins
(``transformers``, ``lightning``, ``robo_orchard``), so import the module that you need.
"""
