"""How gradclip meets other libraries: one module each, and no other imports its library."""
