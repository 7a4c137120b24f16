"""``python -m gradclip``: the same as the command ``gradclip``."""

from gradclip.cli import main

if __name__ == "__main__":
    main()
